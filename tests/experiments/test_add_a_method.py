"""Follow the guide `experiments/methods/README.md` in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import METHODS, ROOT

GUIDE = (METHODS / "README.md").read_text()
PACKAGES = ("modules", "datamodules", "callbacks", "experiments", "tests")


def block(beginning: str) -> str:
    """Return the code block of the guide that begins with the given text."""
    blocks = [text for text in re.findall(r"```\w+\n(.*?)```", GUIDE, re.DOTALL) if text.startswith(beginning)]
    assert len(blocks) == 1, beginning
    return blocks[0]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of the project with the five files of the guide."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("records", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    files = {
        "modules/yours.py": '"""Yours',
        "experiments/methods/yours/recipes/demo.yaml": "# Yours x3",
        "experiments/methods/yours/README.md": "# Yours\n",
        "experiments/methods/yours/table.yaml": "title: Yours",
        "tests/modules/test_yours.py": "from modules.yours",
    }
    for name, beginning in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block(beginning))
        assert f"| `{name}` |" in GUIDE
    return tmp_path


def run(project: Path, *words: str) -> str:
    """Run `python -m` in the copy and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(project), "DARKROOM_RUNS": str(project / "runs"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", *words], cwd=project, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_following_the_guide_adds_a_method(project):
    assert "yours/demo" in run(project, "experiments", "list", "yours")
    short = ["--model.total_images", "1600", "--val_every_images", "800"]
    assert "photographs-val/psnr-y/crop3" in run(project, "experiments", "fit", "yours/demo", "--run", "r", *short)
    assert "photographs-test" in json.loads((project / "runs/yours/demo/r/record.json").read_text())["metrics"]
    assert "another method: set5 31.50" in run(project, "experiments", "reproduce", "yours").replace("\n", " ")
    run(project, "experiments", "reproduce", "yours", "--write")
    page = (project / "experiments/methods/yours/README.md").read_text()
    assert "Yours, trained on T91" in page


@pytest.mark.slow
def test_method_of_the_guide_passes_the_contract_and_the_checks(project):
    run(project, "pytest", "-q", "-p", "no:cacheprovider", "tests/modules/test_yours.py", "-m", "slow or not slow")
    shared = ["tests/experiments/test_recipes.py", "tests/experiments/test_reproduce.py", "tests/test_architecture.py"]
    run(project, "pytest", "-q", "-p", "no:cacheprovider", "-k", "yours or pages_follow", *shared)
    run(project, "ruff", "check", "modules/yours.py", "tests/modules/test_yours.py")
    run(project, "ruff", "format", "--check", "modules/yours.py", "tests/modules/test_yours.py")
    run(project, "mypy", "modules/yours.py")


@pytest.mark.parametrize("attribute", re.findall(r"`(\w+)(?:\(log\))?`(?= |,)", GUIDE.partition("| attribute | meaning |")[2]))
def test_attributes_in_the_guide_exist_in_the_contract(attribute):
    if attribute.islower() and attribute not in ("class_path", "init_args", "total_images", "crop", "margin"):
        helpers = "".join(
            path.read_text() for path in [*(ROOT / "tests/tasks").glob("*.py"), *(ROOT / "tests/helpers").glob("*.py")]
        )
        assert re.search(rf"^    (?:def )?{attribute}\b", helpers, re.MULTILINE), attribute
