"""Style transfer and DeepDream by optimization of the image.

L. A. Gatys, A. S. Ecker, M. Bethge. Image Style Transfer Using Convolutional Neural Networks. CVPR 2016. arXiv:1508.06576.
A. Mordvintsev, C. Olah, M. Tyka. Inceptionism: Going Deeper into Neural Networks. Google Research blog, 2015.

Differences from Gatys et al., with reasons:

1. The losses are those of Johnson et al. (arXiv:1603.08155, Section 3.2), including total variation, so that the objective can
   be compared with that of a trained network.
2. Pixels are kept in [0, 1] by clipping after each step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.losses.perceptual import PerceptualObjective
from modules.networks.vgg import FeatureNetworkName

OptimizerName = Literal["lbfgs", "adam"]
# Content and style layers: Gatys et al., Section 2.3, for VGG-19; Johnson et al., Section 3.2, for VGG-16.
LAYERS: dict[FeatureNetworkName, tuple[str, tuple[str, ...]]] = {
    "vgg19": ("relu4_2", ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")),
    "vgg16": ("relu2_2", ("relu1_2", "relu2_2", "relu3_3", "relu4_3")),
    "vgg19-distilled": ("relu3_1", ("relu1_1", "relu2_1", "relu3_1", "relu4_1")),
}


class StyleOptimization:
    """Optimization of the pixels of an image, to match the content of a photograph and the style of a painting.

    Args:
        objective: weighted losses.
        content: photograph, (1, 3, H, W) in [0, 1].
        style: painting, (1, 3, h, w) in [0, 1].
        start: first image, like `content`.
        optimizer: "lbfgs" (Gatys et al.) or "adam".
        learning_rate: step size; 1 is usual for L-BFGS, 0.02 for Adam.

    Attributes:
        image: current image, like `content`.
        steps: number of steps so far.
    """

    def __init__(
        self,
        objective: PerceptualObjective,
        content: Tensor,
        style: Tensor,
        start: Tensor,
        optimizer: OptimizerName,
        learning_rate: float,
    ) -> None:
        self.objective = objective
        self.content, self.grams = objective.content_targets(content), objective.style_targets(style)
        self.image = start.clone().requires_grad_()
        self.steps = 0
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.LBFGS([self.image], lr=learning_rate, max_iter=1, history_size=10, tolerance_change=0, tolerance_grad=0)
            if optimizer == "lbfgs"
            else torch.optim.Adam([self.image], lr=learning_rate)
        )

    def step(self) -> dict[str, float]:
        """Run one step of the optimizer, and return the loss terms before it."""
        terms: dict[str, Tensor] = {}

        def closure() -> float:
            self.optimizer.zero_grad()
            terms.update(self.objective.terms(self.image, self.content, self.grams))
            total = torch.stack(list(terms.values())).sum()
            total.backward()
            return float(total.detach())

        self.optimizer.step(closure)
        with torch.no_grad():
            self.image.clamp_(0, 1)
        self.steps += 1
        return {name: float(value.detach()) for name, value in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the image, the state of the optimizer and the number of steps."""
        return {"image": self.image.detach(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; the optimization continues as if it had not been interrupted."""
        with torch.no_grad():
            self.image.copy_(state["image"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def dream(
    features: Callable[[Tensor, Sequence[str]], dict[str, Tensor]],
    layer: str,
    image: Tensor,
    octaves: int = 4,
    octave_scale: float = 1.4,
    steps: int = 10,
    step_size: float = 0.006,
    jitter: int = 32,
    seed: int = 0,
) -> Iterator[tuple[int, int, float, Tensor]]:
    """Amplify the features of a layer by gradient ascent on half their squared norm, from coarse to fine octaves (DeepDream).

    Args:
        features: function from images (1, 3, H, W) in [0, 1] and layer names to features by layer name.
        layer: layer to amplify.
        image: (1, 3, H, W) in [0, 1].
        octaves: number of resolutions.
        octave_scale: ratio of the sides of two octaves.
        steps: steps per octave.
        step_size: mean absolute change of a pixel in a step.
        jitter: maximum random shift of the image in each step, in pixels, which avoids artifacts of the grid.
        seed: seed of the shifts.

    Yields:
        Index of the octave, number of steps in it, half the mean squared feature, and the image at this octave's size.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [[max(1, round(side / octave_scale**i)) for side in image.shape[-2:]] for i in reversed(range(octaves))]
    detail = torch.zeros_like(resize(image, sides[0]))
    for octave, size in enumerate(sides):
        base = resize(image, size)
        detail = resize(detail, size)
        for step in range(steps):
            shift = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            current = torch.roll((base + detail).clamp(0, 1), shift, (2, 3)).requires_grad_()
            value = features(current, [layer])[layer].float().square().mean() / 2
            (gradient,) = torch.autograd.grad(value, current)
            change = step_size * gradient / gradient.abs().mean().clamp(min=1e-12)
            dreamed = (current.detach() + change).clamp(0, 1)
            detail = torch.roll(dreamed, [-s for s in shift], (2, 3)) - base
            yield octave, step + 1, float(value.detach()), (base + detail).detach()


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image (N, C, H, W) by antialiased bilinear interpolation."""
    return F.interpolate(image, list(size), mode="bilinear", antialias=True)
