"""Losses of stylized photographs."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError


@runtime_checkable
class Stylizer(Protocol):
    """A method that stylizes, see `modules.tasks.stylization.StylizationMethod`."""

    style_names: list[str]

    def compute_target_grams(self) -> None:
        """Load the feature network and the styles."""

    def mixture_of(self, style_ids: Sequence[int]) -> Tensor:
        """Return the mixtures of single styles."""

    def objective(self, image: Tensor, prediction: Tensor, mixture: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss terms."""


class StyleObjective(ImageMetric):
    """The method's objective on validation and test photographs: the mean over images (Johnson et al., Section 3.2 and eq. 5).

    - `objective`: sum of the weighted terms.
    - `objective/content`, `objective/style`, `objective/total_variation`: the terms.

    The values depend on the feature network and on the weights of the terms.

    Required outputs: {"image", "prediction": (N, 3, H, W), "style": N names}.
    """

    set_protocols = ()
    required_outputs = ("image", "prediction", "style")

    def __init__(self, on_validation: bool = True) -> None:
        super().__init__(on_validation)
        self.method: Stylizer | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the feature network of the method, and the styles.

        Raises:
            UserError: the method does not stylize, or the weights or a style are missing.
        """
        never_evaluated = stage == "fit" and not self.on_validation and not trainer.datamodule.test
        if stage == "predict" or never_evaluated:
            return
        if not isinstance(pl_module, Stylizer):
            raise UserError(f"StyleObjective: {type(pl_module).__name__} does not stylize. Remove this metric")
        pl_module.compute_target_grams()
        self.method = pl_module

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, float]:
        """Return the terms of the image."""
        assert self.method is not None
        image, prediction = outputs["image"][i : i + 1], outputs["prediction"][i : i + 1]
        mixture = self.method.mixture_of([self.method.style_names.index(outputs["style"][i])])
        terms = self.method.objective(image.float(), prediction.float(), mixture)
        return {name: value.item() for name, value in terms.items()}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics described at the class."""
        terms = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        return {"objective": sum(terms.values()), **{f"objective/{name}": value for name, value in terms.items()}}
