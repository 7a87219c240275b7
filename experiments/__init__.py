"""The `darkroom` command, and a folder for each method with its recipes, tables and records."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the project
METHODS = ROOT / "experiments/methods"
