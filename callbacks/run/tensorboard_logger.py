"""TensorBoard logs with all keys of the recipe as hyperparameters."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Logger that records the keys of model and data; Lightning records those of the model alone.

    Args:
        folder: folder of the run.
        config: configuration of the run, by section.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, "tensorboard", "")
        self.config = config

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Record the configuration in place of `params`, which are a part of it."""
        super().log_hyperparams(self.config, metrics, step)
