"""Initialization of the output bias of a decoder with the mean image."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from callbacks.metrics.protocols import HasOutputBias
from datamodules.errors import UserError

N_IMAGES = 10_000  # images in the mean


class InitOutputBias(Callback):
    """Sets the last bias of a decoder before the first step, so that it outputs the mean of 10,000 training images.

    As in the code of Burda et al., arXiv:1509.00519. With a zero bias, the decoder spends the first thousand steps on learning
    which pixels are always black, and latents that are unused in the meantime collapse.

    Calls the method's `init_output_bias(mean)`.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require a method with `init_output_bias`.

        Raises:
            UserError: the method has no such function.
        """
        if not isinstance(pl_module, HasOutputBias):
            raise UserError(f"InitOutputBias: {type(pl_module).__name__} has no init_output_bias; remove this callback")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the bias in a new run, not in a resumed one; all ranks compute the same bias."""
        if pl_module.images_seen == 0:
            data = trainer.datamodule
            pl_module.init_output_bias(data.preview_images(min(N_IMAGES, len(data.items))).mean(0))
