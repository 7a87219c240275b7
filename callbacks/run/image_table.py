"""Table of the test results of each image, as a CSV file."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from callbacks.metrics.base import Metric


class ImageTable(Callback):
    """Callback that writes the results of each test image: a row for each image, and a column for each protocol.

    Metrics of a set as a whole, such as FID, have no values of single images.

    Args:
        path: the CSV file; it is replaced by each test.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table, if there are values of single images."""
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for callback in trainer.callbacks:
            if isinstance(callback, Metric):
                for dataset, images in callback.image_results.items():
                    for name, values in images.items():
                        rows.setdefault((dataset, name), {}).update(values)
        columns = list(dict.fromkeys(protocol for values in rows.values() for protocol in values))
        if not columns or not trainer.is_global_zero:
            return
        with self.path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.DictWriter(file, ["dataset", "image", *columns])
            table.writeheader()
            table.writerows({"dataset": dataset, "image": name, **values} for (dataset, name), values in rows.items())
