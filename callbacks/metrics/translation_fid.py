"""FID between translated images and real images of the target domain."""

from typing import Any, Literal

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric, to_uint8
from callbacks.metrics.fid_kid_is import FeatureMetrics, extract, frechet_distance


class TranslationFID(ImageMetric):
    """FID of each direction, logged as `fid/<network>-<direction>-<images>`.

    Compares all test images of one domain, translated and rounded to 8 bits, with all of the other domain at the same size, in
    the features of Inception or another network, by torch-fidelity's functions. The name includes the number of translated
    images: with a hundred, the distance is strongly biased upwards; distances of different numbers are not comparable.

    Expects the outputs {"image", "prediction": (N, 3, H, W), "direction": N strings}.

    Args:
        extractor, weights, on_missing_weights: see `FeatureMetrics`.
        on_validation: evaluate at validations too.
    """

    required_outputs = ("image", "prediction", "direction")

    def __init__(
        self,
        extractor: str = "modules.networks.feature_extractors.Inception",
        weights: str | None = None,
        on_missing_weights: Literal["refuse", "skip"] = "refuse",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.features = FeatureMetrics(["fid"], extractor, weights, on_missing_weights, on_validation)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the weights of the network before the first step."""
        self.features.setup(trainer, pl_module, stage)
        self.evaluator_hash = self.features.evaluator_hash

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, Tensor]:
        """Return the features of the image and of its translation, by their domains."""
        source, translated = ("A", "to B") if outputs["direction"][i] == "AtoB" else ("B", "to A")
        if self.features.network is None:
            return {}
        pair = to_uint8(torch.stack([outputs["image"][i], outputs["prediction"][i]]).detach().float())
        image_features, translation_features = extract(self.features.network, pair)["features"]
        return {source: image_features, translated: translation_features}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics described at the class."""
        results: dict[str, float] = {}
        network = self.features.network
        for domain, direction in (("B", "AtoB"), ("A", "BtoA")):
            real, translated = (
                [features[name] for features in states if name in features] for name in (domain, f"to {domain}")
            )
            if network is not None and real and translated:
                results[f"fid/{network.name}-{direction}-{len(translated)}"] = frechet_distance(
                    torch.stack(translated), torch.stack(real)
                )
        return results
