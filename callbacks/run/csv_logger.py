"""Logged metrics as an append-only CSV file."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.errors import UserError

COLUMNS = ["step", "images", "name", "value"]
TRAINING = ("train/", "learning_rate")  # prefixes of the names of training values; the other names are those of metrics


class CSVLogger(Logger):
    """Logger that writes one row per metric: step, images seen, name, value.

    Lightning's CSVLogger deletes the file when a run resumes, and rewrites it when a new name appears.

    Args:
        path: CSV file. Rows up to `resumed_at` are kept. Later rows are removed, because the resumed run logs them again.
        resumed_at: images seen in the checkpoint from which the run resumes.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        super().__init__()
        self.path = path
        self.images = resumed_at
        self._truncate_after(resumed_at)

    @property
    def name(self) -> str:
        """Name, required by Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """Version, required by Lightning; empty."""
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
        """Do nothing: config.yaml contains the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row per metric; the entry "images" sets the images seen for these and all later rows."""
        self.images = int(metrics.get("images", self.images))
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            for name, value in metrics.items():
                if name not in ("images", "epoch"):
                    writer.writerow([step, self.images, name, repr(float(value))])


def read_metrics_csv(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a log, without a last row that was truncated when the run was killed.

    Raises:
        UserError: the file is damaged; the message names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a log: {error}. Restore it, or remove it") from None
    for number, row in enumerate(rows, 2):
        if row.keys() != set(COLUMNS) or not (_is_row(row) or number == len(rows) + 1):
            raise UserError(f"{path}, line {number}: not a row of a log, {', '.join(COLUMNS)}. Restore the file, or remove it")
    return [row for row in rows if _is_row(row)]


def _is_row(row: Mapping[str, str | None]) -> bool:
    try:
        int(row["images"] or "")
        float(row["value"] or "")
    except ValueError:
        return False
    return True
