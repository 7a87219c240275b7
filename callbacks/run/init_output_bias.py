"""A decoder that begins with the mean picture."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from datamodules.errors import UserError

EXAMPLES = 10_000  # pictures whose mean it is


class InitOutputBias(Callback):
    """Before the first step, gives the last bias of a decoder what makes the mean of the first 10,000 training pictures.

    As Burda et al., arXiv:1509.00519, in their code. From zero, the first thousand steps only teach the decoder which pixels
    are always black, and latents that are of no use in the meantime are lost.

    Calls the method's `begin_with(mean)`.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what has no such bias."""
        if not hasattr(pl_module, "init_output_bias"):
            raise UserError(f"InitOutputBias: {type(pl_module).__name__} has no decoder that begins with a picture")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """In a run that begins, not in one that goes on; every process computes the same."""
        if pl_module.images_seen == 0:
            data = trainer.datamodule
            pl_module.init_output_bias(data.preview_images(min(EXAMPLES, len(data.items))).mean(0))
