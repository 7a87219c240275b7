"""Anomaly detection: AUROC of unseen classes by reconstruction error."""

from typing import Any

import torch
from torchmetrics.functional.classification import binary_auroc

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.protocols import ReconstructionData
from datamodules.errors import UserError


class ReconstructionAUROC(ImageMetric):
    """Area under the ROC curve of the reconstruction error; images of classes excluded from training are the anomalies.

    - `auroc/image-l2`: the score of an image is its mean squared error over pixels. Random scores have an AUROC of 0.5.

    Required outputs: {"image", "prediction": (N, C, H, W), "label": (N,)}, on datamodules.reconstruction.Reconstruction.
    """

    required_outputs = ("image", "prediction", "label")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require seen and unseen classes in every test set.

        Raises:
            UserError: the datamodule is not `Reconstruction`, or a test set lacks seen or unseen classes.
        """
        if not isinstance(trainer.datamodule, ReconstructionData):
            raise UserError(
                f"ReconstructionAUROC: {type(trainer.datamodule).__name__} has no excluded classes. "
                "Use datamodules.reconstruction.Reconstruction"
            )
        for name, images in trainer.datamodule.reference_sets.items():
            anomalous = trainer.datamodule.is_unseen(images.labels)
            if anomalous.all() or not anomalous.any():
                raise UserError(
                    f"ReconstructionAUROC: {name} needs images of excluded classes and of other classes. "
                    f"Change data.exclude_classes: {list(trainer.datamodule.exclude_classes)}"
                )

    def update(self, outputs: dict[str, Any], i: int) -> tuple[float, int]:
        """Return the reconstruction error and the label of the image."""
        error = (outputs["prediction"][i].float() - outputs["image"][i]).square().mean()
        return error.item(), int(outputs["label"][i])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metric in the docstring of the class.

        Raises:
            UserError: a reconstruction error is not finite.
        """
        errors, labels = (torch.tensor(values) for values in zip(*states, strict=True))
        if not errors.isfinite().all():
            raise UserError("ReconstructionAUROC: the reconstruction errors are not finite")
        anomalous = trainer.datamodule.is_unseen(labels)
        return {"auroc/image-l2": binary_auroc(errors / errors.max().clamp(min=1e-12), anomalous.long()).item()}

    def compute_image(self, state: tuple[float, int], trainer: Any) -> dict[str, float]:
        """Return the mean squared error of the reconstruction, the score of the curve."""
        return {"error/image-l2": state[0]}
