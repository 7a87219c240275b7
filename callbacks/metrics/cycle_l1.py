"""What comes back from a translation to another domain, and what should stay as it is."""

from typing import Any

import torch

from callbacks.metrics.base import ImageMetric

DIRECTIONS = ("AtoB", "BtoA")


class CycleL1(ImageMetric):
    """Mean absolute differences of values in [0, 1], mean over pixels, then over pictures; direction by direction.

    - `cycle-l1/<direction>`: between a picture and what comes back of it; "AtoB" is A to B to A (CycleGAN, eq. 2, without
      its weight).
    - `identity-l1/<direction>`: between a picture of the domain that this direction leads to, and what this direction's
      generator makes of it (Section 5.2).

    - `change-l1/<direction>`: between a picture and its translation.

    None says whether a translation looks right; a generator that changes nothing has 0 in all.

    Expects the outputs {"image", "prediction", "reconstruction", "same": (N, 3, H, W), "direction": N strings}.
    """

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """The picture's differences, by their protocols."""
        image = outputs["image"][i].float()
        direction = outputs["direction"][i]
        opposite = DIRECTIONS[direction == DIRECTIONS[0]]
        return {
            f"change-l1/{direction}": (outputs["prediction"][i].float() - image).abs().mean().item(),
            f"cycle-l1/{direction}": (outputs["reconstruction"][i].float() - image).abs().mean().item(),
            f"identity-l1/{opposite}": (outputs["same"][i].float() - image).abs().mean().item(),
        }

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Means over the pictures that have a figure."""
        names = sorted({name for figures in states for name in figures})
        found = {name: [figures[name] for figures in states if name in figures] for name in names}
        return {name: torch.tensor(values, dtype=torch.float64).mean().item() for name, values in found.items()}
