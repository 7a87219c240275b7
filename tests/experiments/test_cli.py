"""The darkroom command as a user meets it: quick answers, one-line refusals, runs, predictions."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from callbacks.run.record_file import write_record
from experiments import ROOT
from experiments.cli.errors import explain, one_line
from experiments.cli.main import main
from experiments.run.recipes import find_recipe
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import write_recipe

DEMO = "espcn/demo"


def darkroom(*words, status=0, capsys=None):
    assert main(list(words)) == status
    return capsys.readouterr() if capsys else None


@pytest.mark.parametrize("words", [[], ["--help"], ["list"], ["data", "list"], ["reproduce", "espcn", "--json"]])
def test_quick_answers_import_nothing_heavy(words):
    code = (
        "import sys; from experiments.cli.main import main\n"
        f"status = main({words!r})\n"
        "heavy = {'torch', 'lightning', 'torchvision', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_python_m_experiments_is_the_same_command(capsys):
    told = subprocess.run([sys.executable, "-m", "experiments", "--help"], cwd=ROOT, capture_output=True, text=True)
    darkroom("--help", capsys=capsys)
    assert told.returncode == 0
    assert told.stdout.startswith("usage: darkroom COMMAND")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fti", DEMO], "no command 'fti'; did you mean 'fit'?"),
        (["fit"], "fit needs a recipe first"),
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
        (["fit", DEMO, "--model.scale", "4"], "model.scale is 4, but data.scale is 3"),
        (["fit", DEMO, "--model.total_images", "0"], "model.total_images: 0 is not a budget"),
        (["fit", "espcn/t91_x3"], "t91 is not here: by hand"),
        (["fit", DEMO, "--monitor", "nothing"], "monitor: no figure 'nothing' is logged; these are: "),
        (["fit", DEMO, "--trainer.gradient_clip_val", "1"], "is set by Darkroom; take a phase's clip, in the method's file"),
        (["fit", DEMO, "--trainer.accelerator", "gpu"], "No supported gpu backend found"),
        (["fit", DEMO, "--wandb", "online"], "--wandb online needs an account"),
        (["test", "espcn/t91_x3_relu", "--ckpt", "none.ckpt"], "--ckpt: no file none.ckpt"),
        (["test", DEMO], "no weights for espcn/demo yet: darkroom fit espcn/demo"),
        (["fit", "bicubic/x3"], "Bicubic has nothing to train"),
        (["data", "get", "set55"], "no data set 'set55'; did you mean 'set5'?"),
        (["data", "get", "t91"], "t91 cannot be downloaded: by hand"),
        (["data", "gte", "t91"], "data: argument action: invalid choice: 'gte'"),
        (["reproduce", "espnc"], "no tables for 'espnc'"),
        (["bench", "espnc"], "no recipe 'espnc'"),
        (["bench", "bicubic/x3"], "bicubic/x3 has nothing to train"),
        (["bench", DEMO, "--pairs", "0"], "--pairs is at least 6"),
        (["bench", DEMO, "--piars", "2"], "unknown argument --piars; did you mean '--pairs'?"),
        (["reproduce", "espcn", "--seeds", "3"], "give --run too"),
        (["predict", "espcn/t91_x3"], "predict needs --input"),
        (["fit", DEMO, "--data.num_workers", "-1"], "data.num_workers: -1 is not a number of processes"),
        (["fit", DEMO, "--data.batch_size", "0"], "data.batch_size: 0 is not a batch"),
        (["fit", DEMO, "--data.val_every_nth", "3"], "data.val and data.val_every_nth both name what chooses the checkpoint"),
        (["fit", DEMO, "--data.seed", "3"], "--data.seed is set by Darkroom; take --seed_everything"),
        (["fit", DEMO, "--data.test", "set5"], "data.test: 'set5' is not a list; write [set5]"),
        (["fit", DEMO, "--data.train", "./nowhere"], "no folder ./nowhere"),
        (["fit", DEMO, "--run", "a/b"], "--run a/b: a name, not a path"),
        (["fit", DEMO, "--run", ".."], "--run ..: a name, not a path"),
        (["fit", DEMO, "--val_every_images", "0"], "val_every_images: 0 must be greater than 0"),
        (["fit", DEMO, "--seed_everything", "-1"], "seed_everything: -1 is not between 0 and 4294967295"),
        (["reproduce", "espcn", "--run", "--seeds", "0"], "reproduce: --seeds 0: at least 1"),
        (["fit", DEMO, "--trainer.devices", "two"], "devices"),
        (["fit", DEMO, "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "DDPStrategy is not supported; take 'ddp' or 'fsdp2'"),
        (["fit", DEMO, "--trainer.val_check_interval", "5"], "--trainer.val_check_interval is set by Darkroom; take --val_every_images"),
        (["test", "espcn/t91_x3_relu", "--record", "/nowhere/r.json"], "--record: cannot write to /nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_one_line(workplace, monkeypatch, capfd, words, says):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(workplace))
    status = forked(main, words)
    error = capfd.readouterr().err
    assert status == 2
    lines = [line for line in error.splitlines() if line.startswith("darkroom: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in error


def test_an_unknown_key_in_a_file_is_named_too(workplace, capfd):
    content = find_recipe(DEMO).content
    content["model"]["init_args"]["scael"] = 3
    (workplace / "mine.yaml").write_text(yaml.safe_dump(content))
    assert forked(main, ["fit", "mine.yaml"]) == 2
    assert "unknown key 'model.scael' of modules.espcn.ESPCN; did you mean 'model.scale'?" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "model: modules.espcn.ESPCN\n", "model: [\n", "- 1\n"])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(workplace, capfd, text):
    (workplace / "mine.yaml").write_text(text)
    assert forked(main, ["fit", "mine.yaml"]) == 2
    assert capfd.readouterr().err.startswith("darkroom: mine.yaml: ")


def test_a_refused_run_leaves_no_folder(workplace):
    assert forked(main, ["fit", DEMO, "--data.train", "./nowhere"]) == 2
    assert not list((workplace / "runs").rglob("*.*"))


def test_a_message_from_a_loader_worker_is_one_line():
    wrapped = "Caught BadImage in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\ndatamodules.images.BadImage: a.png: empty file"
    assert one_line(wrapped) == "a.png: empty file"


def test_what_is_not_understood_is_still_one_line():
    assert explain("Something\n  else:\n    - broke") == "Something else: - broke"


@pytest.fixture
def recipe(workplace, photos):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60, "warmup": 8}}
    return write_recipe(workplace / "tiny.yaml", photos, model, test=["photographs/test"])


def test_a_run_leaves_its_folder(workplace, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    folder = workplace / "runs/tiny/one"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {
        ".lock",
        "config.yaml",
        "metrics.csv",
        "record.json",
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


def test_a_runs_configuration_is_a_recipe_for_the_same_run(workplace, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--model.activation", "relu", "--data.test", "[]"]) == 0
    assert forked(main, ["fit", str(workplace / "runs/tiny/one/config.yaml"), "--run", "two"]) == 0
    one, two = (
        torch.load(workplace / "runs" / path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for path in ("tiny/one", "config/two")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_typed_wins_over_the_checkpoint(workplace, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]"]) == 0
    words = [
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
    assert forked(main, words) == 0
    config = yaml.safe_load((workplace / "runs/tiny/one/config.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == 0.001
    rows = (workplace / "runs/tiny/one/metrics.csv").read_text().splitlines()
    rates = {int(row.split(",")[1]): float(row.split(",")[3]) for row in rows if "learning_rate" in row}
    assert max(rates) == 80
    assert rates[64] <= 0.001
    assert min(rates) == 4  # what was logged before the checkpoint stays


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model.activation", "relu"], "run 'one' began with model.activation tanh, not relu"),
        (["--data.batch_size", "2"], "run 'one' began with data.batch_size 4, not 2"),
        (["--seed_everything", "1"], "data.seed: 1, but the checkpoint's run had 0"),
    ],
)
def test_another_network_or_data_is_another_run(workplace, recipe, capfd, change, says):
    words = ["fit", str(recipe), "--run", "one", "--data.test", "[]"]
    assert forked(main, words) == 0
    assert forked(main, [*words, "--model.total_images", "80", *change]) == 2
    assert says in capfd.readouterr().err


def test_damaged_test_pictures_stop_the_run_before_it_trains(workplace, recipe, photos, capfd):
    (workplace / "mine").mkdir()
    (workplace / "mine/cut.png").write_bytes(sorted(photos.glob("*.png"))[0].read_bytes()[:2000])
    assert forked(main, ["fit", str(recipe), "--data.test", "[mine]"]) == 2
    output = capfd.readouterr()
    assert "mine/cut.png: cut short" in output.err
    assert "images" not in output.out


def test_absent_test_sets_do_not_keep_from_training(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[set5]"]) == 0
    assert "not measured after training: set5 is not here" in capfd.readouterr().out
    assert (workplace / "runs/tiny/one/record.json").exists()


def test_wandb_offline_needs_no_account(workplace, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]", "--wandb", "offline"]) == 0
    assert list((workplace / "runs/tiny/one").glob("wandb/offline-run-*"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photos):
    """The modes and sizes that users bring."""
    folder = tmp_path_factory.mktemp("mine")
    rgb = Image.open(sorted(photos.glob("astronaut*.png"))[0]).convert("RGB")
    rgb.save(folder / "colour.jpg")
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("RGBA").save(folder / "see_through.png")
    rgb.convert("CMYK").save(folder / "print.tif")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.crop((0, 0, 1, 7)).save(folder / "tiny.png")
    deep = np.array(rgb.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    (folder / "album").mkdir()
    rgb.crop((0, 0, 31, 40)).save(folder / "album" / "odd.png")
    return folder


def test_predict_enlarges_whatever_users_bring(workplace, pictures, capfd):
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(pictures), "--output", "out"]) == 0
    modes = {
        "colour": "RGB",
        "grey": "L",
        "see_through": "RGBA",
        "print": "RGB",
        "deep": "L",
        "tiny": "RGB",
        "album/odd": "RGB",
    }
    for path in pictures.rglob("*.*"):
        name = path.relative_to(pictures).with_suffix("").as_posix()
        original, enlarged = Image.open(path), Image.open(workplace / "out" / f"{name}.png")
        assert enlarged.size == (3 * original.width, 3 * original.height), name
        assert enlarged.mode == modes.get(name, enlarged.mode), name
        small = np.array(enlarged.convert("RGB").resize(original.size, Image.Resampling.BOX)).astype(float)
        before = np.array(Image.open(path).convert("RGB")).astype(float) if name != "deep" else None
        if before is not None and name != "tiny":
            assert np.abs(small - before).mean() < 10, name  # colours are where they were
    assert "astronaut" not in capfd.readouterr().err


def test_predict_is_the_network_and_bicubic_chroma(workplace, photos):
    from safetensors.torch import load_file

    from datamodules.transforms.color import rgb_to_ycbcr, ycbcr_to_rgb
    from datamodules.transforms.resize import imresize
    from modules.espcn import ESPCN

    path = sorted(photos.glob("chelsea*.png"))[0]
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(path), "--output", "out"]) == 0
    network = ESPCN(3)
    network.load_state_dict(load_file(ROOT / "experiments/methods/espcn/weights/t91_x3.safetensors"))
    rgb = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
    ycc = rgb_to_ycbcr(rgb)
    with torch.no_grad():
        luma = network(ycc[None, :1])[0]
    expected = ycbcr_to_rgb(torch.cat([luma, imresize(ycc[1:], (luma.shape[1], luma.shape[2]))]))
    written = torch.from_numpy(np.array(Image.open(workplace / "out" / path.name))).permute(2, 0, 1)
    assert ((expected * 255).round().clamp(0, 255) - written).abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "cut.png"),
        (lambda folder: None, "no pictures in this folder"),
    ],
)
def test_predict_names_what_it_cannot_read(workplace, capfd, make, says):
    (workplace / "in").mkdir()
    make(workplace / "in")
    assert forked(main, ["predict", "espcn/t91_x3", "--input", "in"]) == 2
    assert says in capfd.readouterr().err


def test_predict_does_not_write_over_its_inputs(workplace, photos, capfd):
    source = sorted(photos.glob("*.png"))[0]
    (workplace / "in").mkdir()
    Image.open(source).convert("RGB").save(workplace / "in/a.jpg")
    (workplace / "in/a.png").write_bytes(source.read_bytes())
    assert forked(main, ["predict", "espcn/t91_x3", "--input", "in", "--output", "in"]) == 2
    assert (workplace / "in/a.png").read_bytes() == source.read_bytes()
    assert "would be overwritten" in capfd.readouterr().err


def test_weights_that_do_not_fit_are_named(workplace, capfd):
    words = [
        "predict",
        "espcn/t91_x4",
        "--input",
        "x.png",
        "--ckpt",
        str(ROOT / "experiments/methods/espcn/weights/t91_x3.safetensors"),
    ]
    assert forked(main, words) == 2
    assert "does not fit this model: 'network.4.bias' is (9,) there, the model needs (16,)" in capfd.readouterr().err


@pytest.mark.parametrize("content", [pickle.dumps(print), pickle.dumps({}), b"hi\n", b"", b"e5+", b"J&\n", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(workplace, capfd, content):
    (workplace / "evil.ckpt").write_bytes(content)
    assert forked(main, ["test", "espcn/t91_x3", "--ckpt", "evil.ckpt"]) == 2
    assert capfd.readouterr().err.startswith("darkroom: evil.ckpt cannot be read as weights: it is damaged, or no checkpoint")


def test_a_run_whose_checkpoint_is_damaged_says_so(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    last = workplace / "runs/tiny/one/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    capfd.readouterr()
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2
    assert "last.ckpt cannot be read as weights: it is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["metrics", "record"])
def test_a_run_that_ended_before_it_was_measured_goes_on_with_that(workplace, recipe, lost):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    folder = workplace / "runs/tiny/one"
    record, last = json.loads((folder / "record.json").read_text()), (folder / "checkpoints/last.ckpt").read_bytes()
    log = (folder / "metrics.csv").read_text()
    if lost == "metrics":
        write_record({key: value for key, value in record.items() if key != "metrics"}, folder / "record.json")
    else:
        (folder / "record.json").unlink()
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    again = json.loads((folder / "record.json").read_text())
    for key in ("metrics", "images_seen", "weights", "code", "best_images"):
        assert again[key] == record[key], key
    assert (folder / "checkpoints/last.ckpt").read_bytes() == last
    assert (folder / "metrics.csv").read_text() == log
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 2


def test_a_run_of_another_network_is_not_taken_for_its_weights(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "relu", "--model.activation", "relu", "--data.test", "[]"]) == 0
    assert forked(main, ["validate", str(recipe)]) == 2
    assert "no weights for tiny yet" in capfd.readouterr().err
    assert forked(main, ["validate", str(recipe), "--model.activation", "relu"]) == 0


def test_the_newest_finished_run_goes_before_committed_weights(workplace, recipe, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    capfd.readouterr()
    assert forked(main, ["test", str(recipe)]) == 0
    assert "runs/tiny/one/checkpoints/best.ckpt" in capfd.readouterr().out.replace("\n", "")


def test_bench_names_its_figures(workplace, recipe, capfd):
    assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "2", "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["pairs"] == 6
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", "share_of_peak", "srcnn_to_ours"):
        assert figures[name] > 0


def test_bench_of_networks_that_alternate_names_its_figures(workplace, capfd):
    small = ["--pairs", "6", "--steps", "1", "--json"]
    assert forked(main, ["bench", "gan/demo", *small]) == 0
    figures = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", "share_of_peak", "samples_per_second"):
        assert figures[name] > 0
    # A step's products, by hand: G forwards and backwards (its input needs no gradient), D on reals and fakes likewise, D on
    # fakes for G without its weights' gradients; 2 operations a multiplication, 100 images.
    generator = 400 * (100 + 400 + 784)
    discriminator = 400 * (784 + 80) + 80
    of_first = 400 * 100, 400 * 784
    expected = 2 * 100 * (3 * generator - of_first[0] + 2 * (3 * discriminator - of_first[1]) + 2 * discriminator)
    step = 100 / figures["images_per_second"]
    assert figures["gflops"] * step * 1e9 == pytest.approx(expected, rel=1e-3)
