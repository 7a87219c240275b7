"""FID between translated images and real images of the target domain."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric, Results, to_uint8
from callbacks.metrics.feature_sums import FeatureSums, frechet_distance_of_statistics
from callbacks.metrics.fid_kid_is import FeatureMetrics, extract


class TranslationFID(ImageMetric):
    """FID of each direction, logged as `fid/<network>-<direction>-<images>`.

    All evaluated images of one domain are translated, rounded to 8 bits, and compared with all images of the other domain, at
    the same size. The features are those of Inception or another network. The distance equals torch-fidelity's up to rounding,
    see `FeatureSums`. The name includes the number of translated images, because distances for different numbers are not
    comparable. With a hundred images, the distance is strongly biased upwards.

    Required outputs: {"image", "prediction": (N, 3, H, W), "direction": N strings}.

    Args:
        extractor, weights, on_missing_weights: see `FeatureMetrics`.
        on_validation: evaluate at validations too.
    """

    required_outputs = ("image", "prediction", "direction")

    def __init__(
        self,
        extractor: str = "modules.networks.feature_extractors.Inception",
        weights: str | None = None,
        on_missing_weights: Literal["error", "skip"] = "error",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.features = FeatureMetrics(["fid"], extractor, weights, on_missing_weights, on_validation)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the weights of the network before the first step.

        Raises:
            UserError: see `FeatureMetrics.setup`.
        """
        self.features.setup(trainer, pl_module, stage)
        self.evaluator_hash = self.features.evaluator_hash

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, Tensor]:
        """Return the features (F,) of the image and of its translation, by domain: "A" and "to B", or "B" and "to A"."""
        source, translated = ("A", "to B") if outputs["direction"][i] == "AtoB" else ("B", "to A")
        if self.features.network is None:
            return {}
        pair = to_uint8(torch.stack([outputs["image"][i], outputs["prediction"][i]]).detach().float())
        image_features, translation_features = extract(self.features.network, pair)["features"]
        return {source: image_features, translated: translation_features}

    def store(self, dataset: str, image: str, state: dict[str, Tensor]) -> None:
        """Add the features of an image to the sums of their domains."""
        domains = self.state.setdefault(dataset, {})
        for domain, features in state.items():
            domains.setdefault(domain, FeatureSums()).store([image], features[None])

    def merge(self, states: Sequence[dict[str, dict[str, FeatureSums]]]) -> dict[str, dict[str, FeatureSums]]:
        """Return the sums of all ranks by dataset and domain."""
        merged: dict[str, dict[str, FeatureSums]] = {}
        for dataset in sorted({dataset for state in states for dataset in state}):
            parts = [state.get(dataset, {}) for state in states]
            merged[dataset] = {
                domain: FeatureSums.merge([part[domain] for part in parts if domain in part])
                for domain in sorted({domain for part in parts for domain in part})
            }
        return merged

    def compute_images(self, states: dict[str, FeatureSums], trainer: Any) -> dict[str, dict[str, float]]:
        """Return the metrics in the docstring of the class, from the sums by domain."""
        results: dict[str, float] = {}
        network = self.features.network
        for domain, direction in (("B", "AtoB"), ("A", "BtoA")):
            real, translated = states.get(domain), states.get(f"to {domain}")
            if network is not None and real and translated:
                fid = frechet_distance_of_statistics(translated.statistics(), real.statistics())
                results[f"fid/{network.name}-{direction}-{len(translated.seen)}"] = fid
        return {"all": results}

    def _compute_all(self, merged: dict[str, dict[str, FeatureSums]], trainer: Any) -> tuple[Results, Results]:
        """Return `results`, and no values of single images: the states are not those of images."""
        return super()._compute_all(merged, trainer)[0], {}
