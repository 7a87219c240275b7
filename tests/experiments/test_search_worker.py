"""Workers that share a store, what a killed one loses, and what a search leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.errors import UserError
from experiments import ROOT
from experiments.cli.main import main
from experiments.run.run_dir import Run
from experiments.search import worker as sweep
from experiments.search.ray_backend import sweep_on_ray
from experiments.search.spec import read_search
from tests.helpers.search_helpers import fast_worker, started, trials_of, wait_for, write_search
from tests.helpers.subprocess_helpers import forked

# Workers


@pytest.mark.parametrize(
    "store", [None, pytest.param("sqlite:///{}/trials.db", marks=pytest.mark.slow)], ids=["journal", "sql"]
)
def test_of_two_workers_one_is_killed_and_nothing_is_missing(workplace, photos, store):
    """SIGKILL ends its trial with it; the other worker, or the next one to be started, goes on with that very run."""
    write_search(workplace, photos)
    words = ["sweep", "search.yaml", "--model.total_images", "4000", "--val_every_images", "400"]
    words += ["--store", store.format(workplace)] if store else []
    workers = [started(words) for _ in range(2)]
    wait_for(lambda: len(list((workplace / "runs/tiny").glob("search-*/checkpoints/last.ckpt"))) == 2)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].wait()
    said = workers[1].communicate(timeout=280)[0]
    if "is put back" not in said:  # it had nothing left to do before the other one's pulse was missed
        time.sleep(9)
        assert forked(fast_worker, words) == 0
    trials = trials_of(workplace)
    assert sorted(float(trial["model.learning_rate"]) for trial in trials) == [1e-5, 1e-3, 1e-2]
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    assert len({trial["run"] for trial in trials}) == 3
    texts = [path.read_text() for path in (workplace / "runs/sweeps/search").glob("*.txt")]
    assert sum("going on with" in text for text in texts) == 1


def test_a_run_that_is_still_trained_is_waited_for(tmp_path, monkeypatch):
    """As by a worker that was thought dead."""
    monkeypatch.setattr(sweep, "LOOK", 0.05)
    run, stop = Run(tmp_path), threading.Event()
    with FileLock(tmp_path / ".lock"):
        waiting = threading.Thread(target=sweep.wait_until_free, args=(run, stop))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("stop", ["signal", pytest.param("ctrl-c", marks=pytest.mark.slow)])
def test_a_worker_that_is_asked_to_stop_puts_its_trial_back_and_goes_on_later(workplace, photos, stop):
    """The trial's last weights are those of a run that nobody stopped."""
    write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    words = ["sweep", "search.yaml", "--model.total_images", "4000", "--val_every_images", "400"]
    worker = started(words)
    wait_for(lambda: list((workplace / "runs/tiny").glob("search-*/checkpoints/last.ckpt")))
    if stop == "signal":
        worker.send_signal(signal.SIGTERM)
    else:
        os.killpg(worker.pid, signal.SIGINT)  # as a terminal does: to the worker and to its trial
    said = worker.communicate(timeout=120)[0]
    assert worker.returncode == 85 and "is put back" in said and "The same command goes on" in said
    assert forked(main, words) == 0
    (trial,) = trials_of(workplace)
    settings = ["--model.total_images", "4000", "--val_every_images", "400", "--model.learning_rate", "0.01"]
    assert forked(main, ["fit", "tiny.yaml", "--run", "whole", *settings]) == 0
    records = [json.loads((workplace / f"runs/tiny/{name}/record.json").read_text()) for name in (trial["run"], "whole")]
    assert records[0]["weights"] == records[1]["weights"]


@pytest.mark.slow
def test_a_trial_that_is_behind_ends_early(workplace, photos):
    early = {"type": "hyperband", "min_iter": 1, "max_iter": 2}
    path = write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2, 1e-7]}}, early_terminate=early)
    assert forked(fast_worker, ["sweep", str(path), "--model.total_images", "12000", "--val_every_images", "400"]) == 0
    good, bad = trials_of(workplace)
    assert (good["state"], bad["state"]) == ("COMPLETE", "PRUNED")
    runs = workplace / "runs/tiny"
    assert (runs / good["run"] / "record.json").exists()
    assert not (runs / bad["run"] / "record.json").exists()


def test_a_trial_may_be_of_several_processes(workplace, photos):
    """One decision: the second process trains in the first one's run."""
    path = write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    assert forked(main, ["sweep", str(path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]) == 0
    (trial,) = trials_of(workplace)
    assert len(list((workplace / "runs/tiny").iterdir())) == 1
    record = json.loads((workplace / f"runs/tiny/{trial['run']}/record.json").read_text())
    assert record["hardware"]["processes"] == 2


@pytest.mark.slow
def test_ray_places_the_trials_and_a_worker_goes_on_where_it_stopped(workplace, photos):
    pytest.importorskip("ray.tune", reason="pip install 'darkroom[ray]'")
    write_search(workplace, photos)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0"}
    command = [sys.executable, "-m", "experiments", "sweep", "search.yaml", "--ray", "local", "--trials"]
    ended = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert [trial["state"] for trial in trials_of(workplace)] == ["COMPLETE"] * 2
    assert forked(main, ["sweep", "search.yaml"]) == 0
    trials = trials_of(workplace)
    assert sorted(float(trial["model.learning_rate"]) for trial in trials) == [1e-5, 1e-3, 1e-2]
    assert len({trial["run"] for trial in trials}) == 3


def test_without_ray_it_says_how_it_is_had(workplace, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    search = read_search(write_search(workplace, photos), [])
    with pytest.raises(UserError, match="pip install 'darkroom\\[ray\\]'"):
        sweep_on_ray(search, None, "local", 0, 1)


def test_a_search_of_which_all_trials_fail_says_so(workplace, photos, capfd):
    write_search(workplace, photos, parameters={"model.total_images": {"values": [0, -1]}})
    assert forked(main, ["sweep", "search.yaml"]) == 2
    assert "all 2 trials so far failed; the last: darkroom: model.total_images: -1 is not a budget" in capfd.readouterr().err


# What it leaves


def test_table_pictures_and_the_best_recipe(workplace, photos):
    rates = {"model.learning_rate": {"values": [1e-2, 1e-4]}, "model.activation": {"value": "relu"}}
    write_search(workplace, photos, name="<b>rates", parameters=rates)
    assert forked(main, ["sweep", "search.yaml"]) == 0
    folder = workplace / "runs/sweeps/<b>rates"
    trials = trials_of(workplace, "<b>rates")
    metric = f"{photos.name}-holdout/psnr-y/crop3"
    assert len(trials) == 2
    assert [float(trial[metric]) for trial in trials] == sorted((float(trial[metric]) for trial in trials), reverse=True)
    page = (folder / "report.html").read_text()
    assert "<b>rates" not in page and "&lt;b&gt;rates" in page
    assert 'src="http' not in page and "Parallel coordinates" in page
    markdown = (folder / "README.md").read_text()
    assert "<b>rates" not in markdown and markdown.count("\n| ") == 2 + len(trials)
    for plot in ("optimization_history", "param_importances", "parallel_coordinate"):
        assert f"({plot}.png)" in markdown
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert forked(main, ["fit", str(folder / "best.yaml"), "--run", "best"]) == 0
    best = read_metrics_csv(workplace / "runs/best/best/metrics.csv")
    assert max(float(row["value"]) for row in best if row["name"] == metric) == float(trials[0][metric])
    before = (folder / "trials.csv").read_text()
    assert forked(main, ["sweep", "search.yaml", "--report"]) == 0
    assert (folder / "trials.csv").read_text() == before
