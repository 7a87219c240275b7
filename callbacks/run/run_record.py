"""The run's record: what was run and what came of it, as JSON in the run's folder."""

import json
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

from callbacks.run.checkpoints import read_weights, weights_hash, without_training_state

LEG = ("commit", "fingerprints", "versions")  # what makes a resumed run another run than it was


class RunRecord(Callback):
    """Writes the record when training has reached its budget, and adds what is measured afterwards.

    A metric has `results`, {data set: {picture: {protocol: value}}}; those of a test stand in the record.

    Args:
        path: the file.
        facts: what is known before the run starts.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.seconds = 0.0
        self.earlier: list[dict[str, Any]] = []  # what earlier legs of this run were, where they differ from this one

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock; a resumed run goes on with the time it has taken so far."""
        self.started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The time taken so far, in seconds, and the code that it was spent by."""
        legs = [*self.earlier, {key: self.facts[key] for key in LEG}]
        return {"seconds": self.seconds + time.monotonic() - self.started, "legs": legs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.seconds = state_dict["seconds"]
        this = {key: self.facts[key] for key in LEG}
        self.earlier = [leg for leg in state_dict["legs"] if leg != this]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what the training was."""
        checkpoints = next(c for c in trainer.callbacks if hasattr(c, "best_images"))
        self._write(
            trainer,
            {
                **self.facts,
                "earlier_legs": self.earlier,
                "weights": weights_hash(without_training_state(pl_module, read_weights(checkpoints.best)))
                if checkpoints.best.exists()
                else None,
                "data": trainer.datamodule.survey.fingerprints(),
                "left_out": trainer.datamodule.survey.left_out,
                "hardware": hardware(trainer),
                "images": pl_module.images_seen,
                "best_images": checkpoints.best_images,
                "best": {"figure": checkpoints.monitor, "value": number(checkpoints.best_value)},
                "seconds": round(self.seconds + time.monotonic() - self.started, 1),
                "peak_memory_mib": peak_memory_mib(trainer),
                "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            },
        )

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Add what the test measured, picture by picture."""
        metrics: dict[str, Any] = {}
        for callback in trainer.callbacks:
            for data_set, pictures in getattr(callback, "results", {}).items():
                for protocol in next(iter(pictures.values())):
                    values = [pictures[name][protocol] for name in sorted(pictures)]
                    metrics.setdefault(data_set, {})[protocol] = {
                        "mean": number(sum(values) / len(values), 8),
                        "pictures": {name: number(value, 8) for name, value in zip(sorted(pictures), values, strict=True)},
                    }
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        weights = weights_hash(without_training_state(pl_module, pl_module.state_dict()))
        if known.get("weights") != weights or not self._trained_alike(known):
            known = {**self.facts, "weights": weights, "hardware": hardware(trainer)}
        elif known["fingerprints"] != self.facts["fingerprints"]:  # measured before by other protocols
            known = {**known, **{key: self.facts[key] for key in ("fingerprints", "config")}, "metrics": {}}
        instruments = {type(c).__name__: c.instrument for c in trainer.callbacks if getattr(c, "instrument", None)}
        if instruments:  # networks that figures hang on, by the hash of their weights
            known["instruments"] = instruments
        known["data"] = {**known.get("data", {}), **trainer.datamodule.survey.fingerprints()}
        metrics = {**known.get("metrics", {}), **metrics}  # a set that is not here today may have been measured before
        self._write(
            trainer, {**known, "absent": [line.partition(":")[0] for line in trainer.datamodule.absent], "metrics": metrics}
        )

    def _trained_alike(self, known: dict[str, Any]) -> bool:
        """Whether what a record says of its training holds for the recipe as it stands."""
        now = self.facts
        code = all(known.get("fingerprints", {}).get(part) == now["fingerprints"][part] for part in ("method", "data"))
        return code and known["config"]["model"] == now["config"]["model"]

    def _write(self, trainer: Any, record: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            beside = self.path.with_suffix(".part")
            beside.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            beside.replace(self.path)


def number(value: float, digits: int | None = None) -> float | str:
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
