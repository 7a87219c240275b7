"""Runs in a process of their own, forked from this one: everything is imported already, and a SIGKILL kills only them."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def forked(action: Callable[..., Any], *args: Any, output: Path | None = None) -> int:
    """Call a function in a child process; its exit status (negative: killed by that signal)."""

    def child() -> None:
        os.environ.pop("DARKROOM_RUN_FOLDER", None)
        if output is not None:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w")  # pytest's own stdout writes elsewhere
        action(*args)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{action} took more than five minutes")
    return process.exitcode


def write_recipe(path: Path, photos: Path, model: dict[str, Any], **data: Any) -> Path:
    """A recipe of 15 steps with a validation every 5, on a folder of small pictures."""
    scale = model["init_args"].get("scale", 3)
    recipe = {
        "model": model,
        "data": {
            "class_path": "datamodules.superresolution.SuperResolution",
            "init_args": {
                "scale": scale,
                "train": str(photos),
                "kept": 4,
                "batch_size": 4,
                "patch_size": 17,
                "overhang": 4,
                **data,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "callbacks.image_quality.ImageQuality", "init_args": {"shave": scale}},
                {"class_path": "tests.signals.SignalAt"},
            ],
        },
        "monitor": f"{photos.name}-kept/psnr/y-shave{scale}",
        "validate_every": 20,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
