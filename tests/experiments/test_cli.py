"""End-to-end tests of the darkroom command: fast help, one-line errors, runs and weights."""

import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from callbacks.run.record_file import write_record
from experiments import ROOT
from experiments.cli.errors import format_cli_error, one_line
from experiments.cli.main import main
from experiments.results.tables import cells
from experiments.run.recipes import find_recipe, methods, recipes
from tests.helpers.subprocess_helpers import forked
from tests.tasks.superresolution import write_recipe

DEMO = "espcn/demo"


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["list"], ["list", "espcn"], ["data", "list"], ["reproduce", "espcn", "--json"]]
)
def test_commands_without_a_network_do_not_import_torch(argv):
    code = (
        "import sys; from experiments.cli.main import main\n"
        f"status = main({argv!r})\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_list_has_a_line_for_each_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert list(lines) == methods()
    for method, line in lines.items():
        states = [cell["state"] for cell in cells(method, check=False)]
        for count, state in re.findall(r"(\d+) (reproduced|measured|short|not comparable|not run)", line):
            assert int(count) == sum(text.startswith(state) for text in states)


def test_list_describes_the_recipes_of_a_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["list", "espcn"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for recipe in recipes():
        if recipe.name.startswith("espcn/"):
            start = next(i for i, line in enumerate(lines) if line.partition("  ")[0] == recipe.name)
            assert lines[start + 1 : start + 1 + len(recipe.header)] == recipe.header
            assert recipe.content["data"]["init_args"]["train"] in lines[start + 1 + len(recipe.header)]
    assert main(["list", "espn"]) == 2
    assert "did you mean 'espcn'?" in capsys.readouterr().err


def test_python_m_experiments_is_the_same_command(capsys):
    result = subprocess.run([sys.executable, "-m", "experiments", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert main(["--help"]) == 0
    assert result.returncode == 0
    assert result.stdout.startswith("usage: darkroom COMMAND")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fti", DEMO], "no command 'fti'; did you mean 'fit'?"),
        (["fit"], "fit: the recipe comes first"),
        (["fit", "espnc"], "no recipe 'espnc'; did you mean 'espcn'?"),
        (["fit", "espcn/t91_x"], "no recipe 'espcn/t91_x'; did you mean 'espcn/t91_x"),
        (["fit", "nowhere.yaml"], "no recipe file nowhere.yaml"),
        (["fit", DEMO, "--model.activatoin", "relu"], "unknown key 'model.activatoin' of modules.espcn.ESPCN; did you mean 'model.activation'?"),
        (["fit", DEMO, "--model.activation", "rleu"], "model.activation: 'rleu' is not one of tanh, relu; did you mean 'relu'?"),
        (["fit", DEMO, "--modle.activation", "relu"], "unknown argument --modle.activation; did you mean '--model.activation'?"),
        (["fit", DEMO, "--trainer.max_epoch", "3"], "unknown argument --trainer.max_epoch; did you mean '--trainer.max_epochs'?"),
        (["fit", DEMO, "--data.batch_size", "three"], "data.batch_size: 'three' is not of type int"),
        (["fit", DEMO, "--trainer.precision", "fp17"], "trainer.precision: 'fp17' is not one of"),
        (["fit", DEMO, "--model", "modules.espcn.ESPCM"], "model: no class modules.espcn.ESPCM; did you mean 'modules.espcn.ESPCN'?"),
        (["fit", DEMO, "--model.scale", "4", "--data.scale=3"], "model.scale: 4 differs from data.scale: 3"),
        (["fit", DEMO, "--model.total_images", "0"], "model.total_images: 0"),
        (["fit", "espcn/t91_x3"], "darkroom: t91"),
        (["fit", DEMO, "--monitor", "nothing"], "monitor: no metric 'nothing' is logged"),
        (["fit", DEMO, "--trainer.gradient_clip_val", "1"], "--trainer.gradient_clip_val: "),
        (["fit", DEMO, "--trainer.accelerator", "gpu"], "No supported gpu backend found"),
        (["fit", DEMO, "--wandb", "online"], "--wandb online: "),
        (["test", "espcn/t91_x3_relu", "--ckpt", "none.ckpt"], "--ckpt: no file none.ckpt"),
        (["test", "espcn/imagenet_x3"], "no weights for espcn/imagenet_x3"),
        (["fit", "bicubic/x3"], "Bicubic has nothing to train"),
        (["data", "get", "set55"], "'set55'; did you mean 'set5'?"),
        (["data", "get", "t91"], "darkroom: t91"),
        (["data", "gte", "t91"], "data: argument action: invalid choice: 'gte'"),
        (["reproduce", "espnc"], "'espnc'"),
        (["bench", "espnc"], "no recipe 'espnc'"),
        (["bench", "bicubic/x3"], "bicubic/x3 has nothing to train"),
        (["bench", DEMO, "--pairs", "0"], "bench: --pairs"),
        (["bench", DEMO, "--piars", "2"], "unknown argument --piars; did you mean '--pairs'?"),
        (["reproduce", "espcn", "--seeds", "3"], "--seeds"),
        (["predict", "espcn/t91_x3"], "predict: --input is required"),
        (["fit", DEMO, "--data.num_workers", "-1"], "data.num_workers: -1"),
        (["fit", DEMO, "--data.batch_size", "0"], "data.batch_size: 0"),
        (["fit", DEMO, "--data.val_every_nth", "3"], "data.val and data.val_every_nth"),
        (["fit", DEMO, "--data.seed", "3"], "--data.seed: set by Darkroom. Use --seed_everything"),
        (["fit", DEMO, "--data.test", ""], "--data.test is empty"),
        (["fit", DEMO, "--data.test", "['']"], "data.test: a name is empty"),
        (["fit", DEMO, "--data.train="], "--data.train is empty"),
        (["fit", DEMO, "--data.num_workers", "100000"], "data.num_workers: 100000 must be from 0"),
        (["fit", DEMO, "--trainer.overfit_batches", "1"], "trainer.overfit_batches: "),
        (["fit", DEMO, "--trainer.max_epochs", "0"], "trainer.max_epochs: 0 is not supported. Use model.total_images"),
        (["fit", DEMO, "--trainer.min_steps", "9"], "trainer.min_steps: 9 is not supported"),
        (["fit", DEMO, "--trainer.devices", "100000"], "trainer.devices: 100000 processes"),
        (["fit", DEMO, "--trainer.precision", "16-true"], "trainer.precision: 16-true requires a GPU"),
        (["fit", DEMO, "--model.learning_rate", "1e999"], "model.learning_rate: inf is not a finite number"),
        (["fit", DEMO, "--data.batch_size", "1000000000"], "data.batch_size: 1000000000 must be from 1"),
        (["fit", DEMO, "--data.border_overhang", "99"], "data.border_overhang: 99"),
        (["fit", DEMO, "--seed_everything", "true"], "seed_everything: true is not a number"),
        (["fit", DEMO, "--accumulate_grad_batches", "0"], "accumulate_grad_batches: 0 must be greater than 0"),
        (["bench", DEMO, "--steps", "1000000000"], "--steps from 1 to"),
        (["manifold", "vae/demo", "--grid-size", "1000000"], "--grid-size 1000000"),
        (["interpolate", "dcgan/mnist", "--indices", "1", "2", "--steps", "1000000"], "--steps must be from 1"),
        (["fit", DEMO, "--data.train", "./nowhere"], "./nowhere"),
        (["fit", DEMO, "--run", "a/b"], "--run a/b: "),
        (["fit", DEMO, "--run", ".."], "--run ..: "),
        (["fit", DEMO, "--val_every_images", "0"], "val_every_images: 0 must be greater than 0"),
        (["fit", DEMO, "--seed_everything", "-1"], "seed_everything: -1 is not between 0 and 4294967295"),
        (["reproduce", "espcn", "--run", "--seeds", "0"], "--seeds 0"),
        (["fit", DEMO, "--trainer.devices", "two"], "devices"),
        (["fit", DEMO, "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "trainer.strategy: DDPStrategy"),
        (["fit", DEMO, "--trainer.val_check_interval", "5"], "--trainer.val_check_interval: set by Darkroom. Use --val_every_images"),
        (["test", "espcn/t91_x3_relu", "--record", "/nowhere/r.json"], "--record: cannot write to /nowhere"),
    ],
)  # fmt: skip
def test_invalid_command_prints_one_line(workdir, monkeypatch, capfd, argv, message):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(workdir))
    status = forked(main, argv)
    error = capfd.readouterr().err
    assert status == 2
    lines = [line for line in error.splitlines() if line.startswith("darkroom: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


def test_unknown_key_in_a_recipe_file_is_named(workdir, capfd):
    content = find_recipe(DEMO).content
    content["model"]["init_args"]["scael"] = 3
    (workdir / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert forked(main, ["fit", "recipe.yaml"]) == 2
    assert "unknown key 'model.scael' of modules.espcn.ESPCN; did you mean 'model.scale'?" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "model: modules.espcn.ESPCN\n", "model: [\n", "- 1\n"])
def test_file_that_is_not_a_recipe_is_refused(workdir, capfd, text):
    (workdir / "recipe.yaml").write_text(text)
    assert forked(main, ["fit", "recipe.yaml"]) == 2
    assert capfd.readouterr().err.startswith("darkroom: recipe.yaml: ")


def test_refused_run_leaves_no_folder(workdir):
    assert forked(main, ["fit", DEMO, "--data.train", "./nowhere"]) == 2
    assert not list((workdir / "runs").rglob("*.*"))


def test_one_line_strips_the_traceback_of_a_loader_worker():
    wrapped = "Caught InvalidImage in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\ndatamodules.io.image_io.InvalidImage: a.png: empty file"
    assert one_line(wrapped) == "a.png: empty file"


def test_unrecognized_parser_error_is_joined_to_one_line():
    assert format_cli_error("Something\n  else:\n    - broke") == "Something else: - broke"


@pytest.fixture
def recipe(workdir, photos):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60, "warmup": 8}}
    return write_recipe(workdir / "tiny.yaml", photos, model, test=["photographs/test"])


def test_fit_writes_run_folder(workdir, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    folder = workdir / "runs/tiny/one"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        ".lock",
        "config.yaml",
        "metrics.csv",
        "record.json",
        "test_images.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        *(f"samples/{images:09d}.png" for images in (20, 40, 60)),
    }
    record = json.loads((folder / "record.json").read_text())
    assert record["images_seen"] == 60
    assert record["seed"] == 0
    assert record["config"]["model"]["init_args"]["activation"] == "tanh"
    assert record["metrics"]["photographs-test"]["psnr-y/crop3"]["images"].keys() == {"astronaut", "chelsea", "china"}
    assert record["code"].keys() == {"training", "metrics"}
    assert record["content"]["data"]["init_args"]["scale"] == 3
    assert record["seconds"] > 0
    assert record["peak_memory_mib"] > 100


def test_fit_with_the_config_of_a_run_repeats_the_run(workdir, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--model.activation", "relu", "--data.test", "[]"]) == 0
    assert forked(main, ["fit", str(workdir / "runs/tiny/one/config.yaml"), "--run", "two"]) == 0
    one, two = (
        torch.load(workdir / "runs" / path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for path in ("tiny/one", "tiny/two")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_uses_overrides_of_the_command_line(workdir, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]"]) == 0
    argv = [
        "fit",
        str(recipe),
        "--run",
        "one",
        "--data.test",
        "[]",
        "--model.total_images",
        "80",
        "--model.learning_rate",
        "0.001",
    ]
    assert forked(main, argv) == 0
    config = yaml.safe_load((workdir / "runs/tiny/one/config.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == 0.001
    rows = (workdir / "runs/tiny/one/metrics.csv").read_text().splitlines()
    rates = {int(row.split(",")[1]): float(row.split(",")[3]) for row in rows if "learning_rate" in row}
    assert max(rates) == 80
    assert rates[64] <= 0.001
    assert min(rates) == 4  # values logged before the checkpoint are kept


def test_tensorboard_has_the_keys_of_model_and_data(workdir, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]", "--log", "tensorboard"]) == 0
    folder = workdir / "runs/tiny/one/tensorboard"
    keys = yaml.safe_load((folder / "hparams.yaml").read_text())
    config = yaml.safe_load((workdir / "runs/tiny/one/config.yaml").read_text())
    for section in ("model", "data"):
        assert config[section]["init_args"].items() <= keys[section]["init_args"].items()
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.activation", "relu"], "run 'one' was started with model.activation tanh, not relu"),
        (["--data.batch_size", "2"], "run 'one' was started with data.batch_size 4, not 2"),
        (["--seed_everything", "1"], "was started with seed_everything 0, not 1"),
        (["--monitor_mode", "min"], "was started with monitor_mode max, not min"),
    ],
)
def test_resume_refuses_another_model_or_data(workdir, recipe, capfd, overrides, message):
    argv = ["fit", str(recipe), "--run", "one", "--data.test", "[]"]
    assert forked(main, argv) == 0
    assert forked(main, [*argv, "--model.total_images", "80", *overrides]) == 2
    assert message in capfd.readouterr().err


def test_damaged_test_image_is_refused_before_training(workdir, recipe, photos, capfd):
    (workdir / "images").mkdir()
    (workdir / "images/cut.png").write_bytes(sorted(photos.glob("*.png"))[0].read_bytes()[:2000])
    assert forked(main, ["fit", str(recipe), "--data.test", "[images]"]) == 2
    assert "images/cut.png" in capfd.readouterr().err
    assert not list((workdir / "runs").rglob("*.*"))


def test_missing_test_set_does_not_prevent_training(workdir, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[set5]"]) == 0
    assert "not evaluated after training: set5" in capfd.readouterr().out
    assert (workdir / "runs/tiny/one/record.json").exists()


def test_wandb_offline_needs_no_account(workdir, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]", "--wandb", "offline"]) == 0
    assert list((workdir / "runs/tiny/one").glob("wandb/offline-run-*"))


def test_weights_of_another_shape_are_refused(workdir, capfd):
    described = ROOT / "experiments/methods/espcn/weights/t91_x3.safetensors"
    save_file(load_file(described), "plain.safetensors")
    argv = ["predict", "espcn/t91_x4", "--input", "x.png", "--ckpt"]
    assert forked(main, [*argv, "plain.safetensors"]) == 2
    error = capfd.readouterr().err
    for part in ("plain.safetensors", "'network.4.bias'", "(9,)", "(16,)"):
        assert part in error
    assert forked(main, [*argv, str(described)]) == 2
    assert "was trained with model.scale 3, but the model has 4" in capfd.readouterr().err


@pytest.mark.parametrize("content", [pickle.dumps(print), pickle.dumps({}), b"hi\n", b"", b"e5+", b"J&\n", b"PK\x03\x04"])
def test_file_that_is_not_a_checkpoint_is_refused_and_not_executed(workdir, capfd, content):
    (workdir / "evil.ckpt").write_bytes(content)
    assert forked(main, ["test", "espcn/t91_x3", "--ckpt", "evil.ckpt"]) == 2
    assert capfd.readouterr().err.startswith("darkroom: evil.ckpt cannot be read as weights")


def test_resume_refuses_a_damaged_checkpoint(workdir, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    last = workdir / "runs/tiny/one/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    capfd.readouterr()
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2
    assert "last.ckpt cannot be read as weights" in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["checkpoints/last.ckpt", "config.yaml"])
def test_results_of_a_damaged_run_are_kept(workdir, recipe, capfd, lost):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    folder = workdir / "runs/tiny/one"
    (folder / lost).unlink()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert ("config.yaml cannot be read" if lost == "config.yaml" else f"{lost}, so it cannot be resumed") in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("missing", ["metrics", "record"])
def test_trained_run_without_metrics_is_evaluated_on_resume(workdir, recipe, missing):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    folder = workdir / "runs/tiny/one"
    record, last = json.loads((folder / "record.json").read_text()), (folder / "checkpoints/last.ckpt").read_bytes()
    log = (folder / "metrics.csv").read_text()
    if missing == "metrics":
        write_record({key: value for key, value in record.items() if key != "metrics"}, folder / "record.json")
    else:
        (folder / "record.json").unlink()
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    new_record = json.loads((folder / "record.json").read_text())
    for key in ("metrics", "images_seen", "weights", "code", "best_images"):
        assert new_record[key] == record[key], key
    assert (folder / "checkpoints/last.ckpt").read_bytes() == last
    assert (folder / "metrics.csv").read_text() == log
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        (["--model.activation", "relu"], "model.activation relu, not tanh"),
        (["--model.total_images", "48"], "model.total_images 48, not 60"),
        (["--data.val_every_nth", "3"], "data.val_every_nth 3, not 4"),
    ],
    ids=" ".join,
)
def test_run_with_other_settings_is_used_only_by_its_name(workdir, recipe, capfd, setting, difference):
    assert forked(main, ["fit", str(recipe), "--run", "other", *setting, "--data.test", "[]"]) == 0
    assert forked(main, ["validate", str(recipe)]) == 2
    output = capfd.readouterr()
    assert "no weights for tiny" in output.err
    assert f"runs/tiny/other, which has {difference}. To use it, add --run other" in " ".join(output.out.split())
    for words in (setting, ["--run", "other"]):
        assert forked(main, ["validate", str(recipe), *words]) == 0


def test_weights_of_the_newest_finished_run_are_used_first(workdir, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    capfd.readouterr()
    assert forked(main, ["test", str(recipe)]) == 0
    assert "runs/tiny/one/checkpoints/best.ckpt" in capfd.readouterr().out.replace("\n", "")


@pytest.mark.slow
def test_bench_prints_all_results(workdir, recipe, capfd):
    assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "2", "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert results["pairs"] == 6
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", "share_of_peak", "srcnn_to_ours"):
        assert results[name] > 0


def test_bench_counts_flops_of_alternating_networks(workdir, capfd):
    options = ["--pairs", "6", "--steps", "1", "--json"]
    assert forked(main, ["bench", "gan/demo", *options]) == 0
    results = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", "share_of_peak", "samples_per_second"):
        assert results[name] > 0
    # Multiply-adds of a step, of 2 operations each, for a batch size of 100:
    # - G, forward and backward, without the gradient of its input;
    # - D, forward and backward on real images and on fakes, without the gradient of its input;
    # - D in the update of G, forward and backward on fakes, without the gradients of its weights.
    generator = 400 * (100 + 400 + 784)
    discriminator = 400 * (784 + 80) + 80
    first_layers = 400 * 100, 400 * 784
    expected = 2 * 100 * (3 * generator - first_layers[0] + 2 * (3 * discriminator - first_layers[1]) + 2 * discriminator)
    step = 100 / results["images_per_second"]
    assert results["gflops"] * step * 1e9 == pytest.approx(expected, rel=1e-3)
