"""Toy games, without images."""

from datamodules.toys import Ring
from experiments.tasks.task import Task

TASK = Task(Ring)
