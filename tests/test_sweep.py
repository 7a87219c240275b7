"""Workers that share a store, what a killed one loses, and what a search leaves."""

import json
import os
import signal
import threading
import time

import pytest
from filelock import FileLock

from callbacks.csv_log import read_log
from experiments import sweep
from experiments.main import main
from experiments.runs import Run
from tests.forked import forked
from tests.searches import fast_worker, started, trials_of, wait_for, write_search

# Workers


@pytest.mark.parametrize(
    "store", [None, pytest.param("sqlite:///{}/trials.db", marks=pytest.mark.slow)], ids=["journal", "sql"]
)
def test_of_two_workers_one_is_killed_and_nothing_is_missing(workplace, photos, store):
    """SIGKILL ends its trial with it; the other worker, or the next one to be started, goes on with that very run."""
    write_search(workplace, photos)
    words = ["sweep", "search.yaml", "--model.images", "4000", "--validate_every", "400"]
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
    words = ["sweep", "search.yaml", "--model.images", "4000", "--validate_every", "400"]
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
    settings = ["--model.images", "4000", "--validate_every", "400", "--model.learning_rate", "0.01"]
    assert forked(main, ["fit", "tiny.yaml", "--run", "whole", *settings]) == 0
    records = [json.loads((workplace / f"runs/tiny/{name}/record.json").read_text()) for name in (trial["run"], "whole")]
    assert records[0]["weights"] == records[1]["weights"]


@pytest.mark.slow
def test_a_trial_that_is_behind_ends_early(workplace, photos):
    early = {"type": "hyperband", "min_iter": 1, "max_iter": 2}
    path = write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2, 1e-7]}}, early_terminate=early)
    assert forked(fast_worker, ["sweep", str(path), "--model.images", "12000", "--validate_every", "400"]) == 0
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


# What it leaves


def test_table_pictures_and_the_best_recipe(workplace, photos):
    rates = {"model.learning_rate": {"values": [1e-2, 1e-4]}, "model.activation": {"value": "relu"}}
    write_search(workplace, photos, name="<b>rates", parameters=rates)
    assert forked(main, ["sweep", "search.yaml"]) == 0
    folder = workplace / "runs/sweeps/<b>rates"
    trials = trials_of(workplace, "<b>rates")
    metric = f"{photos.name}-kept/psnr/y-shave3"
    assert len(trials) == 2
    assert [float(trial[metric]) for trial in trials] == sorted((float(trial[metric]) for trial in trials), reverse=True)
    page = (folder / "report.html").read_text()
    assert "<b>rates" not in page and "&lt;b&gt;rates" in page
    assert 'src="http' not in page and "Parallel coordinates" in page
    for plot in ("optimization_history", "param_importances", "parallel_coordinate"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert forked(main, ["fit", str(folder / "best.yaml"), "--run", "best"]) == 0
    best = read_log(workplace / "runs/best/best/metrics.csv")
    assert max(float(row["value"]) for row in best if row["name"] == metric) == float(trials[0][metric])
    before = (folder / "trials.csv").read_text()
    assert forked(main, ["sweep", "search.yaml", "--report"]) == 0
    assert (folder / "trials.csv").read_text() == before
