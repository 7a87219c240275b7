"""Initialization of the output bias of a decoder with the mean image."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from callbacks.metrics.protocols import HasOutputBias
from datamodules.errors import UserError

N_IMAGES = 10_000  # images in the mean


class InitOutputBias(Callback):
    """Callback that sets the last bias of a decoder before the first step to output the mean of 10,000 training images.

    The code of Burda et al., arXiv:1509.00519, does the same. With a zero bias, the decoder needs about a thousand steps to
    learn which pixels are always black. Latents that are unused during these steps collapse.

    The callback calls the method's `init_output_bias(mean)`.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require a method with `init_output_bias`.

        Raises:
            UserError: the method does not have it.
        """
        if not isinstance(pl_module, HasOutputBias):
            raise UserError(f"InitOutputBias: {type(pl_module).__name__} has no init_output_bias. Remove this callback")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the bias in a new run, not in a resumed one; all ranks compute the same bias."""
        if pl_module.images_seen == 0:
            data = trainer.datamodule
            pl_module.init_output_bias(data.preview_images(min(N_IMAGES, len(data.items))).mean(0))
