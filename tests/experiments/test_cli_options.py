"""Keys of a recipe: the help text, and invalid values."""

import importlib
import inspect
import re

import pytest

from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run.config_checks import check_recipe
from experiments.run.lightning_cli import build_cli
from experiments.run.recipes import find_recipe
from tests.experiments.test_recipes import TRAINED
from tests.helpers.subprocess_helpers import forked

MINIMAL = (
    "model: {class_path: modules.espcn.ESPCN}\ndata: {class_path: datamodules.SuperResolution, init_args: {batch_size: 4}}"
)
# One recipe for each pair of a method and a datamodule.
DISTINCT_RECIPES = {(recipe.class_path("model"), recipe.class_path("data")): recipe.name for recipe in TRAINED}.values()
# One recipe for each method, and one for each datamodule.
METHODS_AND_DATAMODULES = [
    (name, section)
    for section in ("model", "data")
    for name in {recipe.class_path(section): recipe.name for recipe in TRAINED}.values()
]


def keys_of(recipe, sections=("model", "data")):
    """Yield each key of a recipe's method and datamodule with its value."""
    for section in sections:
        module, _, name = recipe.class_path(section).rpartition(".")
        init_args = recipe.content[section].get("init_args", {})
        for key, parameter in list(
            inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters.items()
        )[1:]:
            if key != "seed":
                yield f"{section}.{key}", init_args.get(key, parameter.default)


def check_negative_values(name, section):
    recipe = find_recipe(name)
    keys = [key for key, value in keys_of(recipe, [section]) if type(value) in (int, float)]
    assert len(keys) >= 1
    for key in keys:
        with pytest.raises(UserError, match=rf"{key}\b"):
            build_cli("fit", recipe, [f"--{key}", "-1"])


@pytest.mark.parametrize(("name", "section"), METHODS_AND_DATAMODULES)
def test_negative_value_is_refused_with_its_key(workdir, name, section):
    assert forked(check_negative_values, name, section) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vae/demo", "--model.latent_size", "0"], "model.latent_size: 0 must be greater than 0"),
        (["vae/demo", "--model.latent_size", "2.5"], "model.latent_size: '2.5' is not of type int"),
        (["vae/demo", "--model.hidden_dims", "[20, 0]"], "model.hidden_dims: 0 must be greater than 0"),
        (["vae/demo", "--model.hidden_dims", "20"], "model.hidden_dims: '20' is not a list; write [20]"),
        (["vae/demo", "--model.first_stage_images", "-1"], "model.first_stage_images: -1 must be greater than or equal to 0"),
        (["vae/demo", "--model.eps", "nan"], "model.eps: nan must be greater than 0"),
        (["vae/demo", "--model.eps", "tiny"], "model.eps: 'tiny' is not of type float"),
        (["vae/demo", "--model.learning_rate", "-1"], "model.learning_rate: -1 must be greater than 0"),
        (["unet/demo", "--model.dropout", "1"], "model.dropout: 1 must be less than 1"),
        (["unet/demo", "--data.border_weight", "-2"], "data.border_weight: -2 must be greater than or equal to 0"),
        (["dcgan/demo", "--data.crop", "0"], "data.crop: 0 must be greater than 0"),
        (
            ["espcn/demo", "--trainer.callbacks.init_args", "[1, 2]"],
            "trainer.callbacks.init_args: [1, 2] is not a map of arguments",
        ),
    ],
)
def test_invalid_value_prints_one_line(workdir, capfd, overrides, message):
    assert forked(main, ["fit", *overrides]) == 2
    assert capfd.readouterr().err.strip() == f"darkroom: {message}"


@pytest.mark.parametrize("name", DISTINCT_RECIPES)
def test_help_lists_every_key_with_the_value_of_the_recipe(workdir, monkeypatch, capfd, name):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    assert forked(main, ["fit", name, "--help"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    for key, value in keys_of(find_recipe(name)):
        match = re.search(rf"--{key} .*?default: (.*?)\)(?: --|$| \w)", text)
        assert match, key
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            assert match[1] == str(value), key
    positions = [text.index(f"--{key} ") for key in ("model.total_images", "data.batch_size", "run", "trainer.devices")]
    assert positions == sorted(positions)
    assert "Annotated" not in text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("data.seed: 3", "data.seed: keys with dots are for the command line. Write seed below data"),
        ("trainer: {accumulate_grad_batches: 1, val_check_interval: null}", None),
        ("val_every_images: 40\ntrainer: {val_check_interval: 10}", None),  # of a run
        (
            "val_every_images: 40\ntrainer: {val_check_interval: 11}",
            "trainer.val_check_interval: set by Darkroom. Use --val_every",
        ),
        ("trainer: {accumulate_grad_batches: 2}", "trainer.accumulate_grad_batches: set by Darkroom. Use --accumulate"),
        ("trainer: {gradient_clip_val: 1}", "trainer.gradient_clip_val: set by Darkroom. Use max_grad_norm of a Phase"),
        ("trainer: {logger: true}", "trainer.logger: set by Darkroom. Use --log"),
        ("log: csv", "log: csv is not a list. Write [csv]"),
        ("log: null", "log: null is not a list. Write [csv]"),
    ],
)
def test_keys_that_darkroom_sets_are_refused_in_a_recipe(tmp_path, lines, message):
    (tmp_path / "own.yaml").write_text(f"{MINIMAL}\n{lines}\n")
    recipe = find_recipe(str(tmp_path / "own.yaml"))
    if message is None:
        check_recipe(recipe)
        return
    with pytest.raises(UserError, match=re.escape(f"own.yaml: {message}")):
        check_recipe(recipe)


def test_seed_of_the_data_is_refused_in_a_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text(MINIMAL.replace("batch_size: 4", "batch_size: 4, seed: 3"))
    with pytest.raises(UserError, match=r"own.yaml: data.init_args.seed: set by Darkroom. Use --seed_everything"):
        check_recipe(find_recipe(str(tmp_path / "own.yaml")))
