"""Folders that environment variables select."""

import os
from pathlib import Path


def runs_root() -> Path:
    """Return the folder of all runs: the environment variable DARKROOM_RUNS, else `runs` in the current folder."""
    return Path(os.environ.get("DARKROOM_RUNS") or "runs")
