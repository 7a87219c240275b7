"""Every shipped recipe: parsed and built, and stepped for real on embedded pictures laid out as its data set."""

import importlib
import json
import shutil

import pytest
import torch

from callbacks.metrics.feature_extractors import Inception
from experiments.cli.main import main
from experiments.results.tables import load_table
from experiments.run.lightning_cli import DarkroomCLI
from experiments.run.recipes import methods, recipes
from tests.helpers.fake_datasets import accept_what_is_laid_out, lay_out
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import inception_weights

ALL = recipes()
TRAINED = [recipe for recipe in ALL if "total_images" in recipe.content["model"]["init_args"]]


def kind(recipe):
    return recipe.class_path("data").rpartition(".")[2]


def names(recipe):
    return recipe.name


@pytest.mark.parametrize("recipe", ALL, ids=names)
def test_header_states_cell_figure_time_and_command(recipe):
    header = recipe.header
    assert len(header) >= 4
    for opening in ("Expected: ", "Time: ", "Command: darkroom "):
        assert sum(line.startswith(opening) for line in header) == 1, opening
    assert any(line.startswith("Command:") and recipe.name in line for line in header)


def build(recipe):
    cli = DarkroomCLI("fit", recipe, [])
    assert type(cli.model).__name__ in recipe.content["model"]["class_path"]


