"""Toy games, which have no images."""

from datamodules.toys import Ring
from experiments.tasks.task import Task

TASK = Task(Ring)
