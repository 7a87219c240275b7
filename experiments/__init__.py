"""The `darkroom` command, and one folder per method with recipes, tables and records."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # root folder of the project
METHODS = ROOT / "experiments/methods"
