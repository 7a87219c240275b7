"""Style transfer and DeepDream by optimization of the image.

L. A. Gatys, A. S. Ecker, M. Bethge. Image Style Transfer Using Convolutional Neural Networks. CVPR 2016; an earlier version is
A Neural Algorithm of Artistic Style, arXiv:1508.06576.
A. Mordvintsev, C. Olah, M. Tyka. Inceptionism: Going Deeper into Neural Networks. Google Research blog, 2015.

Differences from Gatys et al., with reasons:

1. The losses are those of Johnson et al. (arXiv:1603.08155, Section 3.2), including total variation, so that the objective can
   be compared with that of a trained network.
2. Pixels are kept in [0, 1], as by Johnson et al. (Section 4.1). Without bounds and line search, L-BFGS diverged here.
3. The optimization starts from the photograph, and pooling takes the maximum. White noise and average pooling, as in the paper,
   are options. The weights of the network are not rescaled. The shorter side of the painting gets the size of the longer side
   of the photograph.

Differences of DeepDream from the published notebook, with reasons:

1. The network is a VGG, which the other methods use too, and the layer is one of `DREAM_LAYERS`. The notebook has GoogLeNet.
2. Each octave is resized from the photograph with antialiasing. The notebook zooms repeatedly without.
3. A guide image is not supported.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, OptimizeResult, minimize
from torch import Tensor

from modules.losses.perceptual import PerceptualObjective
from modules.networks.vgg import VGG16_STYLE_LAYERS, FeatureNetworkName

OptimizerName = Literal["lbfgs", "adam"]
# Content and style layers: Gatys et al. for VGG-19; Johnson et al. for VGG-16. The distilled VGG-19 ends at relu4_1.
LAYERS: dict[FeatureNetworkName, tuple[str, tuple[str, ...]]] = {
    "vgg19": ("relu4_2", ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")),
    "vgg16": ("relu2_2", VGG16_STYLE_LAYERS),
    "vgg19-distilled": ("relu3_1", ("relu1_1", "relu2_1", "relu3_1", "relu4_1")),
}
DREAM_LAYERS: dict[FeatureNetworkName, str] = {"vgg19": "relu5_1", "vgg16": "relu4_3", "vgg19-distilled": "relu3_1"}


class StyleOptimization:
    """Optimization of the pixels of an image, to match the content of a photograph and the style of a painting.

    The pixels stay in [0, 1]: L-BFGS-B (SciPy) has bounds, and Adam is followed by clipping.

    Args:
        objective: weighted losses.
        content: photograph, (1, 3, H, W) in [0, 1].
        style: painting, (1, 3, h, w) in [0, 1].
        start: first image, like `content`.
        optimizer: "lbfgs" (Gatys et al.) or "adam", with a learning rate of 0.02.

    Attributes:
        image: current image, like `content`.
        steps: number of steps so far.
    """

    def __init__(
        self, objective: PerceptualObjective, content: Tensor, style: Tensor, start: Tensor, optimizer: OptimizerName
    ) -> None:
        self.objective = objective
        self.content, self.grams = objective.content_targets(content), objective.style_targets(style)
        self.image = start.clone().requires_grad_()
        self.steps = 0
        self.adam = torch.optim.Adam([self.image], lr=0.02) if optimizer == "adam" else None

    def value_and_gradient(self, image: Tensor) -> tuple[float, Tensor]:
        """Compute the objective of an image (1, 3, H, W), and its gradient."""
        image = image.detach().requires_grad_()
        value = torch.stack(list(self.objective.terms(image, self.content, self.grams).values())).sum()
        (gradient,) = torch.autograd.grad(value, image)
        return float(value.detach()), gradient

    def run(self, steps: int, report: Callable[[int, float], None]) -> bool:
        """Run up to `steps` steps of the optimizer.

        L-BFGS starts with an empty history, so that the image is its entire state between two calls.

        Args:
            steps: maximum number of steps.
            report: function that is called after each step with the number of steps so far and the objective; with Adam, the
                objective before the step.

        Returns:
            Whether all steps were run; False if L-BFGS cannot lower the objective further in single precision.
        """
        return self._run_lbfgs(steps, report) if self.adam is None else self._run_adam(steps, report)

    def _run_lbfgs(self, steps: int, report: Callable[[int, float], None]) -> bool:
        def function(pixels: np.ndarray) -> tuple[float, np.ndarray]:
            image = torch.from_numpy(pixels).to(self.image).view_as(self.image)
            value, gradient = self.value_and_gradient(image)
            return value, gradient.flatten().double().cpu().numpy()

        def callback(intermediate_result: OptimizeResult) -> None:
            self.steps += 1
            report(self.steps, intermediate_result.fun)

        start, end = self.image.detach().flatten().double().cpu().numpy(), self.steps + steps
        options = {"maxiter": steps, "maxfun": 100 * steps, "maxcor": 10, "ftol": 0.0, "gtol": 0.0}
        result = minimize(function, start, jac=True, method="L-BFGS-B", bounds=Bounds(0, 1), callback=callback, options=options)
        with torch.no_grad():
            self.image.copy_(torch.from_numpy(result.x).to(self.image).view_as(self.image))
        return self.steps == end

    def _run_adam(self, steps: int, report: Callable[[int, float], None]) -> bool:
        assert self.adam is not None
        for _ in range(steps):
            value, self.image.grad = self.value_and_gradient(self.image)
            self.adam.step()
            with torch.no_grad():
                self.image.clamp_(0, 1)
            self.steps += 1
            report(self.steps, value)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the image, the number of steps, and the state of Adam."""
        adam = {} if self.adam is None else self.adam.state_dict()
        return {"image": self.image.detach(), "steps": self.steps, "adam": adam}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; the optimization continues as if it had not been interrupted.

        Raises:
            KeyError: the state is incomplete, or of another optimizer.
        """
        with torch.no_grad():
            self.image.copy_(state["image"])
        if self.adam is not None:
            self.adam.load_state_dict(state["adam"])
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
            value = features(current, [layer])[layer].square().mean() / 2
            (gradient,) = torch.autograd.grad(value, current)
            change = step_size * gradient / gradient.abs().mean().clamp(min=1e-12)
            dreamed = (current.detach() + change).clamp(0, 1)
            detail = torch.roll(dreamed, [-s for s in shift], (2, 3)) - base
            yield octave, step + 1, float(value.detach()), (base + detail).detach()


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image (N, C, H, W) by antialiased bilinear interpolation."""
    return F.interpolate(image, list(size), mode="bilinear", antialias=True)
