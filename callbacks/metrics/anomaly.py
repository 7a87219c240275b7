"""Anomaly detection: is what a network was not trained on given back worse than what it was?"""

from typing import Any

import torch
from torchmetrics.functional.classification import binary_auroc

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError


class ReconstructionAUROC(ImageMetric):
    """Area under the ROC curve of a picture's reconstruction error; anomalies are of the classes that training does not see.

    - `auroc/image-l2`: of whole pictures; the error is the mean squared one over the picture's pixels. 0.5 is chance.

    Expects the outputs {"image", "prediction": (N, C, H, W), "label": (N,)}, on datamodules.reconstruction.Reconstruction.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse data that have no two kinds of pictures to tell apart."""
        if not hasattr(trainer.datamodule, "is_unseen"):
            raise UserError(
                f"ReconstructionAUROC: {type(trainer.datamodule).__name__} does not know which classes training sees; "
                "it is for datamodules.reconstruction.Reconstruction"
            )
        for name, images in trainer.datamodule.reference_sets.items():
            anomalous = trainer.datamodule.is_unseen(images.labels)
            if anomalous.all() or not anomalous.any():
                raise UserError(
                    f"ReconstructionAUROC: {name} needs both, pictures of classes that training sees and others; "
                    f"data.exclude_classes: {list(trainer.datamodule.without)}"
                )

    def update(self, outputs: dict[str, Any], i: int) -> tuple[float, int]:
        """The picture's error, and its class."""
        error = (outputs["prediction"][i].float() - outputs["image"][i]).square().mean()
        return error.item(), int(outputs["label"][i])

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """See the class."""
        errors, labels = (torch.tensor(of) for of in zip(*states, strict=True))
        if not errors.isfinite().all():
            raise UserError("ReconstructionAUROC: the network gives values back that are not finite")
        anomalous = trainer.datamodule.is_unseen(labels)
        return {"auroc/image-l2": binary_auroc(errors / errors.max().clamp(min=1e-12), anomalous.long()).item()}
