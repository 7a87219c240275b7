"""Small searches, and workers on them as a user starts them."""

import csv
import os
import subprocess
import sys
import time

import yaml

from experiments import ROOT
from experiments.cli.main import main
from experiments.search import worker as sweep
from tests.helpers.tiny_recipes import write_recipe

RATE = {"model.learning_rate": {"values": [1e-2, 1e-3, 1e-5]}}


def write_search(folder, photos, **changes):
    """Of a network of 15 steps."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = write_recipe(folder / "tiny.yaml", photos, model)
    settings = yaml.safe_load(recipe.read_text())
    del settings["trainer"]["callbacks"][1:]  # the tests' own, which a user's process does not find
    recipe.write_text(yaml.safe_dump(settings))
    content = {
        "method": "grid",
        "metric": {"name": f"{photos.name}-holdout/psnr-y/crop3", "goal": "maximize"},
        "parameters": RATE,
        "command": ["${env}", "darkroom", "fit", str(recipe), "${args}"],
        **changes,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def trials_of(workplace, name="search"):
    with (workplace / f"runs/sweeps/{name}/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fast_worker(words):
    sweep.BEAT, sweep.EXPIRED, sweep.LOOK = 0.3, 8, 0.2
    return main(words)


def started(words):
    """A worker as a user starts it, in a terminal of its own, with a pulse that tests can wait for."""
    code = f"from tests.helpers.search_helpers import fast_worker; import sys; sys.exit(fast_worker({words!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
