"""Toy games, which have no images."""

from datamodules.toys import Points
from experiments.tasks.task import Task

TASK = Task(Points)
