"""Runs whose files are damaged or incomplete, and trainings that end early: what is saved, and what is refused."""

import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from callbacks.run.csv_logger import read_metrics_csv
from callbacks.run.record_file import read_record, write_record
from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run.run_dir import Run
from modules.espcn import ESPCN
from modules.networks.weights import load_weights
from tests.helpers.subprocess_helpers import forked, refused
from tests.tasks.superresolution import write_recipe

MODEL = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60, "warmup": 8}}


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Return a folder with a recipe and the run `one`, which has seen 40 of its 60 images."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = folder / "photos"
    shutil.copytree(photos, pictures)
    write_recipe(folder / "tiny.yaml", pictures, MODEL, test=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DARKROOM_RUNS", str(folder / "runs"))
        patch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@40@0")
        patch.delenv("DARKROOM_RUN_FOLDER", raising=False)
        assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 85
    return folder


@pytest.fixture
def run(trained, workdir):
    """Return a copy of the run; its recipe is in the working directory."""
    shutil.copytree(trained, workdir, dirs_exist_ok=True)
    recipe = (workdir / "tiny.yaml").read_text().replace(str(trained), str(workdir))
    (workdir / "tiny.yaml").write_text(recipe)
    run = Run(workdir / "runs/tiny/one")
    run.config.write_text(run.config.read_text().replace(str(trained), str(workdir)))
    return run


# Resuming from a damaged checkpoint


def without(*keys):
    def change(content):
        for key in keys:
            del content[key]

    return change


def set_weight(value):
    def change(content):
        content["state_dict"]["network.0.bias"] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("optimizer_states"), "'optimizer_states' is missing"),
        pytest.param(without("lr_schedulers"), "'lr_schedulers' is missing", marks=pytest.mark.slow),
        pytest.param(without("callbacks"), "'callbacks' is missing", marks=pytest.mark.slow),
        pytest.param(without("loops"), "'loops' is missing", marks=pytest.mark.slow),
        (without("images_seen"), "'images_seen' is missing"),
        pytest.param(without("pending_losses"), "'pending_losses' is missing", marks=pytest.mark.slow),
        pytest.param(without("SuperResolution"), "'SuperResolution' is missing", marks=pytest.mark.slow),
        (lambda content: content.update(images_seen="many"), "'images_seen' is missing or not valid"),
        (lambda content: content.update(optimizer_states=[]), "'optimizer_states' is empty"),
        pytest.param(lambda content: content.update(callbacks={}), "'callbacks' is empty", marks=pytest.mark.slow),
        (set_weight(torch.full((64,), float("nan"))), "'network.0.bias' has values that are not finite"),
        (set_weight(torch.zeros(65)), r"'network.0.bias', the file has \(65,\)"),
        pytest.param(set_weight(torch.zeros(64, dtype=torch.int64)), "type torch.int64", marks=pytest.mark.slow),
    ],
)
def test_incomplete_checkpoints_are_not_resumed(run, capfd, change, message):
    last = run.checkpoints / "last.ckpt"
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, last)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    error = refused(capfd, "fit", "tiny.yaml", "--run", "one")
    assert str(last) in error
    assert message.replace("\\", "") in error
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_run_without_its_last_checkpoint_keeps_its_results(run, capfd):
    (run.checkpoints / "last.ckpt").unlink()
    assert "has best.ckpt, but not" in refused(capfd, "fit", "tiny.yaml", "--run", "one")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,images,name,value\n1,foo,a,1\n2,16,a,1\n", "line 2: not a row"),
        (b"step,image,name,value\n1,16,a,1\n2,16,a,1\n", "line 2: not a row"),
        (b"\xff\xfe\x00", "not a log"),
    ],
)
def test_damaged_log_is_named(run, capfd, content, message):
    run.log.write_bytes(content)
    error = refused(capfd, "fit", "tiny.yaml", "--run", "one")
    assert f"{run.log.name}" in error
    assert message in error


def test_record_without_configuration_is_passed_over(run, capfd):
    assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 0
    record = read_record(run.record)
    del record["config"]
    write_record(record, run.record)
    assert "no model.total_images in its config" in refused(capfd, "fit", "tiny.yaml", "--run", "one")


