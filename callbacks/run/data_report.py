"""What is said before the first step."""

from typing import Any

from lightning.pytorch.callbacks import Callback


class Preflight(Callback):
    """Says how many unusable files were left out, and which."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After the datamodule has looked at its pictures."""
        left_out = trainer.datamodule.survey.left_out if trainer.datamodule else []
        if left_out and trainer.is_global_zero:
            print(f"left out  {len(left_out)} unusable files: {'; '.join(left_out)}", flush=True)
