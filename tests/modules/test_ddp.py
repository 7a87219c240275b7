"""What several processes do together, and what a run does when its numbers break."""

import json

import pytest
import torch
from filelock import FileLock

from callbacks.run.csv_logger import read_metrics_csv
from experiments.cli.main import main
from experiments.run.lightning_cli import build
from experiments.run.recipes import find_recipe
from modules.training.gradients import make_buckets
from tests.helpers.method_contract import assert_equal, checkpoint, fit
from tests.helpers.subprocess_helpers import forked, launched, two_forked
from tests.helpers.tiny_recipes import write_recipe, write_reconstruction_recipe

TWO = ["--trainer.devices", "2"]


@pytest.fixture
def recipe(workplace, photos):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60, "warmup": 8}}
    return write_recipe(workplace / "tiny.yaml", photos, model)


def test_a_set_of_fewer_pictures_than_processes_is_measured_once(workplace):
    words = ["espcn/demo", "--model.total_images", "64", "--val_every_images", "32"]  # one picture chooses its weights
    assert forked(fit, *words, "--run", "one") == 0
    assert two_forked(fit, *words, "--run", "two", *TWO)[0] == [0, 0]
    folders = [workplace / "runs/espcn/demo" / run for run in ("one", "two")]
    records = [json.loads((folder / "record.json").read_text()) for folder in folders]
    assert records[0]["metrics"].keys() == records[1]["metrics"].keys() == {"photographs-test"}
    logs = [[float(row["value"]) for row in read_metrics_csv(folder / "metrics.csv")] for folder in folders]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


def test_a_signal_to_one_process_stops_both_and_the_resumed_run_is_the_uninterrupted_one(workplace, recipe, monkeypatch):
    assert two_forked(fit, recipe, "--run", "whole", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@1")
    broken = launched("fit", recipe, "--run", "broken", *TWO)
    assert broken.returncode == 85, broken.stderr
    assert broken.stdout.count("nothing is lost") == 1
    assert 24 < checkpoint(workplace, recipe, "broken")["images_seen"] < 40  # a step after the signal, or two
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert launched("fit", recipe, "--run", "broken", *TWO).returncode == 0
    left, right = (checkpoint(workplace, recipe, run) for run in ("whole", "broken"))
    for key in ("state_dict", "optimizer_states", "images_seen", "SuperResolution", "global_step"):
        assert_equal(left[key], right[key], key)
    logs = [read_metrics_csv(workplace / "runs/tiny" / run / "metrics.csv") for run in ("whole", "broken")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("processes", [[], TWO], ids=["one", "two"])
def test_a_signal_while_it_measures_leaves_the_training_and_the_same_command_measures(workplace, monkeypatch, processes):
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [20], "latent_size": 3, "total_images": 40}}
    recipe = write_reconstruction_recipe(workplace / "tiny.yaml", model)
    whole = ["--run", "whole", *processes]
    assert not any(two_forked(fit, recipe, *whole)[0] if processes else [forked(fit, recipe, *whole)])
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@test")
    broken = launched("fit", recipe, "--run", "broken", *processes)
    assert broken.returncode == 85, broken.stderr
    assert broken.stdout.count("Stopped while measuring") == 1
    records = [workplace / f"runs/tiny/{run}/record.json" for run in ("whole", "broken")]
    assert "metrics" not in json.loads(records[1].read_text())
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert launched("fit", recipe, "--run", "broken", *processes).returncode == 0
    metrics = [json.loads(path.read_text())["metrics"] for path in records]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("processes", [[], TWO], ids=["one", "two"])
def test_a_loss_that_breaks_stops_the_run_in_one_line(workplace, recipe, processes):
    ended = launched("fit", recipe, "--run", "broken", "--model.learning_rate", "1e30", *processes)
    assert ended.returncode == 2, ended.stderr
    complaints = [line for line in ended.stderr.splitlines() if line.startswith("darkroom: ")]
    assert len(complaints) == 1
    assert "loss 'mse' is" in complaints[0]
    assert "lower model.learning_rate" in complaints[0]
    assert not (workplace / "runs/tiny/broken/checkpoints/last.ckpt").exists()


def test_weights_that_broke_between_two_logged_steps_are_not_saved(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "broken", "--model.total_images", "20"]) == 0
    before = (workplace / "runs/tiny/broken/checkpoints/last.ckpt").read_bytes()
    seldom = ["--trainer.log_every_n_steps", "1000", "--model.learning_rate", "1e30"]
    assert forked(main, ["fit", str(recipe), "--run", "broken", *seldom]) == 2
    assert "darkroom: loss 'mse' is " in capfd.readouterr().err
    assert (workplace / "runs/tiny/broken/checkpoints/last.ckpt").read_bytes() == before


def test_a_finished_run_is_not_trained_further_by_accident(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "done"]) == 0
    assert forked(main, ["fit", str(recipe), "--run", "done"]) == 2
    assert "is finished after 60 images" in capfd.readouterr().err


def test_a_run_that_another_process_writes_is_refused(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--model.total_images", "20"]) == 0
    with FileLock(workplace / "runs/tiny/one/.lock"):
        assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2
    assert "darkroom: run 'one' is being written by another process; another --run starts anew" in capfd.readouterr().err


def count_denormals():
    torch.set_num_threads(2)
    build("fit", find_recipe("vae/demo"), ["--run", "tiny"])
    small = torch.full((1_000_000,), 1e-40)  # enough for both threads
    return int((small * 0.5).count_nonzero() > 0)


def test_numbers_that_a_processor_is_slow_at_are_zero_on_all_its_threads(workplace):
    assert forked(count_denormals) == 0


def test_gradients_travel_in_buckets_of_one_type():
    tensors = [
        torch.zeros(n, dtype=dtype)
        for n, dtype in ((3, torch.float32), (2, torch.float32), (9, torch.float32), (1, torch.float64))
    ]
    assert [[t.numel() for t in bucket] for bucket in make_buckets(tensors, size=24)] == [[3, 2], [9], [1]]
