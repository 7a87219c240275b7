"""Assertions on the files of a run that a recipe has trained for a few steps."""

import csv
import json
from pathlib import Path

from callbacks.run.csv_logger import TRAINING, read_metrics_csv
from experiments import METHODS
from experiments.run.recipes import Recipe

OF_SETS = ("precision-at", "svm-", "fid/")  # metrics without values of single images


def assert_results_are_recorded(folder: Path) -> None:
    """Check that the record has metrics and, unless they are those of sets, that the table has the images of each set."""
    metrics = json.loads((folder / "record.json").read_text())["metrics"]
    assert metrics
    if all(name.startswith(OF_SETS) for protocols in metrics.values() for name in protocols):
        return
    with (folder / "test_images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["dataset"] for row in rows} == metrics.keys()
    assert len({(row["dataset"], row["image"]) for row in rows}) == len(rows)
    assert any(value for name, value in rows[0].items() if name not in ("dataset", "image"))


def assert_losses_are_documented(recipe: Recipe, folder: Path) -> None:
    """Assert that the page of the method documents every loss and learning rate in the log of a run."""
    page = (METHODS / recipe.name.partition("/")[0] / "README.md").read_text()
    logged = {row["name"] for row in read_metrics_csv(folder / "metrics.csv")}
    training = {name for name in logged if name.startswith(TRAINING)}
    assert training
    assert not [name for name in training if f"`{name}`" not in page]
