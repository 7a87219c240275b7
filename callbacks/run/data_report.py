"""Report of the images of a run, and of unusable data files."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from datamodules.errors import escape_controls


class PrintDataReport(Callback):
    """Callback that prints the names of unusable files that were skipped, and remarks on other images.

    Attributes:
        counts: print the number of images of each dataset, too.
    """

    def __init__(self) -> None:
        self.counts = False
        self.printed: set[str] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Print the report, after the setup of the datamodule."""
        if not trainer.datamodule or not trainer.is_global_zero:
            return
        report = trainer.datamodule.data_report
        counts = {name: report.array_lengths.get(name, len(images)) for name, images in report.content_hashes.items()}
        found = [f"{name} {count:,}" for name, count in counts.items() if name not in self.printed]
        if found and self.counts:
            print(f"images    {', '.join(found)}", flush=True)
        self.printed |= counts.keys()
        for note in report.notes:
            if note not in self.printed:
                print(escape_controls(f"note      {note}"), flush=True)
        self.printed |= {*report.notes}
        if report.skipped:
            print(escape_controls(f"left out  {len(report.skipped)} unusable files: {'; '.join(report.skipped)}"), flush=True)
