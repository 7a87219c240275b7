"""What is said before the first step."""

from typing import Any

from lightning.pytorch.callbacks import Callback


class PrintDataReport(Callback):
    """Says how many unusable files were left out, and which."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After the datamodule has looked at its pictures."""
        skipped = trainer.datamodule.data_report.skipped if trainer.datamodule else []
        if skipped and trainer.is_global_zero:
            print(f"left out  {len(skipped)} unusable files: {'; '.join(skipped)}", flush=True)
