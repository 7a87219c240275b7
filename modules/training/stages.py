"""Stages of training: each can have its own batch size, image size and fresh optimizer states.

The images seen determine the stage.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from datamodules.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        start: images seen at its start, rounded up to a whole step.
        batch_size: global batch size; None for that of the datamodule.
        reset_optimizers: whether to clear the optimizer states at its start.
        image_size: side of the training images in pixels; None for that of the datamodule.
    """

    start: int = 0
    batch_size: int | None = None
    reset_optimizers: bool = False
    image_size: int | None = None


class StagePlan:
    """All stages of training, with their batch sizes; the images seen determine the stage and the number of steps.

    Args:
        stages: stages in order; the first starts at 0.
        batch_size: global batch size of stages without their own.

    Raises:
        UserError: the first stage does not start at 0, the starts do not increase, or a batch size is less than 1.
    """

    def __init__(self, stages: Sequence[Stage], batch_size: int) -> None:
        if not stages or stages[0].start or any(left.start >= right.start for left, right in pairwise(stages)):
            raise UserError(f"stages: invalid starts {[stage.start for stage in stages]}. Use 0 first, then increasing values")
        self.stages = list(stages)
        self.batch_sizes = [batch_size if stage.batch_size is None else stage.batch_size for stage in stages]
        if min(self.batch_sizes) < 1:
            raise UserError(f"stages: the batch sizes {self.batch_sizes} are too small. Use at least 1")
        self.starts, self.steps_before = [0], [0]  # images and steps before the first step of each stage
        for size, stage in zip(self.batch_sizes, self.stages[1:], strict=False):
            steps = max(0, -(-(stage.start - self.starts[-1]) // size))
            self.starts.append(self.starts[-1] + steps * size)
            self.steps_before.append(self.steps_before[-1] + steps)

    def index(self, images_seen: int) -> int:
        """Return the index of the stage of the step after `images_seen` images."""
        return bisect_right(self.starts, images_seen) - 1

    def batch_size(self, images_seen: int) -> int:
        """Return the global batch size of the step after `images_seen` images."""
        return self.batch_sizes[self.index(images_seen)]

    def image_size(self, images_seen: int) -> int | None:
        """Return the side of the images of the step after `images_seen` images; None for that of the datamodule."""
        return self.stages[self.index(images_seen)].image_size

    def steps(self, images_seen: int) -> int:
        """Return the number of completed steps after `images_seen` images."""
        index = self.index(images_seen)
        return self.steps_before[index] + (images_seen - self.starts[index]) // self.batch_sizes[index]
