"""Training with several ranks, signals, and non-finite losses."""

import json

import pytest
import torch
from filelock import FileLock

from callbacks.run.csv_logger import read_metrics_csv
from experiments.cli.main import main
from experiments.run.lightning_cli import build_cli
from experiments.run.recipes import find_recipe
from tests.helpers.method_contract import assert_equal, checkpoint, fit
from tests.helpers.subprocess_helpers import forked, launched, two_forked
from tests.tasks.reconstruction import write_reconstruction_recipe
from tests.tasks.superresolution import write_recipe

TWO = ["--trainer.devices", "2"]


def run_on_ranks(recipe, *options):
    """Train on two ranks if the options request them, otherwise on one. Return the exit status of rank 0 and the output."""
    argv = ["fit", str(recipe), *options]
    if "--trainer.devices" in options:
        statuses, output = two_forked(main, argv)
        return statuses[0], output
    path = recipe.with_name("output.txt")
    return forked(main, argv, output=path), path.read_text()


@pytest.fixture
def recipe(workdir, photos):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60, "warmup": 8}}
    return write_recipe(workdir / "tiny.yaml", photos, model)


def test_dataset_smaller_than_world_size_is_evaluated_once(workdir):
    argv = ["espcn/demo", "--model.total_images", "64", "--val_every_images", "32"]  # one validation image
    assert forked(fit, *argv, "--run", "one") == 0
    assert two_forked(fit, *argv, "--run", "two", *TWO)[0] == [0, 0]
    folders = [workdir / "runs/espcn/demo" / run for run in ("one", "two")]
    records = [json.loads((folder / "record.json").read_text()) for folder in folders]
    assert records[0]["metrics"].keys() == records[1]["metrics"].keys() == {"photographs-test"}
    logs = [[float(row["value"]) for row in read_metrics_csv(folder / "metrics.csv")] for folder in folders]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


@pytest.mark.parametrize("launcher", ["forked", pytest.param("lightning", marks=pytest.mark.slow)])
def test_signal_to_one_rank_stops_all_ranks_and_resume_is_exact(workdir, recipe, monkeypatch, launcher):
    assert two_forked(fit, recipe, "--run", "full", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@1")
    if launcher == "lightning":
        broken = launched("fit", recipe, "--run", "broken", *TWO)
        assert broken.returncode == 85, broken.stderr
        output = broken.stdout
    else:
        statuses, output = two_forked(main, ["fit", str(recipe), "--run", "broken", *TWO])
        assert statuses == [85, 0], output  # Lightning's launcher would kill rank 0 if rank 1 failed
    assert output.count("Stopped and saved") == 1
    assert 24 < checkpoint(workdir, recipe, "broken")["images_seen"] < 40  # one or two steps after the signal
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert two_forked(fit, recipe, "--run", "broken", *TWO)[0] == [0, 0]
    expected, resumed = (checkpoint(workdir, recipe, run) for run in ("full", "broken"))
    for key in ("state_dict", "optimizer_states", "images_seen", "SuperResolution", "global_step"):
        assert_equal(expected[key], resumed[key], key)
    logs = [read_metrics_csv(workdir / "runs/tiny" / run / "metrics.csv") for run in ("full", "broken")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("options", [[], TWO], ids=["one", "two"])
def test_run_stopped_during_evaluation_is_evaluated_on_resume(workdir, monkeypatch, options):
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [20], "latent_size": 3, "total_images": 40}}
    recipe = write_reconstruction_recipe(workdir / "tiny.yaml", model)
    assert run_on_ranks(recipe, "--run", "full", *options)[0] == 0
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@test")
    status, output = run_on_ranks(recipe, "--run", "broken", *options)
    assert status == 85, output
    assert output.count("Stopped while evaluating") == 1
    records = [workdir / f"runs/tiny/{run}/record.json" for run in ("full", "broken")]
    assert "metrics" not in json.loads(records[1].read_text())
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert run_on_ranks(recipe, "--run", "broken", *options)[0] == 0
    metrics = [json.loads(path.read_text())["metrics"] for path in records]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.slow, id="one"), pytest.param(TWO, id="two")])
def test_non_finite_loss_stops_the_run_with_one_error_line(workdir, recipe, options):
    result = launched("fit", recipe, "--run", "broken", "--model.learning_rate", "1e30", *options)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("darkroom: ")]
    assert len(errors) == 1
    assert "loss 'mse' is" in errors[0]
    assert "model.learning_rate" in errors[0]
    assert not (workdir / "runs/tiny/broken/checkpoints/last.ckpt").exists()


def test_non_finite_weights_between_logged_steps_are_not_saved(workdir, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "broken", "--model.total_images", "20"]) == 0
    before = (workdir / "runs/tiny/broken/checkpoints/last.ckpt").read_bytes()
    overrides = ["--trainer.log_every_n_steps", "1000", "--model.learning_rate", "1e30"]
    assert forked(main, ["fit", str(recipe), "--run", "broken", *overrides]) == 2
    assert "darkroom: loss 'mse' is " in capfd.readouterr().err
    assert (workdir / "runs/tiny/broken/checkpoints/last.ckpt").read_bytes() == before


def test_finished_run_raises_user_error(workdir, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "done"]) == 0
    assert forked(main, ["fit", str(recipe), "--run", "done"]) == 2
    assert "is finished after 60 images" in capfd.readouterr().err


def test_locked_run_raises_user_error(workdir, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--model.total_images", "20"]) == 0
    with FileLock(workdir / "runs/tiny/one/.lock"):
        assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2
    assert "darkroom: run 'one' is in use by another process" in capfd.readouterr().err


def has_denormals():
    torch.set_num_threads(2)
    build_cli("fit", find_recipe("vae/demo"), ["--run", "tiny"])
    small = torch.full((1_000_000,), 1e-40)  # enough for both threads
    return int((small * 0.5).count_nonzero() > 0)


def test_denormals_are_flushed_to_zero_on_all_threads(workdir):
    assert forked(has_denormals) == 0
