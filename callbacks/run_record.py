"""The run's record: what was run and what came of it, as JSON in the run's folder."""

import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


class RunRecord(Callback):
    """Writes the record when training has reached its budget, and adds what is measured afterwards.

    A callback that measures has `figures`, {data set: {picture: {protocol: value}}}; those of a test stand in the record.

    Args:
        path: the file.
        facts: what is known before the run starts.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.seconds = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock; a resumed run goes on with the time it has taken so far."""
        self.started = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        """The time taken so far, in seconds."""
        return {"seconds": self.seconds + time.monotonic() - self.started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """See `state_dict`."""
        self.seconds = state_dict["seconds"]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what the training was."""
        checkpoints = next(c for c in trainer.callbacks if hasattr(c, "best_images"))
        self._write(
            trainer,
            {
                **self.facts,
                "data": trainer.datamodule.fingerprints(),
                "left_out": trainer.datamodule.left_out,
                "hardware": hardware(trainer),
                "images": pl_module.images_seen,
                "best_images": checkpoints.best_images,
                "best": {"figure": checkpoints.monitor, "value": checkpoints.best_value},
                "seconds": round(self.seconds + time.monotonic() - self.started, 1),
                "peak_memory_mib": peak_memory_mib(trainer),
                "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            },
        )

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Add what the test measured, picture by picture."""
        metrics: dict[str, Any] = {}
        for callback in trainer.callbacks:
            for data_set, pictures in getattr(callback, "figures", {}).items():
                for protocol in next(iter(pictures.values())):
                    values = {name: round(pictures[name][protocol], 6) for name in sorted(pictures)}
                    mean = sum(values.values()) / len(values)
                    metrics.setdefault(data_set, {})[protocol] = {"mean": round(mean, 4), "pictures": values}
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if known.get("fingerprints") != self.facts["fingerprints"]:
            known = {**self.facts, "hardware": hardware(trainer)}
        known["data"] = {**known.get("data", {}), **trainer.datamodule.fingerprints()}
        metrics = {**known.get("metrics", {}), **metrics}  # a set that is not here today may have been measured before
        self._write(trainer, {**known, "absent": trainer.datamodule.absent, "metrics": metrics})

    def _write(self, trainer: Any, record: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            beside = self.path.with_suffix(".part")
            beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            beside.replace(self.path)


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
