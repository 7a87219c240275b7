"""The run's figures as a CSV file that only grows."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

COLUMNS = ["step", "images", "name", "value"]


class CSVLogger(Logger):
    """One row a figure: step, images seen, name, value. Nothing that is written is ever lost or rewritten.

    Lightning's CSVLogger deletes the file of an earlier part of the run and rewrites it when a new name appears.

    Args:
        path: the file. What stands in it stays; rows after `resumed_at`, which a resumed run logs again, go.
        resumed_at: the images seen in the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        super().__init__()
        self.path = path
        self.images = resumed_at
        self._truncate_after(resumed_at)

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "csv"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def _truncate_after(self, images: int) -> None:
        rows = read_metrics_csv(self.path) if self.path.exists() else []
        tmp_path = self.path.with_suffix(".part")
        with tmp_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["images"]) <= images)
        tmp_path.replace(self.path)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row a figure; `images` among them counts for all that follow."""
        self.images = int(metrics.get("images", self.images))
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            for name, value in metrics.items():
                if name not in ("images", "epoch"):
                    writer.writerow([step, self.images, name, repr(float(value))])


def read_metrics_csv(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log; a last one that was cut short by a kill is left out."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["value"]]
