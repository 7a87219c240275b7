"""Accuracy of classification."""

from typing import Any

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError
from datamodules.photographs import Photographs


class Accuracy(ImageMetric):
    """Share of images whose class has the highest score, in percent: `top1/<classifier>` for each classifier of the method.

    Required outputs: {"logits": (N, K) by name, "label": (N,)}.

    Args:
        on_validation: evaluate at validations too, otherwise only at tests.
    """

    set_protocols = ()
    required_outputs = ("logits", "label")

    def __init__(self, on_validation: bool = True) -> None:
        super().__init__(on_validation)
        self.class_counts: dict[str, int] = {}  # of the datasets

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Get the numbers of classes of the datasets.

        Raises:
            UserError: the data have no classes.
        """
        if not isinstance(trainer.datamodule, Photographs):
            raise UserError(f"Accuracy: {type(trainer.datamodule).__name__} has no classes. Remove this metric")
        self.class_counts = trainer.datamodule.class_counts

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, bool]:
        """Return whether each classifier is right.

        Raises:
            UserError: the dataset has another number of classes than the classifiers.
        """
        dataset, label = outputs["dataset"][i], int(outputs["label"][i])
        (n_classes,) = {logits.shape[1] for logits in outputs["logits"].values()}
        if self.class_counts[dataset] != n_classes:
            raise UserError(
                f"{dataset}: it has {self.class_counts[dataset]} folders of classes, but the method has {n_classes} classes. "
                "Use a dataset with a folder for each class"
            )
        return {name: int(logits[i].argmax()) == label for name, logits in outputs["logits"].items()}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        return {f"top1/{name}": 100 * sum(state[name] for state in states) / len(states) for name in states[0]}
