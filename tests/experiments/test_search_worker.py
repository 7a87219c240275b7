"""Search workers: shared storage, recovery of killed workers, and reports."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading

import optuna
import pytest
from filelock import FileLock
from optuna.trial import TrialState, create_trial

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.errors import UserError
from experiments import ROOT
from experiments.cli.main import main
from experiments.run.run_dir import Run
from experiments.search import worker as search_worker
from experiments.search.ray_backend import sweep_on_ray
from experiments.search.report import report
from experiments.search.samplers import distributions
from experiments.search.spec import read_search
from tests.helpers.search_helpers import fast_worker, trials_of, wait_for, write_search
from tests.helpers.subprocess_helpers import forked, started

# Workers


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/trials.db"], ids=["journal", "sql"])
@pytest.mark.slow
def test_killed_worker_is_replaced_and_its_run_resumed(workdir, photos, storage):
    """SIGKILL also ends the worker's trial. The other worker waits for a sign of life, and resumes the run."""
    write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1e-2, 1e-3]}})
    argv = ["sweep", "search.yaml", "--model.total_images", "2400", "--val_every_images", "400"]
    argv += ["--storage", storage.format(workdir)] if storage else []
    outputs = [workdir / f"{i}.txt" for i in range(2)]
    workers = [started([output, output], fast_worker, argv) for output in outputs]
    wait_for(lambda: len(list((workdir / "runs/tiny").glob("search-*/checkpoints/last.ckpt"))) == 2)
    workers[0].kill()
    workers[1].join(timeout=280)
    assert "is requeued" in outputs[1].read_text()
    trials = trials_of(workdir)
    assert sorted(float(trial["model.learning_rate"]) for trial in trials) == [1e-3, 1e-2]
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    assert len({trial["run"] for trial in trials}) == 2
    texts = [path.read_text() for path in (workdir / "runs/sweeps/search").glob("*.txt")]
    assert sum("resuming" in text for text in texts) == 1


def test_lone_worker_that_is_killed_and_started_again_finishes_its_trial(workdir, photos, capfd):
    write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    argv = ["sweep", "search.yaml", "--model.total_images", "1200", "--val_every_images", "400"]
    output = workdir / "0.txt"
    lone = started([output, output], fast_worker, argv)
    wait_for(lambda: list((workdir / "runs/tiny").glob("search-*/checkpoints/last.ckpt")))
    lone.kill()
    capfd.readouterr()
    assert forked(fast_worker, argv) == 0
    assert (
        "trial 0 is requeued" in capfd.readouterr().out
    )  # after a wait for a sign of life, or for a lock of the killed worker
    (trial,) = trials_of(workdir)
    assert trial["state"] == "COMPLETE"


def test_worker_waits_for_a_locked_run(tmp_path, monkeypatch):
    """The lock may be held by a worker that was considered dead."""
    monkeypatch.setattr(search_worker, "POLL_S", 0.05)
    run, stop = Run(tmp_path), threading.Event()
    with FileLock(tmp_path / ".lock"):
        waiting = threading.Thread(target=search_worker.wait_until_free, args=(run, stop))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["signal", "ctrl-c"])
def test_stopped_worker_requeues_its_trial_and_resumes_bit_identically(workdir, photos, stop):
    """The trial ends with the weights of an uninterrupted run."""
    write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    settings = ["--model.total_images", "2400", "--val_every_images", "400"]
    argv = ["sweep", "search.yaml", *settings]
    output = workdir / "output.txt"
    worker = started([output, output], fast_worker, argv)
    wait_for(lambda: list((workdir / "runs/tiny").glob("search-*/checkpoints/last.ckpt")))
    if stop == "signal":
        worker.terminate()
    else:
        os.killpg(worker.pid, signal.SIGINT)  # to the worker and its trial, as from a terminal
    worker.join(timeout=120)
    assert worker.exitcode == 85
    assert "is requeued" in output.read_text()
    assert "same command" in output.read_text()
    assert forked(main, argv) == 0
    (trial,) = trials_of(workdir)
    uninterrupted = ["fit", "tiny.yaml", "--run", "uninterrupted", *settings, "--model.learning_rate", "0.01"]
    assert forked(main, uninterrupted) == 0
    records = [json.loads((workdir / f"runs/tiny/{name}/record.json").read_text()) for name in (trial["run"], "uninterrupted")]
    assert records[0]["weights"] == records[1]["weights"]