def test_changed_images_are_named(run, workdir, capfd):
    """The record has the hash of the images at the start, and that at the end."""
    path = sorted((workdir / "photos").iterdir())[1]
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    capfd.readouterr()
    assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 0
    assert "changed   photos: not the images with which the run began" in capfd.readouterr().out
    record = read_record(run.record)
    assert record["first_data"].keys() == {"photos"}
    assert record["first_data"]["photos"] != record["data"]["photos"]


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"network.0.bias": torch.full((64,), float("inf"))}),
            "'network.0.bias' has values that are not fin",
        ),
        (lambda w: w.update({"network.0.bias": torch.zeros(64, dtype=torch.int32)}), "has the type torch.int32"),
        (lambda w: w.update({"network.0.bias": torch.zeros(64, dtype=torch.complex64)}), "has the type torch.complex64"),
        (lambda w: w.update({"network.0.bias": torch.zeros(64).to_sparse()}), "'network.0.bias' is not a weight"),
        (lambda w: w.update({"network.0.bias": torch.zeros(64, device="meta")}), "'network.0.bias' is not a weight"),
        (lambda w: w.update({"network.0.bias": 3}), "'network.0.bias' is not a weight"),
        (lambda w: w.update({7: torch.zeros(3)}), "'7' is not a weight"),
    ],
)
def test_unusual_weights_are_refused(tmp_path, change, message):
    method = ESPCN()
    weights = method.state_dict()
    change(weights)
    torch.save({"state_dict": dict(weights)}, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=rf"w\.ckpt.*{message}"):
        load_weights(method, tmp_path / "w.ckpt")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth contains a list"):
        load_weights(method, tmp_path / "list.pth")
    save_file({"network.0.bias": torch.full((64,), float("nan"))}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors"):
        load_weights(method, tmp_path / "w.safetensors")


# Trainings that end before their budget


@pytest.mark.parametrize("words", [["--trainer.max_steps", "3"], ["--trainer.limit_val_batches", "0"]], ids=" ".join)
def test_weights_are_saved_without_a_validation(workdir, photos, words):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=["photographs/val"])
    options = ["--run", "one", "--val_every_images", "20", "--monitor", f"{photos.name}-holdout/psnr-y/crop3", *words]
    assert forked(main, ["fit", "tiny.yaml", *options]) == 0
    run = Run(workdir / "runs/tiny/one")
    last, best = (torch.load(run.checkpoints / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    assert last["images_seen"] == best["images_seen"] == (12 if "max_steps" in words[0] else 60)
    assert read_record(run.record)["metrics"]["photographs-val"]
    assert forked(main, ["predict", "tiny.yaml", "--run", "one", "--input", str(next(photos.iterdir()))]) == 0


def test_training_that_ends_early_says_so_and_continues(workdir, photos, capfd):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    assert forked(main, ["fit", "tiny.yaml", "--run", "one", "--trainer.max_steps", "3"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "max_steps" in line]
    assert lines[0] == "ended     by trainer.max_steps after 12 of 60 images"
    assert lines[1].endswith("fit tiny.yaml --trainer.max_steps 3 --run one")
    assert forked(main, ["fit", "tiny.yaml", "--run", "one", "--trainer.max_steps", "100"]) == 0
    assert "ended" not in capfd.readouterr().out
    assert Run(workdir / "runs/tiny/one").finished


def test_run_without_checkpoints_keeps_its_earlier_results(workdir, photos, capfd):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    run = Run(workdir / "runs/tiny/one")
    assert forked(main, ["fit", "tiny.yaml", "--run", "one", "--val_every_images", "20"]) == 0
    log = run.log.read_text()
    shutil.rmtree(run.checkpoints)
    run.record.unlink()
    capfd.readouterr()
    assert forked(main, ["fit", "tiny.yaml", "--run", "one", "--val_every_images", "20"]) == 0
    assert "so training starts from the beginning. The earlier results are in" in capfd.readouterr().out
    (earlier,) = run.folder.glob("earlier-*")
    assert (earlier / "metrics.csv").read_text() == log == run.log.read_text()
    assert len(list((earlier / "samples").iterdir())) == len(list(run.samples.iterdir())) > 0


def kill_loader_worker(argv):
    """Train; the loader process kills itself when it reads its fortieth image."""
    from datamodules import superresolution_datasets

    read, count, parent = superresolution_datasets.read_pixels, [0], os.getpid()

    def read_or_die(*args):
        count[0] += os.getpid() != parent
        if count[0] == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*args)

    superresolution_datasets.read_pixels = read_or_die
    return main(argv)


def test_killed_loader_worker_is_one_line_and_the_run_can_be_resumed(workdir, photos, capfd):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[], streaming=True, num_workers=1)
    assert forked(kill_loader_worker, ["fit", "tiny.yaml", "--run", "one"]) == 2
    output = capfd.readouterr()
    assert output.err.count("\n") == 1
    assert "DataLoader worker" in output.err
    assert "use a lower --data.num_workers" in output.err
    assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 0
    assert Run(workdir / "runs/tiny/one").finished


@pytest.mark.parametrize("name", ["samples", "checkpoints", "wandb", "config.yaml", "metrics.csv", ".lock"])
def test_outputs_that_cannot_be_written_are_named_before_training(workdir, photos, capfd, name):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    path = workdir / "runs/tiny/one" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if "." in name else path.touch()
    assert str(path.relative_to(workdir)) in refused(capfd, "fit", "tiny.yaml", "--run", "one")


def fit_with_undefined_metric(argv):
    from callbacks.metrics.psnr_ssim import PSNRSSIM

    PSNRSSIM.update = lambda self, outputs, i: dict.fromkeys(self.protocols, float("nan"))
    return main(argv)


def test_metric_that_is_not_a_number_keeps_the_newest_weights(workdir, photos, capfd):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    assert forked(fit_with_undefined_metric, ["fit", "tiny.yaml", "--run", "one"]) == 0
    run = Run(workdir / "runs/tiny/one")
    assert torch.load(run.best_checkpoint, weights_only=True)["images_seen"] == 60
    assert "is not a number after 20 images" in capfd.readouterr().out
    assert read_record(run.record)["best"]["value"] in ("-inf", "nan")


def test_lower_values_can_be_better(workdir, photos):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    assert forked(main, ["fit", "tiny.yaml", "--run", "one", "--monitor_mode", "min"]) == 0
    run = Run(workdir / "runs/tiny/one")
    rows = [row for row in read_metrics_csv(run.log) if row["name"].endswith("psnr-y/crop3")]
    worst = min(rows, key=lambda row: float(row["value"]))
    record = read_record(run.record)
    assert record["best_images"] == int(worst["images"])
    assert record["best"]["value"] == pytest.approx(float(worst["value"]))


def fit_in_a_terminal(argv):
    """Run a command with the default response to SIGHUP; the tests may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    return main(argv)


def test_hangup_saves_as_sigterm_does(workdir, photos, monkeypatch, capfd):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGHUP@24@0")
    assert forked(fit_in_a_terminal, ["fit", "tiny.yaml", "--run", "one"]) == 85
    assert "Stopped and saved" in capfd.readouterr().out
    last = Run(workdir / "runs/tiny/one").checkpoints / "last.ckpt"
    assert torch.load(last, weights_only=True)["images_seen"] == 24


def fit_after_nohup(argv):
    """Run a command with SIGHUP ignored, as nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return main(argv)


def test_hangup_is_ignored_under_nohup(workdir, photos, monkeypatch):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGHUP@24@0")
    assert forked(fit_after_nohup, ["fit", "tiny.yaml", "--run", "one"]) == 0


def fit_with_damage(argv):
    """Run a command whose training images are damaged after the survey, at the first reading."""
    from datamodules import superresolution_datasets

    read, count = superresolution_datasets.read_pixels, [0]

    def failing(path, *args):
        count[0] += 1
        if count[0] == 30:
            raise UserError(f"{path}: truncated or damaged")
        return read(path, *args)

    superresolution_datasets.read_pixels = failing
    return main(argv)


def test_unreadable_training_data_save_the_run(workdir, photos, capfd):
    """The resumed run then equals the uninterrupted one, bit for bit."""
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[], streaming=True)
    assert forked(main, ["fit", "tiny.yaml", "--run", "whole"]) == 0
    capfd.readouterr()
    assert forked(fit_with_damage, ["fit", "tiny.yaml", "--run", "one"]) == 2
    output = capfd.readouterr()
    assert "truncated or damaged" in output.err
    assert "The training data could not be read. Saved. Resume with" in output.out
    whole, one = (Run(workdir / "runs/tiny" / name) for name in ("whole", "one"))
    assert 0 < torch.load(one.checkpoints / "last.ckpt", weights_only=True)["images_seen"] < 60
    assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 0
    left, right = (torch.load(run.checkpoints / "last.ckpt", weights_only=True) for run in (whole, one))
    assert all((left["state_dict"][name] == value).all() for name, value in right["state_dict"].items())
    assert one.log.read_text() == whole.log.read_text()


def test_refused_continuation_leaves_the_finished_run_as_it_is(run, workdir, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(workdir))
    assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 0
    before = {path.name: path.read_bytes() for path in (run.record, run.config, run.log)}
    error = refused(capfd, "fit", "tiny.yaml", "--run", "one", "--model.total_images", "80", "--wandb", "online")
    assert "no account" in error
    assert {path.name: path.read_bytes() for path in (run.record, run.config, run.log)} == before


def fit_with_a_signal_before_the_first_step(argv):
    from callbacks.run.data_report import PrintDataReport

    def on_sanity_check_start(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    PrintDataReport.on_validation_start = on_sanity_check_start
    return main(argv)


def test_signal_before_the_first_step_ends_with_the_status_of_a_stopped_run(workdir, photos, capfd):
    write_recipe(workdir / "tiny.yaml", photos, MODEL, test=[])
    assert forked(fit_with_a_signal_before_the_first_step, ["fit", "tiny.yaml", "--run", "one"]) == 85
    assert "Stopped before the first step. Resume with: " in capfd.readouterr().out
    assert forked(main, ["fit", "tiny.yaml", "--run", "one"]) == 0
