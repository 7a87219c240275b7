"""Accuracy of a classifier on the outputs of a method."""

from typing import Any, Literal

from callbacks.metrics.base import ImageMetric, to_uint8
from datamodules.errors import UserError
from datamodules.io.paths import file_hash
from datamodules.photographs import Photographs
from modules.networks.classifiers import Classifier, find_classifier
from modules.networks.pretrained import find_or_download


class ClassifierAccuracy(ImageMetric):
    """Share of images that a classifier classifies correctly, in percent (Zhang et al., arXiv:1603.08511, Section 3.1).

    - `top1/<classifier>`: of the predictions, rounded to 8 bits.
    - `top1-real/<classifier>`: of the photographs.

    Datasets that do not have the number of classes of the classifier are reported and skipped. Required outputs: {"image",
    "prediction": (N, 3, H, W), "label": (N,)}.

    Args:
        classifier: name, see `find_classifier`.
        weights: weights file, see `find_file`; None for the file in torch's cache, which is downloaded if it is missing.
        on_missing_weights: "skip" to skip this metric if the weights are missing; "error" to raise an error.
        on_validation: evaluate at validations too.
    """

    set_protocols = ()
    required_outputs = ("image", "prediction", "label")

    def __init__(
        self,
        classifier: str,
        weights: str | None = None,
        on_missing_weights: Literal["error", "skip"] = "error",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.classifier, self.weights, self.on_missing_weights = classifier, weights, on_missing_weights
        self.network: Classifier | None = None
        self.class_counts: dict[str, int] = {}  # of the datasets

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the weights of the classifier before the first step.

        Raises:
            UserError: there is no such classifier, its weights are missing or belong to another network, or the data have no
                classes.
        """
        never_evaluated = stage == "fit" and not self.on_validation and not trainer.datamodule.test
        if self.network is not None or stage == "predict" or never_evaluated:
            return
        if not isinstance(trainer.datamodule, Photographs):
            raise UserError(f"ClassifierAccuracy: {type(trainer.datamodule).__name__} has no classes. Remove this metric")
        self.class_counts = trainer.datamodule.class_counts
        network = find_classifier(self.classifier)
        try:
            path = find_or_download(self.classifier, network.url, self.weights)
        except UserError as error:
            if self.on_missing_weights == "error":
                raise UserError(f"{error}, or set --trainer.callbacks.on_missing_weights skip") from None
            if trainer.is_global_zero:
                print(f"skipped   top1/{self.classifier}: {error}", flush=True)
            return
        network.load(path, trainer.strategy.root_device)
        self.network, self.evaluator_hash = network, file_hash(path)

    def update(self, outputs: dict[str, Any], i: int) -> list[bool]:
        """Return whether the prediction and the photograph are classified correctly; nothing if this is not possible."""
        if self.network is None or self.class_counts[outputs["dataset"][i]] != self.network.n_classes:
            return []
        images = [to_uint8(outputs[name][i : i + 1].float()) for name in ("prediction", "image")]
        return [int(self.network(image).argmax()) == int(outputs["label"][i]) for image in images]

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        names = (f"top1/{self.classifier}", f"top1-real/{self.classifier}")
        return {name: 100 * sum(hits) / len(states) for name, hits in zip(names, zip(*states, strict=True), strict=False)}

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the datasets that are skipped, and compute the metric of the others."""
        for dataset in sorted(self.state):
            if self.network is not None and self.class_counts[dataset] != self.network.n_classes and trainer.is_global_zero:
                counts = f"{self.class_counts[dataset]} folders of classes, not {self.network.n_classes}"
                print(f"skipped   top1/{self.classifier} on {dataset}: it has {counts}", flush=True)
        self.on_validation_epoch_end(trainer, pl_module)
