"""Linear classification of a discriminator's features."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from callbacks.metrics.base import Metric
from callbacks.metrics.ranks import gather, on_rank_zero
from datamodules.errors import UserError
from datamodules.io.image_set import ImageSet, folder_class_names, load_image_set
from datamodules.random.noise import derive_seed
from modules.losses.precision import full_precision
from modules.networks.batch_norm import reset_bn_stats

SVM_COSTS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # C of the SVM, the authors' grid
BATCH_SIZE = 100  # images per forward pass
N_BN_IMAGES = 10_000  # images for the statistics of batch normalization
FeatureFn = Callable[[Tensor], Tensor]
ImagesAndLabels = tuple[np.ndarray, np.ndarray]
Scores = dict[tuple[int, float], tuple[float, float]]  # accuracies on held-out and test items by subset and cost


class LinearProbe(Metric):
    """L2-SVM on features of the discriminator: each layer max-pooled to 4 x 4, flattened, concatenated (DCGAN, Section 5).

    The SVM is trained on `repeats` random balanced subsets, or once on all images. C is the value of seven with the lowest
    error on the held-out images. The metric is evaluated only at tests, in percent, and logged for the set `test`:

    - `svm-error/<labels>-labels` (as in Table 2) or `svm-accuracy/<labels>-labels` (as in Table 1): mean over the subsets.
    - `svm-error-pixels/<labels>-labels` or `svm-accuracy-pixels/<labels>-labels`: the same for raw pixels.
    - `.../std`: standard deviation over the subsets.

    After training, the running statistics of batch normalization include fakes; they are recomputed from images of `train`.
    In contrast to this metric, the authors choose one C for all subsets, and test on a hundred other subsets.

    Args:
        train: labeled images to train on, such as "svhn/train".
        val: labeled images to choose C on.
        test: labeled images to evaluate on.
        per_class: labeled images per class: 100 in Table 2, 400 in Table 1; None for all images, also in Table 1.
        repeats: number of random subsets; unused if `per_class` is None.
        metric: metric to log.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str,
        per_class: PositiveInt | None = 100,
        repeats: PositiveInt = 10,
        metric: Literal["error", "accuracy"] = "error",
    ) -> None:
        super().__init__(on_validation=False)
        self.datasets = (train, val, test)
        self.per_class, self.repeats, self.metric = per_class, repeats, metric

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require a convolutional discriminator.

        Raises:
            UserError: the discriminator is not a sequence of layers with convolutions.
        """
        layers = getattr(pl_module, "discriminator", None)
        if not isinstance(layers, nn.Sequential) or not any(isinstance(layer, nn.Conv2d) for layer in layers):
            raise UserError(f"LinearProbe: {type(pl_module).__name__} has no convolutional discriminator. Remove this metric")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate, with the same result on every rank; each fits a part of the SVMs."""
        with full_precision():
            metrics = self.compute(trainer, pl_module)
        name = self.datasets[2].replace("/", "-")
        self.results = {name: {"all": metrics}}
        pl_module.log_dict({f"{name}/{protocol}": value for protocol, value in metrics.items()}, sync_dist=False)

    def compute(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Return the metrics by protocol."""
        data = trainer.datamodule
        names = folder_class_names(self.datasets[0])
        train, val, test = (
            load_image_set(spec, data.size, data.channels, data.crop_region, data.data_report, class_names=names)
            for spec in self.datasets
        )
        discriminator = with_recomputed_bn_stats(pl_module.discriminator, train.pixels[:N_BN_IMAGES], pl_module.device)
        labels = train.labels.numpy()
        if self.per_class is None:
            subsets = [np.arange(len(labels))]
        else:
            subsets = [balanced_subset(labels, self.per_class, repeat) for repeat in range(self.repeats)]
        feature_fns: dict[str, FeatureFn] = {
            f"svm-{self.metric}": partial(features, discriminator),
            f"svm-{self.metric}-pixels": pixel_features,
        }
        fits = [(i, cost) for i in range(len(subsets)) for cost in SVM_COSTS]
        own = fits[trainer.global_rank :: trainer.world_size]
        metrics: dict[str, float] = {}
        for name, feature_fn in feature_fns.items():
            sets = [extract_features(feature_fn, images, pl_module.device) for images in (val, test)]
            scores: Scores = {}
            for i in sorted({i for i, _ in own}):
                subset = extract_features(
                    feature_fn, ImageSet(train.pixels[subsets[i]], train.labels[subsets[i]]), pl_module.device
                )
                scores |= {(i, cost): svm_accuracies([subset, *sets], cost) for j, cost in own if i == j}
            gathered = gather(scores, trainer.world_size)
            best = on_rank_zero(partial(best_accuracies, gathered, len(subsets)), trainer.world_size)
            values = [100 * (accuracy if self.metric == "accuracy" else 1 - accuracy) for accuracy in best]
            protocol = f"{name}/{len(subsets[0])}-labels"
            metrics |= {protocol: float(np.mean(values)), f"{protocol}/std": float(np.std(values))}
        return metrics


def svm_accuracies(sets: Sequence[ImagesAndLabels], cost: float) -> tuple[float, float]:
    """Return the accuracies of an SVM on the held-out items and on the test items, in [0, 1].

    Args:
        sets: training, validation and test set, each inputs (N, F) and labels (N,).
        cost: C of the SVM.
    """
    from sklearn.svm import LinearSVC

    train, val, test = sets
    svm = LinearSVC(C=cost, dual="auto", random_state=0).fit(*train)
    return float(svm.score(*val)), float(svm.score(*test))


def best_accuracies(scores_by_rank: Sequence[Scores], count: int) -> list[float]:
    """Return for each of `count` subsets the test accuracy with the cost of the highest accuracy on the held-out items."""
    scores = {key: values for part in scores_by_rank for key, values in part.items()}
    return [max((scores[i, cost] for cost in SVM_COSTS), key=lambda accuracies: accuracies[0])[1] for i in range(count)]


def balanced_subset(labels: np.ndarray, per_class: int, repeat: int) -> np.ndarray:
    """Return the indices of `per_class` random items of each class, without repetition.

    Raises:
        UserError: a class has fewer items.
    """
    generator = np.random.default_rng(derive_seed(0, f"labels/{repeat}"))
    indices = []
    for label in np.unique(labels):
        label_indices = np.flatnonzero(labels == label)
        if len(label_indices) < per_class:
            raise UserError(f"per_class: {per_class}, but class {label} has only {len(label_indices)} images. Use fewer")
        indices.append(generator.choice(label_indices, per_class, replace=False))
    return np.concatenate(indices)


def features(discriminator: nn.Sequential, images: Tensor) -> Tensor:
    """Return the activations of every layer, max-pooled to 4 x 4: (N, C, H, W) in [0, 1] to (N, 16 * all channels)."""
    maps, values = images * 2 - 1, []
    for layer in discriminator:
        if isinstance(layer, nn.Flatten):
            break
        maps = layer(maps)
        if isinstance(layer, nn.LeakyReLU):
            values.append(F.adaptive_max_pool2d(maps, 4).flatten(1))
    return torch.cat(values, dim=1)


def with_recomputed_bn_stats(discriminator: nn.Sequential, images: Tensor, device: torch.device) -> nn.Sequential:
    """Return a copy whose batch normalization uses the mean statistics over batches of uint8 images."""
    copy = deepcopy(discriminator).train()
    reset_bn_stats(copy)
    with torch.no_grad():
        for part in images.split(BATCH_SIZE):
            copy(part.to(device).float() / 255 * 2 - 1)
    return copy.eval()


def pixel_features(images: Tensor) -> Tensor:
    """Return the pixels of images (N, C, H, W) in [0, 1], scaled to [-1, 1]: (N, C * H * W)."""
    return images.flatten(1) * 2 - 1


def extract_features(feature_fn: FeatureFn, images: ImageSet, device: torch.device) -> ImagesAndLabels:
    """Return features of uint8 images, float32 (N, F), and their labels."""
    with torch.no_grad():
        parts = [feature_fn(part.to(device).float() / 255).float().cpu() for part in images.pixels.split(BATCH_SIZE)]
    return torch.cat(parts).numpy(), images.labels.numpy()
