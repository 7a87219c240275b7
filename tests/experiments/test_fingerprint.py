"""Fingerprints of recipes and of code: what calls for a check of a record."""

from pathlib import Path

import pytest
import yaml

from experiments.results import fingerprint
from experiments.results.fingerprint import code_fingerprint, own_attributes, recipe_fingerprint
from experiments.run.recipes import find_recipe


def test_recipe_fingerprint_is_of_what_is_trained(tmp_path):
    recipe = find_recipe("espcn/t91_x3")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe.content, sort_keys=True))
    assert recipe_fingerprint(find_recipe(str(tmp_path / "a.yaml"))) == recipe_fingerprint(recipe)
    remeasured = recipe.content
    remeasured["data"]["init_args"]["test"] = ["set5"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(remeasured))
    assert recipe_fingerprint(find_recipe(str(tmp_path / "c.yaml"))) == recipe_fingerprint(recipe)
    changed = recipe.content
    changed["model"]["init_args"]["total_images"] += 1
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(changed))
    assert recipe_fingerprint(find_recipe(str(tmp_path / "b.yaml"))) != recipe_fingerprint(recipe)


BEFORE = '''
import torch
from modules.b import gain
from datamodules.errors import UserError

def f(image, size):
    """Adds."""
    if size < 1:
        raise UserError(f"size: {size} is too small")
    mean, std = image.mean(), image.std()
    return gain(image, size) + mean - std
'''
SAME = {
    "comments, types and docstrings": BEFORE.replace('"""Adds."""', '"""Add."""  # up').replace(
        "(image, size):", "(image: int, size: int) -> int:", 1
    ),
    "an error's text": BEFORE.replace("is too small", "must be at least 1"),
    "names": BEFORE.replace("image", "picture").replace("mean,", "m,").replace("+ mean", "+ m").replace("def f", "def g"),
}
OTHER = {
    "a sign": BEFORE.replace("+ mean", "- mean"),
    "a library's function": BEFORE.replace("image.mean()", "image.median()"),
    "two of them exchanged": BEFORE.replace("image.mean(), image.std()", "image.std(), image.mean()"),
    "two arguments exchanged": BEFORE.replace("gain(image, size)", "gain(size, image)"),
    "a condition": BEFORE.replace("size < 1", "size < 2"),
}


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """The hash of a small module that imports another, in a project of its own."""
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    (tmp_path / "modules").mkdir()

    def hashed(text, shared="def gain(x, y):\n    return x * y\n"):
        (tmp_path / "modules/a.py").write_text(text)
        (tmp_path / "modules/b.py").write_text(shared)
        own_attributes.cache_clear()
        return fingerprint._hash_of_classes(["modules.a.f"])

    yield hashed
    own_attributes.cache_clear()


@pytest.mark.parametrize("change", SAME)
def test_the_alarm_does_not_ring_for(hash_of, change):
    assert SAME[change] != BEFORE
    assert hash_of(SAME[change]) == hash_of(BEFORE)


@pytest.mark.parametrize("change", OTHER)
def test_the_alarm_rings_for(hash_of, change):
    assert OTHER[change] != BEFORE
    assert hash_of(OTHER[change]) != hash_of(BEFORE)


def test_the_alarm_rings_for_what_is_imported_and_not_for_where_it_lies(hash_of):
    before = hash_of(BEFORE)
    assert hash_of(BEFORE, shared="def gain(x, y):\n    return x / y\n") != before
    (fingerprint.ROOT / "modules/sub").mkdir()
    (fingerprint.ROOT / "modules/sub/c.py").write_text("def gain(x, y):\n    return x * y\n")
    assert hash_of(BEFORE.replace("modules.b", "modules.sub.c")) == before


def test_the_alarm_rings_for_a_users_own_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    recipe = find_recipe("espcn/demo")
    content = recipe.content
    content["model"]["class_path"] = "my_networks.Net"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    hashes = []
    for gain in ("1", "2"):
        (tmp_path / "my_networks.py").write_text(f"from modules.espcn import ESPCN\n\nclass Net(ESPCN):\n    gain = {gain}\n")
        hashes.append(code_fingerprint(find_recipe(str(tmp_path / "own.yaml"))))
    assert hashes[0]["training"] != hashes[1]["training"]
    assert hashes[0]["metrics"] == hashes[1]["metrics"]


def test_attributes_that_libraries_have_too_keep_their_names():
    from numpy import ndarray
    from torch import Tensor, nn, optim

    types = (Tensor, ndarray, nn.Module, optim.Optimizer, str, list, dict, set, tuple, int, float, Path)
    assert not own_attributes() & {name for kind in types for name in dir(kind)}, "add these to fingerprint.SHARED"
