"""Registry of the tasks; add a new task to `TASKS`."""

from typing import Any

from datamodules.errors import UserError
from experiments.tasks import (
    classification,
    colorization,
    detection,
    generation,
    reconstruction,
    segmentation,
    stylization,
    superresolution,
    toys,
    translation,
)
from experiments.tasks.task import Task

TASKS: list[Task] = [
    superresolution.TASK,
    segmentation.TASK,
    detection.TASK,
    translation.TASK,
    generation.TASK,
    reconstruction.TASK,
    stylization.TASK,
    colorization.TASK,
    classification.TASK,
    toys.TASK,
]


def task_of(datamodule: Any) -> Task:
    """Return the task of a datamodule, or of the nearest class that it inherits from.

    Raises:
        UserError: the class belongs to no task.
    """
    tasks = {task.datamodule: task for task in TASKS}
    for base in type(datamodule).__mro__:
        if base in tasks:
            return tasks[base]
    raise UserError(f"{type(datamodule).__name__} belongs to no task of experiments/tasks/registry.py. Add its task to TASKS")
