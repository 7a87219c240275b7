"""The task-specific parts of the commands, in one object per task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import Dataset

# Arguments: the DarkroomCLI, the image files, the output path of each image file, and the output folder.
PredictFn = Callable[[Any, Sequence[Path], dict[str, Path], Path], tuple[Dataset[Any], BasePredictionWriter]]


@dataclass(frozen=True)
class Task:
    """A task: its datamodule class, and the functions that the commands use for it.

    Args:
        datamodule: class of the task's datamodules.
        baseline: function that creates a dataset from a datamodule. It loads single training items with PIL, as the baseline of
            `darkroom bench`. None if the task has no images.
        bench_inference: function from a trained method and its datamodule to speeds by name, on the device of the method; None
            for no benchmark.
        predict: function that creates the input dataset and the output writer of `darkroom predict`; None if the task has no
            image inputs.
        predict_options: names of the options of `darkroom predict` that the task accepts.
        reads_stacks: whether `darkroom predict` takes files of several pages.
    """

    datamodule: type
    baseline: Callable[[Any], Dataset[Any]] | None = None
    bench_inference: Callable[[Any, Any], dict[str, Any]] | None = None
    predict: PredictFn | None = None
    predict_options: tuple[str, ...] = ()
    reads_stacks: bool = False
