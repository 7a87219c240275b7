"""Small hyperparameter searches and their workers."""

import csv
import os
import time

import yaml

from experiments.cli.main import main
from experiments.search import worker
from tests.tasks.superresolution import write_recipe

LEARNING_RATES = {"model.learning_rate": {"values": [1e-2, 1e-3, 1e-5]}}
STALE_S = 8


def write_search(folder, photos, **changes):
    """Write the search of an ESPCN recipe with 15 steps."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = write_recipe(folder / "tiny.yaml", photos, model)
    settings = yaml.safe_load(recipe.read_text())
    del settings["trainer"]["callbacks"][1:]  # callbacks of the tests, which a trial cannot import
    recipe.write_text(yaml.safe_dump(settings))
    content = {
        "method": "grid",
        "metric": {"name": f"{photos.name}-holdout/psnr-y/crop3", "goal": "maximize"},
        "parameters": LEARNING_RATES,
        "command": ["${env}", "darkroom", "fit", str(recipe), "${args}"],
        **changes,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def trials_of(workdir, name="search"):
    with (workdir / f"runs/sweeps/{name}/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fast_worker(arguments):
    """Run a command with a short heartbeat, as a session leader, as in a terminal."""
    worker.HEARTBEAT_S, worker.STALE_S, worker.POLL_S = 0.3, STALE_S, 0.2
    os.setsid()
    return main(arguments)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timeout after {seconds} s"
        time.sleep(0.1)