@pytest.mark.slow
def test_hyperband_prunes_the_worse_trial(workdir, photos):
    hyperband = {"type": "hyperband", "min_iter": 1, "max_iter": 2}
    path = write_search(
        workdir, photos, parameters={"model.learning_rate": {"values": [1e-2, 1e-7]}}, early_terminate=hyperband
    )
    assert forked(fast_worker, ["sweep", str(path), "--model.total_images", "12000", "--val_every_images", "400"]) == 0
    good, bad = trials_of(workdir)
    assert (good["state"], bad["state"]) == ("COMPLETE", "PRUNED")
    runs = workdir / "runs/tiny"
    assert (runs / good["run"] / "record.json").exists()
    assert not (runs / bad["run"] / "record.json").exists()


@pytest.mark.slow
def test_trial_with_two_processes_has_one_run(workdir, photos):
    """The second process trains in the run of the first process."""
    path = write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    assert forked(main, ["sweep", str(path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]) == 0
    (trial,) = trials_of(workdir)
    assert len(list((workdir / "runs/tiny").iterdir())) == 1
    record = json.loads((workdir / f"runs/tiny/{trial['run']}/record.json").read_text())
    assert record["hardware"]["processes"] == 2


@pytest.mark.slow
def test_ray_and_a_worker_share_a_search(workdir, photos):
    pytest.importorskip("ray.tune", reason="pip install 'darkroom[ray]'")
    write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1e-2, 1e-3]}})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0"}
    command = [sys.executable, "-m", "experiments", "sweep", "search.yaml", "--ray", "local", "--n-trials"]
    result = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert [trial["state"] for trial in trials_of(workdir)] == ["COMPLETE"] * 2
    assert forked(main, ["sweep", "search.yaml"]) == 0
    trials = trials_of(workdir)
    assert sorted(float(trial["model.learning_rate"]) for trial in trials) == [1e-5, 1e-3, 1e-2]
    assert len({trial["run"] for trial in trials}) == 3


def test_missing_ray_names_the_package_to_install(workdir, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    search = read_search(write_search(workdir, photos), [])
    with pytest.raises(UserError, match="pip install 'darkroom\\[ray\\]'"):
        sweep_on_ray(search, None, "local", 0, 1)


@pytest.mark.slow
def test_search_with_only_failed_trials_reports_the_last_error(workdir, photos, capfd):
    write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1e30, 1e31]}})
    assert forked(main, ["sweep", "search.yaml"]) == 2
    assert "all 2 trials so far failed; the last: darkroom: loss 'mse' is" in capfd.readouterr().err


# Report


def study_of(search, values):
    """Return a study whose trials have these values; None for a trial that failed."""
    study = optuna.create_study(direction="maximize" if search.maximize else "minimize")
    spaces = distributions(search)
    for i, value in enumerate(values):
        params = {key: space.choices[i % len(space.choices)] for key, space in spaces.items()}
        attributes = {"run": f"r{i}", **({"reason": "too large | <b>"} if value is None else {})}
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=spaces, user_attrs=attributes))
    return study


def test_equal_values_have_no_importance_plot(workdir, photos):
    search = read_search(write_search(workdir, photos), [])
    report(search, study_of(search, [1.0, 1.0]), workdir)
    assert "param_importances" not in (workdir / "README.md").read_text()
    assert "Importance" not in (workdir / "report.html").read_text()


def test_failed_trials_are_in_all_tables(workdir, photos, capsys):
    search = read_search(write_search(workdir, photos), [])
    report(search, study_of(search, [20.5, None, 30.25]), workdir)
    assert re.search(r"1 │\s+failed │\s+0.001", capsys.readouterr().out)
    rows = list(csv.DictReader((workdir / "trials.csv").open(newline="")))
    assert [(row["trial"], row["state"], row["reason"]) for row in rows] == [
        ("2", "COMPLETE", ""),
        ("0", "COMPLETE", ""),
        ("1", "FAIL", "too large | <b>"),
    ]
    assert "| 1 | failed | 0.001 |" in (workdir / "README.md").read_text()
    assert "<td>failed</td>" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_report_has_table_plots_and_best_recipe(workdir, photos):
    rates = {"model.learning_rate": {"values": [1e-2, 1e-4]}, "model.activation": {"value": "relu"}}
    write_search(workdir, photos, name="<b>rates", parameters=rates)
    assert forked(main, ["sweep", "search.yaml"]) == 0
    folder = workdir / "runs/sweeps/<b>rates"
    trials = trials_of(workdir, "<b>rates")
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
    best = read_metrics_csv(workdir / "runs/best/best/metrics.csv")
    assert max(float(row["value"]) for row in best if row["name"] == metric) == float(trials[0][metric])
    trials_csv = (folder / "trials.csv").read_text()
    assert forked(main, ["sweep", "search.yaml", "--report"]) == 0
    assert (folder / "trials.csv").read_text() == trials_csv
