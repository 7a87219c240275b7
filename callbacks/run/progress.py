"""Progress bar with images, throughput, the monitored metric and the remaining time."""

import time
from typing import Any

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

BAR_WIDTH = 18  # columns; the bar, the numbers and the remaining time fit into 80


class ProgressBar(Callback):
    """Callback that shows a progress bar over the training budget; without a terminal, it prints one line per validation.

    Args:
        monitor: metric to show next to the bar.
    """

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor
        self.console = Console()
        self.progress: Progress | None = None
        self.last_drawn = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the bar."""
        self.started, self.images_at_start = time.monotonic(), pl_module.images_seen
        self._open(trainer, "images", pl_module.total_images, pl_module.images_seen)

    def _open(self, trainer: Any, unit: str, total: int, completed: int = 0) -> None:
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        cut = Column(no_wrap=True, overflow="ellipsis")  # on a narrow terminal
        self.progress = Progress(
            BarColumn(bar_width=BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
            TaskProgressColumn(),
            TextColumn(f"{{task.completed:,.0f}} of {{task.total:,.0f}} {unit}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[text]}", table_column=cut),
            console=self.console,
            auto_refresh=False,  # a refresh thread would compete with the training loop for the interpreter
        )
        self.task = self.progress.add_task("", total=total, completed=completed, text="")
        self.progress.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bar at most twice a second."""
        if self.progress is not None and (now := time.monotonic()) - self.last_drawn > 0.5:
            self.last_drawn = now
            self.progress.update(self.task, completed=pl_module.images_seen, text=self._status_text(trainer, pl_module))
            self.progress.refresh()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the progress and the metric if there is no bar."""
        if trainer.state.fn == "validate":
            self._close()
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking and self.progress is None:
            done = f"{pl_module.images_seen:,} of {pl_module.total_images:,} images"
            print(f"{done}  {self._status_text(trainer, pl_module)}{self._time_left(pl_module)}", flush=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the completed bar on the terminal."""
        if self.progress is not None:
            self.progress.update(self.task, completed=pl_module.images_seen, text=self._status_text(trainer, pl_module))
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.refresh()
            self.progress.stop()
            self.progress = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    # Evaluation: `test`, and `validate` outside of training

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Show a bar over the evaluation batches of this rank."""
        self._open(trainer, "batches", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Any, *args: Any) -> None:
        """Advance the bar."""
        if self.progress is not None:
            self.progress.advance(self.task)
            self.progress.refresh()

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the completed bar on the terminal."""
        self._close()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Show a bar, see `on_test_start`."""
        if trainer.state.fn == "validate":
            self._open(trainer, "batches", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        """Advance the bar, see `on_test_batch_end`."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer)

    def _time_left(self, pl_module: Any) -> str:
        done, left = pl_module.images_seen - self.images_at_start, pl_module.total_images - pl_module.images_seen
        seconds = round((time.monotonic() - self.started) * left / done) if done else 0
        return f"  {seconds // 60}:{seconds % 60:02d} left" if left > 0 and done else ""

    def _status_text(self, trainer: Any, pl_module: Any) -> str:
        rate = (pl_module.images_seen - self.images_at_start) / (time.monotonic() - self.started)
        fields = [f"{rate:,.0f}/s"]
        if self.monitor is not None and self.monitor in trainer.callback_metrics:
            short = self.monitor.partition("/")[2] or self.monitor  # without the dataset
            name = self.monitor if self.progress is None else short
            fields.insert(0, f"{name} {float(trainer.callback_metrics[self.monitor]):.3f}")
        return "  ".join(fields)
