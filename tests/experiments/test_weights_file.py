"""Files of weights that describe their network: written by export, used alone, and not trusted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run.network import find_network
from experiments.run.recipes import find_recipe, recipes
from experiments.run.weights_file import KEY, read_description
from tests.helpers.subprocess_helpers import forked
from tests.tasks.superresolution import write_recipe

WITHOUT_DESCRIPTION = {"colorization/cifar10_jpeg_full", "style/wave"}  # records contain the hashes of these files
OWN_NETWORK = """
from modules.espcn import ESPCN

class Mine(ESPCN):
    pass
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file that export writes for the weights in the repository."""
    file = tmp_path_factory.mktemp("exported") / "x3.safetensors"
    assert forked(main, ["export", "espcn/t91_x3", "--output", str(file)]) == 0
    return file


def changed(source, target, **entries):
    """Copy a file of weights with other entries in its description: keys such as model__class_path."""
    content = read_description(source).model_dump()
    for key, value in entries.items():
        *parents, last = key.split("__")
        section = content
        for name in parents:
            section = section[name]
        section[last] = value
    save_file(load_file(source), target, {KEY: json.dumps(content)})
    return target


def test_file_alone_predicts_like_its_recipe(exported, photos, workdir, capfd):
    """The command names the day and the images of the training, which the record of the recipe states."""
    photo = str(sorted(photos.iterdir())[0])
    for name, output in ((str(exported), "alone"), ("espcn/t91_x3", "recipe")):
        assert forked(main, ["predict", name, "--input", photo, "--output", output]) == 0
    assert "(of 2026-11-23, after 800,000 images)" in capfd.readouterr().out
    alone, recipe = (np.asarray(Image.open(next((workdir / name).glob("*.png")))) for name in ("alone", "recipe"))
    assert (alone == recipe).all()
    assert alone.shape == (270, 288, 3)


def test_description_is_that_of_the_recipe(exported):
    description = read_description(exported)
    content = find_recipe("espcn/t91_x3").content
    assert description.recipe == "espcn/t91_x3"
    for section, entry in (("model", description.model), ("data", description.data)):
        assert entry.class_path == content[section]["class_path"]
        assert content[section]["init_args"].items() <= entry.init_args.items()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model__class_path": "os.system"}, r"os\.system is not part of Darkroom"),
        ({"model__class_path": "modules.training.phases.Phase"}, "is not a Method"),
        ({"model__class_path": "modules.espcn.Path"}, "is not a Method"),
        ({"data__class_path": "modules.espcn.ESPCN"}, "is not a LightningDataModule"),
        ({"model__init_args__activation": {"class_path": "subprocess.Popen", "init_args": {}}}, r"subprocess\.Popen is not"),
        ({"model__init_args__scale": 10**9}, "scale: 1000000000 is larger than"),
        ({"model__init_args__learning_rate": 1e30}, r"learning_rate: 1e\+30 is larger than"),
        (
            {"data__init_args__class_names": "/dev/stdin"},
            "class_names: '/dev/stdin' is a path, but a description names no files",
        ),
        ({"model__init_args__scale": 4}, "does not fit this model"),
        ({"model__init_args__unknown": 4}, "unknown"),
        ({"model__init_args__activation": [[]] * 20_000}, "more than 10,000 values"),
        ({"model__class_path": "../modules"}, "class_path"),
        ({"version": 2}, "version"),
    ],
)
def test_description_of_somebody_else_chooses_no_code_and_no_size(exported, tmp_path, entries, message):
    file = changed(exported, tmp_path / "theirs.safetensors", **entries)
    with pytest.raises(UserError, match=rf"theirs\.safetensors.*{message}"):
        find_network(str(file), None, [])


@pytest.mark.parametrize("recipe", [recipe for recipe in recipes() if recipe.weights.exists()], ids=lambda recipe: recipe.name)
def test_weights_in_the_repository_describe_their_network(recipe):
    description = read_description(recipe.weights)
    if recipe.name in WITHOUT_DESCRIPTION:
        assert description is None
        return
    assert description.recipe == recipe.name
    for section in ("model", "data"):
        assert getattr(description, section).class_path == recipe.class_path(section)


def test_every_demo_that_trains_has_weights():
    assert [recipe.name for recipe in recipes() if recipe.path.stem == "demo" and not recipe.weights.exists()] == []


def test_file_without_a_description_names_the_remedy(exported, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901")
    torch.save({}, tmp_path / "other.pth")
    for name, message in (
        ("plain.safetensors", "does not describe its network. Give the recipe"),
        ("broken.safetensors", "cannot be read as weights"),
        ("other.pth", "does not describe its network"),
        ("none.safetensors", "no file"),
    ):
        with pytest.raises(UserError, match=message):
            find_network(str(tmp_path / name), None, [])
    with pytest.raises(UserError, match=r"--run a: .* is not a recipe"):
        find_network(str(exported), "a", [])
    with pytest.raises(UserError, match="contains the weights"):
        find_network(str(exported), None, ["--ckpt", "x"])


def test_metrics_are_those_of_the_bundled_recipe(exported, photos, workdir, capfd):
    words = ["--data.test", str(photos), "--record", "one.json"]
    assert forked(main, ["test", str(exported), *words]) == 0
    assert forked(main, ["test", "espcn/t91_x3", "--data.test", str(photos), "--record", "two.json"]) == 0
    one, two = (json.loads((workdir / f"{name}.json").read_text())["metrics"] for name in ("one", "two"))
    assert any("psnr-y" in key for entry in one.values() for key in entry) or any("psnr-y" in key for key in one)
    assert one == two
    own = changed(exported, workdir / "own.safetensors", recipe="mine")
    assert forked(main, ["test", str(own), *words]) == 2
    assert "own.safetensors names no metrics. Use darkroom test RECIPE --ckpt" in capfd.readouterr().err


def test_own_class_next_to_an_own_recipe(exported, workdir, photos, capfd):
    """The class is found, stays with the run, and is used for a file of weights only if its Python file is given."""
    own = workdir / "own"
    own.mkdir()
    (own / "mynetwork.py").write_text(OWN_NETWORK)
    model = {"class_path": "mynetwork.Mine", "init_args": {"scale": 3, "total_images": 32}}
    recipe = write_recipe(own / "mine.yaml", photos, model)
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.val_every_nth", "3", "--data.test", "[]"]) == 0
    (own / "mynetwork.py").unlink()
    photo = str(sorted(photos.iterdir())[0])
    assert forked(main, ["predict", "runs/mine/one", "--input", photo]) == 0
    assert forked(main, ["export", "runs/mine/one", "--output", "mine.safetensors"]) == 0
    assert read_description(workdir / "mine.safetensors").data.init_args["train"] == photos.name  # not its folder
    capfd.readouterr()
    assert forked(main, ["predict", "mine.safetensors", "--input", photo]) == 2
    assert "add --modules FILE.py" in capfd.readouterr().err
    words = ["--input", photo, "--modules", "runs/mine/one/code/mynetwork.py"]
    assert forked(main, ["predict", "mine.safetensors", *words]) == 0
