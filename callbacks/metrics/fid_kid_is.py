"""FID, KID, Inception Score, precision and recall, and classifier statistics of generated images."""

import hashlib
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from callbacks.metrics.base import SampleSetMetric, merge_sorted, to_uint8
from callbacks.metrics.feature_sums import FeatureSums, frechet_distance_of_statistics
from callbacks.metrics.ranks import gather, on_rank_zero
from datamodules.errors import UserError
from datamodules.io.image_set import random_order
from datamodules.io.paths import cache_dir, file_hash
from modules.networks.feature_extractors import Extractor
from modules.networks.pretrained import find_or_download

MetricName = Literal["fid", "fid-split-half", "kid", "inception-score", "precision-recall", "confidence", "effective-classes"]
Features = dict[str, Tensor]  # "features" (N, F), and for a classifier "logits" (N, K)
BATCH_SIZE = 100  # images per forward pass
KID_SUBSET_SIZE = 1000  # images in each KID subset
# Samples without which a metric is not defined: two for a covariance, ten splits, three neighbors.
MIN_SAMPLES = {"fid": 2, "kid": KID_SUBSET_SIZE, "inception-score": 10, "precision-recall": 4}


class FeatureMetrics(SampleSetMetric):
    """Metrics that compare generated images, rounded to 8 bits, with real images by the features of a network.

    They are logged as `<metric>/<network>-<samples>`, for example `fid/inception-tf-10000`:

    - `fid`: |mu1 - mu2|**2 + Tr(S1 + S2 - 2 (S1 S2)**(1/2)) of Gaussians fitted to the features (Heusel et al., 2017). It
      equals the FID of papers only with Inception.
    - `fid-split-half`: FID between two random disjoint halves of the real images.
    - `kid`: the unbiased squared MMD under (x y / F + 1)**3, mean of 100 subsets of 1000 (Binkowski et al., 2018).
    - `inception-score`: exp of the mean KL(p(y|x) || p(y)), mean of 10 splits (Salimans et al., 2016), with
      `inception-score-std`.
    - `precision-recall`: improved precision and recall with 3 neighbors, for VGG16 (Kynkaanniemi et al., 2019), logged as
      `precision` and `recall`.
    - `confidence`: mean probability of the most likely class.
    - `effective-classes`: exp of the entropy of the frequencies of the most likely class.

    torch-fidelity computes the first five; they equal the results of its command on saved files. If `fid` is the only metric,
    each rank sends sums of the features to rank 0, see `FeatureSums`, and the result equals torch-fidelity's up to rounding;
    otherwise, it sends the features of its samples.

    Args:
        metrics: names of the metrics.
        extractor: class of the network, see `modules.networks.feature_extractors`.
        weights: weights file, see `find_file`; None for the file in torch's cache, which is downloaded if it is missing.
        on_missing_weights: "skip" to skip these metrics if the weights are missing; "error" to raise an error.
        on_validation: evaluate at validations too.
    """

    def __init__(
        self,
        metrics: Sequence[MetricName],
        extractor: str = "modules.networks.feature_extractors.Inception",
        weights: str | None = None,
        on_missing_weights: Literal["error", "skip"] = "error",
        on_validation: bool = False,
    ) -> None:
        self.is_fid_only = set(metrics) == {"fid"}
        super().__init__(on_validation)
        self.metrics, self.extractor, self.weights, self.on_missing_weights = metrics, extractor, weights, on_missing_weights
        self.network: Extractor | None = None
        self.extractor_id = ""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Load the weights of the network before the first step.

        Raises:
            UserError: the class does not exist, the weights are missing or do not fit it, or the cache is not writable.
        """
        never_evaluated = stage == "fit" and not self.on_validation and not trainer.datamodule.test
        if self.network is not None or never_evaluated:
            return
        count = getattr(getattr(trainer, "datamodule", None), "test_samples", None)
        for metric in self.metrics:
            if count is not None and count < MIN_SAMPLES.get(metric, 1):
                raise UserError(f"data.test_samples: {count} are too few for {metric}. Use at least {MIN_SAMPLES[metric]:,}")
        module, _, name = self.extractor.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            raise UserError(f"extractor: no class {self.extractor} exists. Check its import path") from None
        is_network = isinstance(kind, type) and isinstance(getattr(kind, "name", None), str) and hasattr(kind, "url")
        if not is_network:
            raise UserError(f"extractor: {self.extractor} is not a feature network. Use one of feature_extractors.py")
        try:
            path = find_or_download(kind.name, kind.url, self.weights)  # torch-fidelity would unpickle any object
        except UserError as error:
            if self.on_missing_weights == "error":
                raise UserError(f"{error}, or set --trainer.callbacks.on_missing_weights skip") from None
            if trainer.is_global_zero:
                print(f"skipped   {', '.join(self.metrics)}: {error}", flush=True)
            return
        try:
            self.network = kind(path)
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path} does not contain the weights of {kind.name}: {str(error).splitlines()[0]}. Check `weights`"
            ) from None
        require_writable_cache()
        self.evaluator_hash = file_hash(path)
        self.extractor_id = f"{self.extractor} {self.evaluator_hash} {version('torch-fidelity')}"

    def new_state(self) -> Any:
        """Return an object for the features, or for their sums, without samples."""
        return FeatureSums() if self.is_fid_only else super().new_state()

    def update(self, images: Tensor) -> Tensor:
        """Return features and logits, concatenated: (N, F + K), or only the features (N, F) for the FID."""
        if self.network is None:
            return torch.empty(len(images), 0)
        parts = extract(self.network, to_uint8(images))
        return parts["features"] if self.is_fid_only else torch.cat([parts[name] for name in sorted(parts)], dim=1)

    def compute(self, samples: Tensor | FeatureSums, real: Features, trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        if self.network is None:
            return {}
        if isinstance(samples, FeatureSums):
            statistics = {name: part.numpy() for name, part in real.items()}
            fid = frechet_distance_of_statistics(samples.statistics(), statistics)
            return {f"fid/{self.network.name}-{len(samples.seen)}": fid}
        widths = [part.shape[1] for part in real.values()]
        parts = dict(zip(real, samples.split(widths, dim=1), strict=True))
        protocol = f"{self.network.name}-{len(samples)}"
        results: dict[str, float] = {}
        for metric in self.metrics:
            for name, value in compute_metric(metric, parts, real).items():
                results[f"{name}/{protocol}"] = value
        return results

    def prepare(self, real: Tensor, trainer: Any) -> Features:
        """Return the features of the real images, or for the FID their mean "mu" and covariance "sigma", on rank 0.

        All ranks extract a part of the features, and rank 0 writes the result to the cache, if it is not there.
        """
        if self.network is None:
            return {}
        path = on_rank_zero(lambda: self.features_file(real), trainer.world_size)
        if not on_rank_zero(path.exists, trainer.world_size):
            parts = extract_part(self.network, real, trainer)
            gather_parts = real_statistics if self.is_fid_only else real_features
            if content := gather_parts(parts, trainer.world_size):
                save_features(content, path)
        if not trainer.is_global_zero:
            return {}
        features = load_file(path)
        return {name: features[name] for name in sorted(features)}

    def features_file(self, real: Tensor) -> Path:
        """Return the file in the cache with the features of real images, uint8 (N, C, H, W), or with their statistics."""
        assert self.network is not None
        digest = hashlib.sha256(f"{self.extractor_id} {tuple(real.shape)}".encode() + real.numpy().tobytes()).hexdigest()
        suffix = "-statistics" if self.is_fid_only else ""
        return cache_dir() / f"{self.network.name}-{digest[:32]}{suffix}.safetensors"


def extract_part(network: Extractor, real: Tensor, trainer: Any) -> Iterator[tuple[Tensor, Features]]:
    """Extract this rank's part of the features of the real images: their indices and features, in batches."""
    for start in range(trainer.global_rank * BATCH_SIZE, len(real), trainer.world_size * BATCH_SIZE):
        indices = torch.arange(start, min(len(real), start + BATCH_SIZE))
        yield indices, extract(network, real[indices].to(trainer.strategy.root_device))


