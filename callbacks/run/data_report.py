"""Report of unusable data files."""

from typing import Any

from lightning.pytorch.callbacks import Callback


class PrintDataReport(Callback):
    """Callback that prints the number and the names of unusable files that were skipped."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Print the report, after the setup of the datamodule."""
        skipped = trainer.datamodule.data_report.skipped if trainer.datamodule else []
        if skipped and trainer.is_global_zero:
            print(f"left out  {len(skipped)} unusable files: {'; '.join(skipped)}", flush=True)
