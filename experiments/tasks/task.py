"""What a task brings to the commands that depend on it, in one object."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import Dataset

# From the command line, the image files, their outputs by path, and the output folder.
PredictFn = Callable[[Any, Sequence[Path], dict[str, Path], Path], tuple[Dataset[Any], BasePredictionWriter]]


@dataclass(frozen=True)
class Task:
    """A task: a datamodule, the methods that train on it, and what the commands do with both.

    Args:
        datamodule: class of its datamodules.
        baseline: class of a dataset that loads training items one by one through PIL, made from a datamodule; `darkroom bench`
            compares with it. None where the task has no images.
        bench_inference: function from a trained method and its datamodule to speeds by name.
        predict: function that makes the inputs of `darkroom predict` and the writer of its outputs; None where the task takes
            no images.
        directions: whether predictions have a direction.
    """

    datamodule: type
    baseline: Callable[[Any], Dataset[Any]] | None = None
    bench_inference: Callable[[Any, Any], dict[str, Any]] | None = None
    predict: PredictFn | None = None
    directions: bool = False
