"""The run's record: what was run and what came of it, as JSON in the run's folder."""

import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from callbacks.run.checkpoints import inference_state_dict, read_weights, weights_hash
from callbacks.run.record_file import read_record, write_record

SEGMENT_KEYS = ("commit", "code", "versions")  # what makes a resumed run another run than it was


class RunRecord(Callback):
    """Writes the record when training has reached its budget, and adds what is measured afterwards.

    A metric has `results`, {data set: {picture: {protocol: value}}}; those of a test stand in the record.

    Args:
        path: the file.
        metadata: what is known before the run starts.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.seconds = 0.0
        self.previous_segments: list[dict[str, Any]] = []  # by other code than this one

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock; a resumed run goes on with the time it has taken so far."""
        self.started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The time taken so far, in seconds, and the code that it was spent by."""
        segments = [*self.previous_segments, {key: self.metadata[key] for key in SEGMENT_KEYS}]
        return {"seconds": self.seconds + time.monotonic() - self.started, "segments": segments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.seconds = state_dict["seconds"]
        this = {key: self.metadata[key] for key in SEGMENT_KEYS}
        self.previous_segments = [segment for segment in state_dict["segments"] if segment != this]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what the training was."""
        checkpoints = next(c for c in trainer.callbacks if hasattr(c, "best_images"))
        self._write(
            trainer,
            {
                **self.metadata,
                "previous_segments": self.previous_segments,
                "weights": weights_hash(inference_state_dict(pl_module, read_weights(checkpoints.best)))
                if checkpoints.best.exists()
                else None,
                "data": trainer.datamodule.data_report.fingerprints(),
                "skipped": trainer.datamodule.data_report.skipped,
                "hardware": hardware(trainer),
                "images_seen": pl_module.images_seen,
                "best_images": checkpoints.best_images,
                "best": {"metric": checkpoints.monitor, "value": json_number(checkpoints.best_value)},
                "seconds": round(self.seconds + time.monotonic() - self.started, 1),
                "peak_memory_mib": peak_memory_mib(trainer),
                "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            },
        )

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Add what the test measured, picture by picture."""
        metrics: dict[str, Any] = {}
        for callback in trainer.callbacks:
            for dataset, images in getattr(callback, "results", {}).items():
                for protocol in next(iter(images.values())):
                    values = [images[name][protocol] for name in sorted(images)]
                    metrics.setdefault(dataset, {})[protocol] = {
                        "mean": json_number(sum(values) / len(values), 8),
                        "images": {name: json_number(value, 8) for name, value in zip(sorted(images), values, strict=True)},
                    }
        existing = read_record(self.path) if self.path.exists() else {}
        weights = weights_hash(inference_state_dict(pl_module, pl_module.state_dict()))
        if existing.get("weights") != weights or not self._same_training(existing):
            existing = {**self.metadata, "weights": weights, "hardware": hardware(trainer)}
        elif not self._same_code(existing, "metrics"):  # evaluated before by other metrics
            existing = {**existing, **{key: self.metadata[key] for key in ("code", "content", "config")}, "metrics": {}}
        evaluator_weights = {
            type(c).__name__: c.evaluator_hash for c in trainer.callbacks if getattr(c, "evaluator_hash", None)
        }
        if evaluator_weights:  # hashes of the networks that metrics rest on
            existing["evaluator_weights"] = evaluator_weights
        existing["data"] = {**existing.get("data", {}), **trainer.datamodule.data_report.fingerprints()}
        metrics = {**existing.get("metrics", {}), **metrics}  # a set that is not here today may have been evaluated before
        missing_sets = [line.partition(":")[0] for line in trainer.datamodule.missing_sets]
        self._write(trainer, {**existing, "missing_sets": missing_sets, "metrics": metrics})

    def _same_training(self, existing: dict[str, Any]) -> bool:
        """Whether what a record says of its training holds for the recipe as it stands."""
        same_recipe = all(existing.get("content", {}).get(key) == self.metadata["content"][key] for key in ("model", "data"))
        return (
            same_recipe
            and self._same_code(existing, "training")
            and existing["config"]["model"] == self.metadata["config"]["model"]
        )

    def _same_code(self, existing: dict[str, Any], part: str) -> bool:
        """Whether a part of the code is that of a record, or of the last check that certified it."""
        known = (existing.get("code", {}), existing.get("certified", {}).get("code", {}))
        return any(code.get(part) == self.metadata["code"][part] for code in known)

    def _write(self, trainer: Any, record: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_record(record, self.path)


def json_number(value: float, digits: int | None = None) -> float | str:
    """A figure as JSON can hold it, rounded: infinities (a perfect picture's PSNR) and NaN as text, which float() reads."""
    if not math.isfinite(value):
        return str(value)
    return value if digits is None else round(value, digits)


def hardware(trainer: Any) -> dict[str, Any]:
    """What the run ran on."""
    cuda = trainer.strategy.root_device.type == "cuda"
    return {
        "accelerator": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mib(trainer: Any) -> int:
    """The most memory this process has held: on the GPU if it computes there, else resident."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