def real_features(parts: Iterator[tuple[Tensor, Features]], world_size: int) -> Features:
    """Return the features of all ranks' batches in the order of the images, on rank 0."""
    parts_by_name: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for indices, features in parts:
        for name, part in features.items():
            parts_by_name.setdefault(name, []).append((indices, part))
    gathered = gather(parts_by_name, world_size)
    names = gathered[0] if gathered else {}  # rank 0 always has images
    return {name: merge_sorted([parts.get(name, []) for parts in gathered]).contiguous() for name in names}


def real_statistics(parts: Iterator[tuple[Tensor, Features]], world_size: int) -> Features:
    """Return the mean "mu" and the covariance "sigma" of the features of all ranks' batches, on rank 0."""
    sums = FeatureSums()
    for indices, features in parts:
        sums.store(indices, features["features"])
    gathered = gather(sums, world_size)
    return {name: torch.from_numpy(part) for name, part in FeatureSums.merge(gathered).statistics().items()} if gathered else {}


def extract(network: Extractor, images: Tensor) -> Features:
    """Extract features of uint8 images; the result is on the CPU."""
    with torch.no_grad():
        return {name: part.float().cpu() for name, part in network(images).items()}


def compute_metric(metric: str, samples: Features, real: Features) -> dict[str, float]:
    """Return a metric of `FeatureMetrics` by its name; a few metrics have two values.

    Raises:
        UserError: the network has no logits, or there are too few images.
    """
    if metric in ("inception-score", "confidence", "effective-classes") and "logits" not in samples:
        raise UserError(f"metrics: {metric} needs a classifier's logits. Choose another extractor")
    if metric == "fid":
        return {"fid": frechet_distance(samples["features"], real["features"])}
    if metric == "fid-split-half":
        left, right = real["features"][random_order(len(real["features"]))].tensor_split(2)
        return {"fid-split-half": frechet_distance(left, right)}
    if metric == "kid":
        if min(len(samples["features"]), len(real["features"])) < KID_SUBSET_SIZE:
            raise UserError(f"metrics: kid needs at least {KID_SUBSET_SIZE} samples and real images. Raise data.test_samples")
        result = kid_features_to_metric(samples["features"], real["features"], kid_subset_size=KID_SUBSET_SIZE, verbose=False)
        return {"kid": result["kernel_inception_distance_mean"]}
    if metric == "inception-score":
        result = isc_features_to_metric(samples["logits"])
        return {"inception-score": result["inception_score_mean"], "inception-score-std": result["inception_score_std"]}
    if metric == "precision-recall":
        result = prc_features_to_metric(samples["features"], real["features"], verbose=False)
        return {"precision": result["precision"], "recall": result["recall"]}
    probabilities = samples["logits"].double().softmax(dim=1)
    if metric == "confidence":
        return {"confidence": probabilities.amax(1).mean().item()}
    frequencies = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).double() / len(probabilities)
    return {"effective-classes": torch.special.entr(frequencies).sum().exp().item()}


def frechet_distance(samples: Tensor, real: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features (N, F)."""
    statistics = (fid_features_to_statistics(samples), fid_features_to_statistics(real))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def require_writable_cache() -> None:
    """Check that the cache folder is writable.

    Raises:
        UserError: it is not.
    """
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir()).close()
    except OSError as error:
        raise UserError(f"cannot write to {cache_dir()}: {error.strerror}. Set DARKROOM_CACHE to another folder") from None


def save_features(tensors: Features, path: Path) -> None:
    """Write tensors to a temporary file and move it to `path`; safe if two runs write at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        save_file(tensors, file.name)
    Path(file.name).replace(path)
