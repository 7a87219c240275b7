"""Stages of a training: parts with their own batch size or fresh optimizer states, as functions of the images seen."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from datamodules.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        start: images seen from which on it lasts, rounded up to a whole step.
        batch_size: global batch size; None for the datamodule's.
        reset_optimizers: start with fresh optimizer states.
    """

    start: int = 0
    batch_size: int | None = None
    reset_optimizers: bool = False


class StagePlan:
    """The stages of a training, with batch sizes: the step that follows a number of images is a function of that number.

    Args:
        stages: stages in order; the first starts at 0.
        batch_size: global batch size of stages without their own.

    Raises:
        UserError: the stages are not in order, or a batch size is less than 1.
    """

    def __init__(self, stages: Sequence[Stage], batch_size: int) -> None:
        if not stages or stages[0].start or any(left.start >= right.start for left, right in pairwise(stages)):
            raise UserError(f"stages: start at {[stage.start for stage in stages]}; the first must start at 0, then rise")
        self.stages = list(stages)
        self.batch_sizes = [batch_size if stage.batch_size is None else stage.batch_size for stage in stages]
        if min(self.batch_sizes) < 1:
            raise UserError(f"stages: batch sizes {self.batch_sizes} must be at least 1")
        self.starts, self.steps_before = [0], [0]  # images and steps before the first step of each stage
        for size, stage in zip(self.batch_sizes, self.stages[1:], strict=False):
            steps = max(0, -(-(stage.start - self.starts[-1]) // size))
            self.starts.append(self.starts[-1] + steps * size)
            self.steps_before.append(self.steps_before[-1] + steps)

    def index(self, images_seen: int) -> int:
        """Index of the stage of the step after `images_seen` images."""
        return bisect_right(self.starts, images_seen) - 1

    def batch_size(self, images_seen: int) -> int:
        """Global batch size of the step after `images_seen` images."""
        return self.batch_sizes[self.index(images_seen)]

    def steps(self, images_seen: int) -> int:
        """Number of steps that `images_seen` images have taken."""
        index = self.index(images_seen)
        return self.steps_before[index] + (images_seen - self.starts[index]) // self.batch_sizes[index]
