"""Accuracy of classification."""

from typing import Any

from callbacks.metrics.base import ImageMetric


class Accuracy(ImageMetric):
    """Share of images whose class has the highest score, in percent: `top1/<classifier>` for each classifier of the method.

    Required outputs: {"logits": (N, K) by name, "label": (N,)}.

    Args:
        on_validation: evaluate at validations too, otherwise only at tests.
    """

    required_outputs = ("logits", "label")

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, bool]:
        """Return whether each classifier is right."""
        label = int(outputs["label"][i])
        return {name: int(logits[i].argmax()) == label for name, logits in outputs["logits"].items()}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        return {f"top1/{name}": 100 * sum(state[name] for state in states) / len(states) for name in states[0]}
