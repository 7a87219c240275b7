"""The run record: configuration and results as JSON in the run's folder."""

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

from callbacks.metrics.base import Metric
from callbacks.run.checkpoints import Checkpoints
from callbacks.run.record_file import read_record, write_record
from modules.networks.weights import inference_state_dict, read_weights, weights_hash

SEGMENT_KEYS = ("commit", "code", "versions")  # a resumed run that differs in these is a new segment


class RunRecord(Callback):
    """Callback that writes the record at the end of training, and adds the metrics of later tests.

    Metrics are callbacks that inherit from `callbacks.metrics.base.Metric`.

    Args:
        path: file of the record.
        metadata: entries that do not depend on the training: code, versions, configuration.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.seconds = 0.0
        self.started = time.monotonic()
        self.previous_segments: list[dict[str, Any]] = []  # trained by other versions of the code
        self.data_hashes: dict[str, str] = {}  # hashes of the training and validation images at the start of the run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock; a resumed run adds to its earlier training time. Say if its images are not those of its start."""
        self.started = time.monotonic()
        current = trainer.datamodule.data_report.fingerprints()
        changed = [name for name, value in current.items() if self.data_hashes.get(name, value) != value]
        if changed and trainer.is_global_zero:
            print(
                f"changed   {', '.join(changed)}: not the images with which the run began; the record has both hashes",
                flush=True,
            )
        self.data_hashes = {**current, **self.data_hashes}

    def state_dict(self) -> dict[str, Any]:
        """Return the training time in seconds, the code version of each segment of the training, and hashes of the images."""
        segments = [*self.previous_segments, {key: self.metadata[key] for key in SEGMENT_KEYS}]
        return {"seconds": self.seconds + time.monotonic() - self.started, "segments": segments, "data": self.data_hashes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, see `state_dict`."""
        self.seconds = state_dict["seconds"]
        current = {key: self.metadata[key] for key in SEGMENT_KEYS}
        self.previous_segments = [segment for segment in state_dict["segments"] if segment != current]
        self.data_hashes = state_dict.get("data", {})  # absent in checkpoints of older versions

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the record of the training."""
        checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
        data = trainer.datamodule.data_report.fingerprints()
        first_data = {name: value for name, value in self.data_hashes.items() if data.get(name, value) != value}
        self._write(
            trainer,
            {
                **self.metadata,
                "previous_segments": self.previous_segments,
                "weights": weights_hash(inference_state_dict(pl_module, read_weights(checkpoints.best)))
                if checkpoints.best.exists()
                else None,
                "data": data,
                **({"first_data": first_data} if first_data else {}),  # of images that have changed since the run began
                "skipped": trainer.datamodule.data_report.skipped,
                "hardware": hardware(trainer),
                "reference_weights": pl_module.file_hashes(),
                "images_seen": pl_module.images_seen,
                "best_images": checkpoints.best_images,
                "best": {"metric": checkpoints.monitor, "value": json_number(checkpoints.best_value)},
                "seconds": round(self.seconds + time.monotonic() - self.started, 1),
                "peak_memory_mib": peak_memory_mib(trainer),
                "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            },
        )

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Add the test metrics, with their values for each image."""
        metrics: dict[str, Any] = {}
        evaluators = [callback for callback in trainer.callbacks if isinstance(callback, Metric)]
        for callback in evaluators:
            for dataset, images in callback.results.items():
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
        elif not self._same_code(existing, "metrics"):  # evaluated earlier with other metric code
            current = {key: self.metadata[key] for key in ("commit", "code", "content", "config")}
            existing = {**{key: value for key, value in existing.items() if key != "certified"}, **current, "metrics": {}}
        evaluator_weights = {type(c).__name__: c.evaluator_hash for c in evaluators if c.evaluator_hash}
        if evaluator_weights:  # hashes of the networks that compute metrics
            existing["evaluator_weights"] = evaluator_weights
        existing["data"] = {**existing.get("data", {}), **trainer.datamodule.data_report.fingerprints()}
        metrics = {**existing.get("metrics", {}), **metrics}  # keep earlier metrics of sets that are missing now
        self._write(trainer, {**existing, "missing_sets": list(trainer.datamodule.missing_sets), "metrics": metrics})

    def _same_training(self, existing: dict[str, Any]) -> bool:
        """Return whether a record has the same model, data and training code as this run."""
        same_recipe = all(existing.get("content", {}).get(key) == self.metadata["content"][key] for key in ("model", "data"))
        return (
            same_recipe
            and self._same_code(existing, "training")
            and existing.get("config", {}).get("model") == self.metadata["config"]["model"]
        )

    def _same_code(self, existing: dict[str, Any], part: str) -> bool:
        """Return whether a part of the code is the same as in a record, or in the last check that certified the record."""
        code_versions = (existing.get("code", {}), existing.get("certified", {}).get("code", {}))
        return any(code.get(part) == self.metadata["code"][part] for code in code_versions)

    def _write(self, trainer: Any, record: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_record(record, self.path)


def json_number(value: float, digits: int | None = None) -> float | str:
    """Round a value for JSON; infinity (PSNR of a perfect image) and NaN become strings that `float` accepts."""
    if not math.isfinite(value):
        return str(value)
    return value if digits is None else round(value, digits)


def hardware(trainer: Any) -> dict[str, Any]:
    """Return the hardware and the precision of the run."""
    cuda = trainer.strategy.root_device.type == "cuda"
    return {
        "accelerator": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def cpu_name() -> str:
    """Return the name of the processor, or of its architecture if unknown."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mib(trainer: Any) -> int:
    """Return the peak memory of this process in MiB: allocated on the GPU if it is used, otherwise resident."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
