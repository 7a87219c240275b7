"""How well a linear classifier tells classes apart by a discriminator's features."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from pydantic import PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.io.image_set import ImageSet, load_image_set
from datamodules.random.noise import derive_seed

SVM_COSTS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # C of the SVM, as the authors search it
BATCH_SIZE = 100  # images looked at together
N_BN_IMAGES = 10_000  # images that batch normalisation sees
FeatureFn = Callable[[Tensor], Tensor]
ImagesAndLabels = tuple[np.ndarray, np.ndarray]


class LinearProbe(Callback):
    """DCGAN, Section 5: an L2-SVM on the discriminator's features, max-pooled to 4 x 4 in every layer, flattened, joined.

    Trained on some labelled images of each class, drawn anew `repeats` times, or once on all; C is the one of seven with the
    least error on the held-out images. Logged for the set `test`, in percent: `svm-error/<labels>-labels` (Table 2's figure)
    or `svm-accuracy/<labels>-labels` (Table 1's), with its deviation over the draws under `.../std`, and the same of the
    images themselves, `svm-error-pixels/<labels>-labels`. In tests alone.

    The running statistics of batch normalisation, which in training have seen fakes too, are made anew from images of `train`.
    The authors choose one C for all draws, and test on a hundred others.

    Args:
        train: labelled images to train on, such as "svhn/train".
        val: labelled images to choose C on.
        test: labelled images to measure on.
        per_class: how many labelled images of each class: 100 in Table 2, 400 in Table 1; None for all, as also there.
        repeats: how many draws.
        figure: what is logged.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str,
        per_class: PositiveInt | None = 100,
        repeats: PositiveInt = 10,
        figure: Literal["error", "accuracy"] = "error",
    ) -> None:
        self.datasets = (train, val, test)
        self.per_class, self.repeats, self.figure = per_class, repeats, figure
        self.results: dict[str, dict[str, dict[str, float]]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a discriminator whose features are not maps, before anything is done."""
        layers = getattr(pl_module, "discriminator", None)
        if not isinstance(layers, nn.Sequential) or not any(isinstance(layer, nn.Conv2d) for layer in layers):
            raise UserError(f"LinearProbe: {type(pl_module).__name__} has no convolutional discriminator")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, on every process alike."""
        data = trainer.datamodule
        train, val, test = (
            load_image_set(spec, data.size, data.channels, data.crop, data.data_report) for spec in self.datasets
        )
        discriminator = with_recomputed_bn_stats(pl_module.discriminator, train.pixels[:N_BN_IMAGES], pl_module.device)
        labels = train.labels.numpy()
        if self.per_class is None:
            draws = [np.arange(len(labels))]
        else:
            draws = [balanced_subset(labels, self.per_class, repeat) for repeat in range(self.repeats)]
        feature_fns: dict[str, FeatureFn] = {
            f"svm-{self.figure}": partial(features, discriminator),
            f"svm-{self.figure}-pixels": pixel_features,
        }
        figures: dict[str, float] = {}
        for name, look in feature_fns.items():
            sets = [extract_features(look, images, pl_module.device) for images in (val, test)]
            found = []
            for indices in draws:
                chosen = ImageSet(train.pixels[indices], train.labels[indices])
                accuracy = accuracy_of_best_svm([extract_features(look, chosen, pl_module.device), *sets])
                found.append(100 * (accuracy if self.figure == "accuracy" else 1 - accuracy))
            protocol = f"{name}/{len(draws[0])}-labels"
            figures |= {protocol: float(np.mean(found)), f"{protocol}/std": float(np.std(found))}
        name = self.datasets[2].replace("/", "-")
        self.results = {name: {"all": figures}}
        pl_module.log_dict({f"{name}/{protocol}": value for protocol, value in figures.items()}, sync_dist=False)


def accuracy_of_best_svm(sets: Sequence[ImagesAndLabels]) -> float:
    """The share of test items whose class the SVM knows that is best on the held-out ones.

    Args:
        sets: what to train on, to choose C on, to measure on: inputs (N, F) and labels (N,).
    """
    from sklearn.svm import LinearSVC

    train, val, test = sets
    svms = [LinearSVC(C=cost, dual="auto", random_state=0).fit(*train) for cost in SVM_COSTS]
    best = max(svms, key=lambda svm: svm.score(*val))
    return float(best.score(*test))


def balanced_subset(labels: np.ndarray, per_class: int, repeat: int) -> np.ndarray:
    """As many items of each class, drawn without repetition: their places.

    Raises:
        Refused: some class has too few.
    """
    generator = np.random.default_rng(derive_seed(0, f"labels/{repeat}"))
    indices = []
    for kind in np.unique(labels):
        of_kind = np.flatnonzero(labels == kind)
        if len(of_kind) < per_class:
            raise UserError(f"per_class: {per_class}, but there are only {len(of_kind)} images of class {kind}")
        indices.append(generator.choice(of_kind, per_class, replace=False))
    return np.concatenate(indices)


def features(discriminator: nn.Sequential, images: Tensor) -> Tensor:
    """Every layer's activations, max-pooled to 4 x 4: (N, C, H, W) in [0, 1] to (N, 16 * all channels)."""
    maps, found = images * 2 - 1, []
    for layer in discriminator:
        if isinstance(layer, nn.Flatten):
            break
        maps = layer(maps)
        if isinstance(layer, nn.LeakyReLU):
            found.append(F.adaptive_max_pool2d(maps, 4).flatten(1))
    return torch.cat(found, dim=1)


def with_recomputed_bn_stats(discriminator: nn.Sequential, images: Tensor, device: torch.device) -> nn.Sequential:
    """A copy whose batch normalisation has the mean statistics of batches of these uint8 images."""
    copy = deepcopy(discriminator).train()
    for layer in copy:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
    with torch.no_grad():
        for part in images.split(BATCH_SIZE):
            copy(part.to(device).float() / 255 * 2 - 1)
    return copy.eval()


def pixel_features(images: Tensor) -> Tensor:
    """The images themselves, in [-1, 1]."""
    return images.flatten(1) * 2 - 1


def extract_features(look: FeatureFn, images: ImageSet, device: torch.device) -> ImagesAndLabels:
    """What `look` makes of uint8 images, float32 (N, F), and their labels."""
    with torch.no_grad():
        parts = [look(part.to(device).float() / 255).float().cpu() for part in images.pixels.split(BATCH_SIZE)]
    return torch.cat(parts).numpy(), images.labels.numpy()