@pytest.mark.parametrize("recipe", ALL, ids=names)
def test_parses_and_builds_without_memory(recipe, workplace):
    assert forked(build, recipe) == 0
    module, _, name = recipe.content["model"]["class_path"].rpartition(".")
    with torch.device("meta"):
        model = getattr(importlib.import_module(module), name)(**recipe.content["model"]["init_args"])
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("recipe", [recipe for recipe in TRAINED if kind(recipe) == "SuperResolution"], ids=names)
def test_a_few_real_steps_on_its_data_sets_layout(recipe, workplace):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], *data.get("test", [])}:
        lay_out(name)
    batch = min(data.get("batch_size", 16), 4)
    shrunk = ["--model.total_images", str(3 * batch), "--data.batch_size", str(batch), "--val_every_images", str(2 * batch)]
    if data.get("num_workers"):
        shrunk += ["--data.num_workers", "1", "--data.val_every_nth", "3"]
    if data["train"] == "photographs/train":
        shrunk += ["--data.val", "photographs/test", "--data.train", "photographs/val"]
    elif not data.get("num_workers"):
        shrunk += ["--data.val_every_nth", "3"]
    monitor = "photographs-test" if data["train"] == "photographs/train" else f"{data['train']}-holdout"
    shrunk += ["--monitor", f"{monitor}/psnr-y/crop{data['scale']}"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *shrunk]) == 0
    assert (workplace / "runs" / recipe.name / "short/record.json").exists()


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """A cache of torch's with weights of Inception in it, random ones."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.save(inception_weights(), home / "hub/checkpoints" / Inception.url.rpartition("/")[2])
    return home


def run_on_what_is_laid_out(words):
    with pytest.MonkeyPatch.context() as patch:
        accept_what_is_laid_out(patch)
        return main(words)


@pytest.mark.parametrize("recipe", [recipe for recipe in TRAINED if kind(recipe) == "Generation"], ids=names)
def test_a_few_real_steps_of_making_images(recipe, workplace, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setenv("DARKROOM_CACHE", str(workplace / "cache"))
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], *data.get("test", [])}:
        lay_out(name)
    shrunk = ["--model.total_images", "12", "--data.batch_size", "4", "--val_every_images", "8", "--data.val_samples", "10"]
    if data.get("test", [""])[0].startswith("mnist"):
        shrunk += ["--data.test_samples", "60"]
        if "LinearProbe" in recipe.path.read_text():  # the last callback
            shrunk += ["--trainer.callbacks.init_args.repeats", "1", "--trainer.callbacks.init_args.per_class", "10"]
    else:
        shrunk += ["--data.test", "[]"]  # random weights of Inception say nothing, and take long
    if data.get("num_workers"):
        shrunk += ["--data.num_workers", "1"]
    assert forked(run_on_what_is_laid_out, ["fit", recipe.name, "--run", "short", *shrunk]) == 0
    folder = workplace / "runs" / recipe.name / "short"
    assert (folder / "record.json").exists()
    assert {path.name for path in (folder / "samples").iterdir()} == {"reals.png", "000000008.png", "000000012.png"}


@pytest.mark.parametrize("recipe", [recipe for recipe in TRAINED if kind(recipe) == "Reconstruction"], ids=names)
def test_a_few_real_steps_of_giving_back(recipe, workplace):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], data["val"], *data["test"]}:
        lay_out(name)
    shrunk = ["--model.total_images", "8", "--data.batch_size", "4", "--val_every_images", "4"]
    if "Likelihood" in recipe.path.read_text():
        shrunk += ["--trainer.callbacks.init_args.n_samples", "2"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *shrunk]) == 0
    folder = workplace / "runs" / recipe.name / "short"
    assert json.loads((folder / "record.json").read_text())["metrics"]
    assert {path.name for path in (folder / "samples").iterdir()} == {"reals.png", "000000004.png", "000000008.png"}


@pytest.mark.parametrize("recipe", [recipe for recipe in TRAINED if kind(recipe) == "Segmentation"], ids=names)
def test_a_few_real_steps_of_segmenting(recipe, workplace):
    data, model = (recipe.content[part]["init_args"] for part in ("data", "model"))
    for name in {data["train"], data["val"], *data.get("test", [])}:
        lay_out(name)
    batch = 2 if data.get("batch_size") else 1
    shrunk = ["--model.total_images", str(2 * batch), "--val_every_images", str(batch)]
    if batch > 1:
        shrunk += ["--data.batch_size", "2"]
    if data.get("num_workers"):
        shrunk += ["--data.num_workers", "1"]
    if "UNet" in recipe.class_path("model"):
        crop = 4 + 2 ** model.get("depth", 4)
        shrunk += ["--model.base_channels", "2", "--model.tta_views", "1", "--model.tile_size", "100", "--data.crop", str(crop)]
    else:
        shrunk += ["--model.encoder_weights", "null", "--model.encoder_name", "tu-mobilenetv3_small_050"]
        shrunk += ["--model.tile_size", "96", "--data.crop", "64"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *shrunk]) == 0
    folder = workplace / "runs" / recipe.name / "short"
    assert json.loads((folder / "record.json").read_text())["metrics"]
    assert len(list((folder / "samples").iterdir())) == 2


@pytest.mark.parametrize("recipe", [recipe for recipe in TRAINED if kind(recipe) == "Unpaired"], ids=names)
def test_a_few_real_steps_of_translating(recipe, workplace):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], data["val"], *data.get("test", [])}:
        lay_out(name)
    shrunk = [
        "--model.total_images",
        "2",
        "--val_every_images",
        "1",
        "--data.max_val_images",
        "1",
        "--model.base_channels",
        "2",
        "--model.n_residual_blocks",
        "1",
    ]
    shrunk += ["--model.crop", "32", "--data.crop", "32"]
    shrunk += [] if data.get("resize", 286) is None else ["--data.resize", "36"]
    if len(recipe.content["trainer"]["callbacks"]) > 1:  # whose judge or Inception is not here
        shrunk += ["--data.test", "[]"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *shrunk]) == 0
    folder = workplace / "runs" / recipe.name / "short"
    assert (folder / "record.json").exists()
    assert len(list((folder / "samples").iterdir())) == 2


@pytest.mark.parametrize("recipe", [recipe for recipe in ALL if recipe not in TRAINED], ids=names)
def test_what_is_not_trained_is_measured(recipe, workplace):
    words = ["test", recipe.name, "--record", "record.json", "--data.test", "[photographs/test]"]
    assert forked(main, words) == 0
    assert (workplace / "record.json").exists()


def test_every_method_has_a_page_and_a_demo_or_nothing_to_train():
    for method in {recipe.name.partition("/")[0] for recipe in ALL}:
        of_method = [recipe for recipe in ALL if recipe.name.startswith(f"{method}/")]
        assert (of_method[0].path.parent.parent / "README.md").exists()
        assert f"{method}/demo" in map(names, of_method) or not set(of_method) & set(TRAINED)


def test_table_rows_name_recipes_that_exist():
    known = set(map(names, ALL))
    for method in methods():
        for table in load_table(method)["tables"]:
            for row in table["rows"]:
                assert row.get("recipe") in known or "why" in row


@pytest.mark.slow
def test_the_demo_as_it_is(workplace, capfd):
    assert forked(main, ["demo"]) == 0
    output = capfd.readouterr().out
    figures = {line.split()[1]: float(line.split()[3]) for line in output.splitlines() if " dB " in line}
    assert figures["ESPCN"] > figures["bicubic"] + 0.5
    shutil.rmtree(workplace / "runs")
