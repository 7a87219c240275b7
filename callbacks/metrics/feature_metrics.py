"""FID, KID, Inception Score, precision and recall, and what a classifier makes of generated images."""

import hashlib
import importlib
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from callbacks.metrics.base import SampleSetMetric, gather_sorted, to_uint8
from callbacks.metrics.feature_extractors import Extractor, file_hash, find_weights
from datamodules.errors import UserError

MetricName = Literal["fid", "fid-split-half", "kid", "inception-score", "precision-recall", "confidence", "effective-classes"]
Features = dict[str, Tensor]  # "features" (N, F), perhaps "logits" (N, K)
BATCH_SIZE = 100  # images looked at together
KID_SUBSET_SIZE = 1000  # images of each of a kernel distance's subsets


class FeatureMetrics(SampleSetMetric):
    """Compares generated images, rounded to 8 bits, with real ones in the features of a network.

    Logged as `<metric>/<network>-<samples>`, for example `fid/inception-tf-10000`:

    - `fid`: |mu1 - mu2|**2 + Tr(S1 + S2 - 2 (S1 S2)**(1/2)) of Gaussians fitted to the features (Heusel et al., 2017). Only
      with Inception is it the FID of the papers.
    - `fid-split-half`: the same between every second real image and the others.
    - `kid`: the unbiased squared MMD under (x y / F + 1)**3, mean of 100 subsets of 1000 (Binkowski et al., 2018).
    - `inception-score`: exp of the mean KL(p(y|x) || p(y)), mean of 10 splits (Salimans et al., 2016).
    - `precision-recall`: improved precision and recall with 3 neighbors, for VGG16 (Kynkaanniemi et al., 2019).
    - `confidence`: mean probability of the likeliest class.
    - `effective-classes`: exp of the entropy of the frequencies of the likeliest class.

    The first five by torch-fidelity's own functions, and equal to its command on saved files.

    Args:
        metrics: which of these.
        extractor: class of the network, see `callbacks.metrics.feature_extractors`.
        weights: its file, as it is or below the data root; by default torch's cache, or its download into that.
        on_missing_weights: "skip" to go without these figures where there are no weights.
        on_validation: measure at validations too.
    """

    def __init__(
        self,
        metrics: Sequence[MetricName],
        extractor: str = "callbacks.metrics.feature_extractors.Inception",
        weights: str | None = None,
        on_missing_weights: Literal["refuse", "skip"] = "refuse",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.metrics, self.extractor, self.weights, self.on_missing_weights = metrics, extractor, weights, on_missing_weights
        self.network: Extractor | None = None
        self.extractor_id = ""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the network's weights before anything else is done.

        Raises:
            Refused: there are none.
        """
        nothing_to_measure = stage == "fit" and not self.on_validation and not trainer.datamodule.test
        if self.network is not None or nothing_to_measure:
            return
        module, _, name = self.extractor.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            raise UserError(f"extractor: no class {self.extractor}") from None
        try:
            path = find_weights(kind, self.weights)
        except UserError as error:
            if self.on_missing_weights == "refuse":
                raise
            if trainer.is_global_zero:
                print(f"without   {', '.join(self.metrics)}: {error}", flush=True)
            return
        try:
            self.network = kind(path)
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} does not hold the weights of {kind.name}: {str(error).splitlines()[0]}") from None
        require_writable_cache()
        self.extractor_id = f"{self.extractor} {file_hash(path)} {version('torch-fidelity')}"

    def update(self, images: Tensor) -> Tensor:
        """What the network makes of them, side by side: (N, F + K)."""
        if self.network is None:
            return torch.empty(len(images), 0)
        parts = extract(self.network, to_uint8(images))
        return torch.cat([parts[name] for name in sorted(parts)], dim=1)

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """See the class."""
        if self.network is None:
            return {}
        real_parts = self.real_features(real, trainer)
        widths = [part.shape[1] for part in real_parts.values()]
        parts = dict(zip(real_parts, samples.split(widths, dim=1), strict=True))
        protocol = f"{self.network.name}-{len(samples)}"
        results: dict[str, float] = {}
        for metric in self.metrics:
            for name, value in compute_metric(metric, parts, real_parts).items():
                results[f"{name}/{protocol}"] = value
        return results

    def real_features(self, real: Tensor, trainer: Any) -> Features:
        """What the network makes of the real images, from the cache if it has looked at them before."""
        assert self.network is not None
        content = hashlib.sha256(f"{self.extractor_id} {tuple(real.shape)}".encode() + real.numpy().tobytes()).hexdigest()
        path = cache_dir() / f"{self.network.name}-{content[:32]}.safetensors"
        if not all_ranks(path.exists(), trainer.world_size):
            numbers = torch.arange(trainer.global_rank, -(-len(real) // BATCH_SIZE), trainer.world_size)
            parts_by_name: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for number in numbers.tolist():
                items = torch.arange(number * BATCH_SIZE, min(len(real), (number + 1) * BATCH_SIZE))
                for name, part in extract(self.network, real[items].to(trainer.strategy.root_device)).items():
                    parts_by_name.setdefault(name, []).append((items, part))
            found = gather_named(parts_by_name, trainer.world_size)
            if trainer.is_global_zero:
                save_atomic(found, path)
        else:
            found = load_file(path)
        return {name: found[name] for name in sorted(found)}


def gather_named(parts_by_name: dict[str, list[tuple[Tensor, Tensor]]], world_size: int) -> Features:
    """Parts of all processes, see `gather_sorted`; a process may have none, and not know their names."""
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, parts_by_name)
        parts_by_name = {name: [part for share in gathered for part in share.get(name, [])] for name in gathered[0]}
    return {name: gather_sorted(share, world_size=1).contiguous() for name, share in parts_by_name.items()}


def all_ranks(here: bool, world_size: int) -> bool:
    """Whether something holds in all processes, so that all do the same."""
    if world_size == 1:
        return here
    answers: list[Any] = [None] * world_size
    dist.all_gather_object(answers, here)
    return all(answers)


def extract(network: Extractor, images: Tensor) -> Features:
    """What a network makes of uint8 images, in full precision, on the CPU."""
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return {name: part.float().cpu() for name, part in network(images).items()}


def compute_metric(metric: str, samples: Features, real: Features) -> dict[str, float]:
    """One of the measures of `FeatureMetrics`, by its name; a few have two figures.

    Raises:
        Refused: the network has no logits, or there are too few images.
    """
    if metric in ("inception-score", "confidence", "effective-classes") and "logits" not in samples:
        raise UserError(f"metrics: {metric} needs a classifier's logits")
    if metric == "fid":
        return {"fid": frechet_distance(samples["features"], real["features"])}
    if metric == "fid-split-half":
        return {"fid-split-half": frechet_distance(real["features"][::2], real["features"][1::2])}
    if metric == "kid":
        if min(len(samples["features"]), len(real["features"])) < KID_SUBSET_SIZE:
            raise UserError(f"metrics: kid needs at least {KID_SUBSET_SIZE} samples and real images (data.test_samples)")
        found = kid_features_to_metric(samples["features"], real["features"], kid_subset_size=KID_SUBSET_SIZE, verbose=False)
        return {"kid": found["kernel_inception_distance_mean"]}
    if metric == "inception-score":
        found = isc_features_to_metric(samples["logits"])
        return {"inception-score": found["inception_score_mean"], "inception-score-std": found["inception_score_std"]}
    if metric == "precision-recall":
        found = prc_features_to_metric(samples["features"], real["features"], verbose=False)
        return {"precision": found["precision"], "recall": found["recall"]}
    probabilities = samples["logits"].double().softmax(dim=1)
    if metric == "confidence":
        return {"confidence": probabilities.amax(1).mean().item()}
    share = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).double() / len(probabilities)
    return {"effective-classes": torch.special.entr(share).sum().exp().item()}


def frechet_distance(samples: Tensor, real: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (N, F)."""
    statistics = (fid_features_to_statistics(samples), fid_features_to_statistics(real))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def cache_dir() -> Path:
    """Where features of real images are kept: the environment variable DARKROOM_CACHE, else the user's cache folder."""
    import pooch

    return Path(os.environ.get("DARKROOM_CACHE") or pooch.os_cache("darkroom"))


def require_writable_cache() -> None:
    """Refuse a cache that cannot be written, before anything is put into it."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir()).close()
    except OSError as error:
        raise UserError(f"cannot write to {cache_dir()}: {error.strerror} (DARKROOM_CACHE names another folder)") from None


def save_atomic(tensors: Features, path: Path) -> None:
    """Write tensors so that `path` is at every moment absent or whole; two runs may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        save_file(tensors, file.name)
    Path(file.name).replace(path)
