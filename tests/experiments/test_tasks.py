"""Add an external task with one object in the registry."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import Dataset

from datamodules.io.image_io import read_image
from experiments.cli.main import main
from experiments.tasks import registry
from experiments.tasks.task import Task
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import write_yaml
from tests.modules import test_step_features


class Inputs(Dataset[dict[str, Any]]):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": [read_image(self.files[index])[:1].float() / 255], "path": str(self.files[index])}


class TextWriter(BasePredictionWriter):
    def __init__(self, paths: dict[str, Path]) -> None:
        super().__init__("batch")
        self.paths = paths

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *args: Any) -> None:
        self.paths[prediction["path"]].with_suffix(".txt").write_text(f"{prediction['prediction'][0].item()}")


TASK = Task(test_step_features.RaggedCrops, predict=lambda cli, files, paths, output: (Inputs(files), TextWriter(paths)))


def main_with_task(argv: list[str]) -> int:
    registry.TASKS.append(TASK)
    return main(argv)


def test_predict_uses_an_external_task(workdir, photos, capfd):
    data = {"class_path": "tests.modules.test_step_features.RaggedCrops", "init_args": {"batch_size": 4}}
    metric = {"class_path": "tests.modules.test_step_features.MeanError"}
    recipe = write_yaml(workdir / "tiny.yaml", test_step_features.TestMeanRegression.model, data, [metric])
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "3200"]) == 0
    assert forked(main_with_task, ["predict", str(recipe), "--run", "r", "--input", str(photos), "--output", "out"]) == 0
    for path in photos.iterdir():
        mean = read_image(path)[:1].float().mean() / 255
        assert abs(float((workdir / "out" / f"{path.stem}.txt").read_text()) - mean) < 0.3
    assert forked(main, ["predict", str(recipe), "--run", "r", "--input", str(photos)]) == 2
    assert "RaggedCrops belongs to no task of experiments/tasks/registry.py" in capfd.readouterr().err
    assert forked(main_with_task, ["bench", str(recipe), "--pairs", "6", "--steps", "1"]) == 2
    assert "there is no baseline for RaggedCrops" in capfd.readouterr().err


def test_every_bundled_datamodule_has_a_task():
    from datamodules import (
        classification,
        colorization,
        detection,
        generation,
        reconstruction,
        segmentation,
        stylization,
        superresolution,
        toys,
        unpaired,
    )

    classes = {
        superresolution.SuperResolution,
        segmentation.Segmentation,
        detection.Detection,
        unpaired.Unpaired,
        generation.Generation,
        reconstruction.Reconstruction,
        stylization.Stylization,
        colorization.Colorization,
        classification.Classification,
        toys.Points,
    }
    assert {task.datamodule for task in registry.TASKS} == classes
