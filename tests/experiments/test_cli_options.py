"""The keys of a recipe: what help says of them, and numbers that make no sense."""

import importlib
import inspect
import re

import pytest

from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run.lightning_cli import build
from experiments.run.recipes import find_recipe
from tests.experiments.test_recipes import TRAINED
from tests.helpers.subprocess_helpers import forked

# A recipe of each pair of a method and a datamodule.
DIFFERENT = {(recipe.class_path("model"), recipe.class_path("data")): recipe.name for recipe in TRAINED}.values()


def keys_of(recipe):
    """Each key of a recipe's method and data, and its value there."""
    for part in ("model", "data"):
        module, _, name = recipe.class_path(part).rpartition(".")
        given = recipe.content[part].get("init_args", {})
        for key, parameter in list(
            inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters.items()
        )[1:]:
            if key != "seed":
                yield f"{part}.{key}", given.get(key, parameter.default)


def refuse_numbers_below_zero(name):
    recipe = find_recipe(name)
    numbers = [key for key, value in keys_of(recipe) if type(value) in (int, float)]
    assert len(numbers) >= 4
    for key in numbers:
        with pytest.raises(UserError, match=rf"{key}\b"):
            build("fit", recipe, [f"--{key}", "-1"])


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_number_below_zero_is_refused_by_name_before_anything_is_read(workplace, name):
    assert forked(refuse_numbers_below_zero, name) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["vae/demo", "--model.latent_size", "0"], "model.latent_size: 0 must be greater than 0"),
        (["vae/demo", "--model.latent_size", "2.5"], "model.latent_size: '2.5' is not of type int"),
        (["vae/demo", "--model.hidden_dims", "[20, 0]"], "model.hidden_dims: 0 must be greater than 0"),
        (["vae/demo", "--model.hidden_dims", "20"], "model.hidden_dims: '20' is not a list; write [20]"),
        (["vae/demo", "--model.first_stage_images", "-1"], "model.first_stage_images: -1 must be greater than or equal to 0"),
        (["vae/demo", "--model.epsilon", "nan"], "model.epsilon: nan must be greater than 0"),
        (["vae/demo", "--model.epsilon", "tiny"], "model.epsilon: 'tiny' is not of type float"),
        (["vae/demo", "--model.learning_rate", "-1"], "model.learning_rate: -1 must be greater than 0"),
        (["unet/demo", "--model.dropout", "1"], "model.dropout: 1 must be less than 1"),
        (["unet/demo", "--data.border_weight", "-2"], "data.border_weight: -2 must be greater than or equal to 0"),
        (["dcgan/demo", "--data.crop", "0"], "data.crop: 0 must be greater than 0"),
    ],
)
def test_numbers_that_make_no_sense_are_answered_in_one_line(workplace, capfd, words, says):
    assert forked(main, ["fit", *words]) == 2
    assert capfd.readouterr().err.strip() == f"darkroom: {says}"


@pytest.mark.parametrize("name", DIFFERENT)
def test_help_lists_every_key_with_the_recipes_value(workplace, monkeypatch, capfd, name):
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is divided into lines
    assert forked(main, ["fit", name, "--help"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    for key, value in keys_of(find_recipe(name)):
        told = re.search(rf"--{key} .*?default: (.*?)\)(?: --|$| \w)", said)
        assert told, key
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            assert told[1] == str(value), key
    assert (
        said.index("--run ")
        < said.index("--trainer.devices ")
        < said.index("--model.total_images ")
        < said.index("--data.batch_size ")
    )
    assert "Annotated" not in said
