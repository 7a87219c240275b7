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
from callbacks.metrics.feature_extractors import Extractor, Inception, file_hash, find_weights
from datamodules.errors import Refused

Measure = Literal["frechet", "floor", "kernel", "inception-score", "precision-recall", "confidence", "balance"]
Parts = dict[str, Tensor]  # "features" (N, F), perhaps "logits" (N, K)
AT_ONCE = 100  # images looked at together
SUBSET = 1000  # images of each of a kernel distance's subsets


class GenerativeQuality(SampleSetMetric):
    """Compares generated images, rounded to 8 bits, with real ones in the features of a network.

    `frechet`: |mu1 - mu2|**2 + Tr(S1 + S2 - 2 (S1 S2)**(1/2)) of Gaussians fitted to the features (Heusel et al., 2017), logged
    as `fid/inception-tf-10000` where the network is Inception, else as `frechet/<network>-<samples>`; `floor`: the same
    between every second real image and the others. `kernel`: KID, the unbiased squared MMD under (x y / F + 1)**3, mean of
    100 subsets of 1000 (Binkowski et al., 2018). `inception-score`: exp of the mean KL(p(y|x) || p(y)), mean of 10 splits
    (Salimans et al., 2016). `precision-recall`: improved precision and recall with 3 neighbours (Kynkaanniemi et al., 2019),
    to be measured in VGG16. `confidence`: mean probability of the likeliest class. `balance`: exp of the entropy of how
    often each class is the likeliest, so the number of classes if all are equally frequent.
    The first five by torch-fidelity's own functions, and equal to its command on saved files.

    Args:
        measures: which of these.
        extractor: class of the network, see `callbacks.metrics.feature_extractors`.
        weights: its file, as it is or below the data root; by default torch's cache, or its download into that.
        missing: "skip" to go without these figures where there are no weights.
        on_validation: measure at validations too.
    """

    def __init__(
        self,
        measures: Sequence[Measure],
        extractor: str = "callbacks.metrics.feature_extractors.Inception",
        weights: str | None = None,
        missing: Literal["refuse", "skip"] = "refuse",
        on_validation: bool = False,
    ) -> None:
        super().__init__(on_validation)
        self.measures, self.extractor, self.weights, self.missing = measures, extractor, weights, missing
        self.network: Extractor | None = None
        self.identity = ""

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
            raise Refused(f"extractor: no class {self.extractor}") from None
        try:
            path = find_weights(kind, self.weights)
        except Refused as error:
            if self.missing == "refuse":
                raise
            if trainer.is_global_zero:
                print(f"without   {', '.join(self.measures)}: {error}", flush=True)
            return
        try:
            self.network = kind(path)
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise Refused(f"{path} does not hold the weights of {kind.name}: {str(error).splitlines()[0]}") from None
        writable_cache()
        self.identity = f"{self.extractor} {file_hash(path)} {version('torch-fidelity')}"

    def update(self, images: Tensor) -> Tensor:
        """What the network makes of them, side by side: (N, F + K)."""
        if self.network is None:
            return torch.empty(len(images), 0)
        parts = look(self.network, to_uint8(images))
        return torch.cat([parts[name] for name in sorted(parts)], dim=1)

    def compute(self, samples: Tensor, real: Tensor, trainer: Any) -> dict[str, float]:
        """See the class."""
        if self.network is None:
            return {}
        real_parts = self.look_at_real(real, trainer)
        widths = [part.shape[1] for part in real_parts.values()]
        parts = dict(zip(real_parts, samples.split(widths, dim=1), strict=True))
        protocol = f"{self.network.name}-{len(samples)}"
        figures: dict[str, float] = {}
        for measure in self.measures:
            for name, value in measured(measure, parts, real_parts).items():
                name = "fid" if name == "frechet" and isinstance(self.network, Inception) else name
                figures[f"{name}/{protocol}"] = value
        return figures

    def look_at_real(self, real: Tensor, trainer: Any) -> Parts:
        """What the network makes of the real images, from the cache if it has looked at them before."""
        assert self.network is not None
        content = hashlib.sha256(f"{self.identity} {tuple(real.shape)}".encode() + real.numpy().tobytes()).hexdigest()
        path = cache() / f"{self.network.name}-{content[:32]}.safetensors"
        if not everywhere(path.exists(), trainer.world_size):
            numbers = torch.arange(trainer.global_rank, -(-len(real) // AT_ONCE), trainer.world_size)
            shares: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for number in numbers.tolist():
                items = torch.arange(number * AT_ONCE, min(len(real), (number + 1) * AT_ONCE))
                for name, part in look(self.network, real[items].to(trainer.strategy.root_device)).items():
                    shares.setdefault(name, []).append((items, part))
            found = in_order_by_name(shares, trainer.world_size)
            if trainer.is_global_zero:
                write_whole(found, path)
        else:
            found = load_file(path)
        return {name: found[name] for name in sorted(found)}


def in_order_by_name(shares: dict[str, list[tuple[Tensor, Tensor]]], world_size: int) -> Parts:
    """Parts of all processes, see `gather_sorted`; a process may have none, and not know their names."""
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, shares)
        shares = {name: [part for share in gathered for part in share.get(name, [])] for name in gathered[0]}
    return {name: gather_sorted(share, world_size=1).contiguous() for name, share in shares.items()}


def everywhere(here: bool, world_size: int) -> bool:
    """Whether something holds in all processes, so that all do the same."""
    if world_size == 1:
        return here
    answers: list[Any] = [None] * world_size
    dist.all_gather_object(answers, here)
    return all(answers)


def look(network: Extractor, images: Tensor) -> Parts:
    """What a network makes of uint8 images, in full precision, on the CPU."""
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        return {name: part.float().cpu() for name, part in network(images).items()}


def measured(measure: str, samples: Parts, real: Parts) -> dict[str, float]:
    """One of the measures of `GenerativeQuality`, by its name; a few have two figures.

    Raises:
        Refused: the network has no logits, or there are too few images.
    """
    if measure in ("inception-score", "confidence", "balance") and "logits" not in samples:
        raise Refused(f"measures: {measure} needs a classifier's logits")
    if measure == "frechet":
        return {"frechet": frechet(samples["features"], real["features"])}
    if measure == "floor":
        return {"floor": frechet(real["features"][::2], real["features"][1::2])}
    if measure == "kernel":
        if min(len(samples["features"]), len(real["features"])) < SUBSET:
            raise Refused(f"measures: kernel needs at least {SUBSET} samples and real images (data.test_samples)")
        found = kid_features_to_metric(samples["features"], real["features"], kid_subset_size=SUBSET, verbose=False)
        return {"kernel": found["kernel_inception_distance_mean"]}
    if measure == "inception-score":
        found = isc_features_to_metric(samples["logits"])
        return {"inception-score": found["inception_score_mean"], "inception-score-std": found["inception_score_std"]}
    if measure == "precision-recall":
        found = prc_features_to_metric(samples["features"], real["features"], verbose=False)
        return {"precision": found["precision"], "recall": found["recall"]}
    probabilities = samples["logits"].double().softmax(dim=1)
    if measure == "confidence":
        return {"confidence": probabilities.amax(1).mean().item()}
    share = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).double() / len(probabilities)
    return {"balance": torch.special.entr(share).sum().exp().item()}


def frechet(samples: Tensor, real: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (N, F)."""
    statistics = (fid_features_to_statistics(samples), fid_features_to_statistics(real))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def cache() -> Path:
    """Where features of real images are kept: the environment variable DARKROOM_CACHE, else the user's cache folder."""
    import pooch

    return Path(os.environ.get("DARKROOM_CACHE") or pooch.os_cache("darkroom"))


def writable_cache() -> None:
    """Refuse a cache that cannot be written, before anything is put into it."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache()).close()
    except OSError as error:
        raise Refused(f"cannot write to {cache()}: {error.strerror} (DARKROOM_CACHE names another folder)") from None


def write_whole(tensors: Parts, path: Path) -> None:
    """Write tensors so that `path` is at every moment absent or whole; two runs may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        save_file(tensors, file.name)
    Path(file.name).replace(path)
