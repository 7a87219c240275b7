"""Cycle-consistency and identity errors of image translation."""

from typing import Any

import torch

from callbacks.metrics.base import ImageMetric

DIRECTIONS = ("AtoB", "BtoA")


class CycleL1(ImageMetric):
    """Mean absolute difference of values in [0, 1] for each direction, averaged over pixels and then over images.

    - `cycle-l1/<direction>`: between an image and its cycle reconstruction; "AtoB" is A to B to A (CycleGAN, eq. 2, without
      its weight).
    - `identity-l1/<direction>`: between an image of the target domain and its translation by the generator of this direction
      (Section 5.2).
    - `change-l1/<direction>`: between an image and its translation.

    None of them measures whether a translation is realistic: all are 0 for the identity function.

    Required outputs: {"image", "prediction", "reconstruction", "identity": (N, 3, H, W), "direction": N strings}.
    """

    set_protocols = ()
    required_outputs = ("image", "prediction", "reconstruction", "identity", "direction")

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """Return the differences of the image by protocol."""
        image = outputs["image"][i].float()
        direction = outputs["direction"][i]
        opposite = DIRECTIONS[direction == DIRECTIONS[0]]
        return {
            f"change-l1/{direction}": (outputs["prediction"][i].float() - image).abs().mean().item(),
            f"cycle-l1/{direction}": (outputs["reconstruction"][i].float() - image).abs().mean().item(),
            f"identity-l1/{opposite}": (outputs["identity"][i].float() - image).abs().mean().item(),
        }

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the mean of each protocol over the images that have it."""
        names = sorted({name for metrics in states for name in metrics})
        values_by_name = {name: [metrics[name] for metrics in states if name in metrics] for name in names}
        return {name: torch.tensor(values, dtype=torch.float64).mean().item() for name, values in values_by_name.items()}
