"""Fingerprints of recipes and of code. If a fingerprint changes, its record must be checked."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from experiments import ROOT
from experiments.results import fingerprint
from experiments.results.fingerprint import code_fingerprint, recipe_fingerprint
from experiments.run.recipes import find_recipe


def test_recipe_fingerprint_depends_on_training_but_not_on_test_sets(tmp_path):
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
from torch.nn.functional import relu
from modules.b import Base, gain, loss
from datamodules.errors import UserError

class Net(Base):
    def f(self, image, size):
        """Adds."""
        if size < 1:
            raise UserError(f"size: {size} is too small")
        mean, std = image.mean(), image.std()
        return relu(gain(image, by=size)) + self.scale * mean - std
'''
SHARED = """
class Base:
    def __init__(self):
        self.scale = 1.0
        self.width = 2.0

def gain(x, by=1, power=1):
    return x * by ** power

def loss(x, by=1, power=1):
    return x - by ** power
"""
SAME = {
    "comments, types and docstrings": BEFORE.replace('"""Adds."""', '"""Add."""  # up').replace(
        "image, size):", "image: int, size: int) -> int:", 1
    ),
    "a TypedDict": BEFORE.replace(
        "\nclass Net", "\nclass Pair(TypedDict):\n    scale: int\n\n\nclass More(Pair):\n    up: int\n\n\nclass Net"
    ),
    "an error message": BEFORE.replace("is too small", "must be at least 1"),
    "names": BEFORE.replace("image", "picture").replace("mean,", "m,").replace("* mean", "* m").replace("def f", "def g"),
    "an import alias": BEFORE.replace("import relu", "import relu as rectify").replace("relu(gain", "rectify(gain"),
}
OTHER = {
    "a sign": BEFORE.replace("- std", "+ std"),
    "a library function": BEFORE.replace("image.mean()", "image.median()"),
    "another library function with the same name": BEFORE.replace("import relu", "import silu as relu"),
    "two library functions exchanged": BEFORE.replace("image.mean(), image.std()", "image.std(), image.mean()"),
    "a function of another file": BEFORE.replace("gain(image", "loss(image"),
    "an attribute of another file": BEFORE.replace("self.scale", "self.width"),
    "another parameter": BEFORE.replace("by=size", "power=size"),
    "two arguments exchanged": BEFORE.replace("gain(image, by=size)", "gain(size, by=image)"),
    "a condition": BEFORE.replace("size < 1", "size < 2"),
    "the base class": BEFORE.replace("(Base)", "(torch.nn.Module)"),
}


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """Return a function that computes the hash of a small module with an import, in a temporary project."""
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    (tmp_path / "modules").mkdir()

    def hashed(text, shared=SHARED):
        (tmp_path / "modules/a.py").write_text(text)
        (tmp_path / "modules/b.py").write_text(shared)
        return fingerprint._hash_of_classes(["modules.a.Net"])

    return hashed


@pytest.mark.parametrize("change", SAME)
def test_fingerprint_ignores_equivalent_changes(hash_of, change):
    assert SAME[change] != BEFORE
    assert hash_of(SAME[change]) == hash_of(BEFORE)


@pytest.mark.parametrize("change", OTHER)
def test_fingerprint_detects_relevant_changes(hash_of, change):
    assert OTHER[change] != BEFORE
    assert hash_of(OTHER[change]) != hash_of(BEFORE)


def test_fingerprint_ignores_names_shared_by_two_files(hash_of):
    renames = (("scale", "factor"), ("gain", "amplify"), ("by", "exponent"), ("Base", "Parent"))
    texts = [BEFORE, SHARED]
    for old, new in renames:
        texts = [re.sub(rf"\b{old}\b", new, text) for text in texts]
    assert hash_of(*texts) == hash_of(BEFORE)


def test_fingerprint_depends_on_imported_code_but_not_on_its_location(hash_of):
    before = hash_of(BEFORE)
    assert hash_of(BEFORE, SHARED.replace("x * by", "x / by")) != before
    (fingerprint.ROOT / "modules/sub").mkdir()
    (fingerprint.ROOT / "modules/sub/c.py").write_text(SHARED)
    assert hash_of(BEFORE.replace("modules.b", "modules.sub.c")) == before


@pytest.mark.parametrize(
    ("files", "class_path"),
    [
        ({"my_networks.py": "GAIN"}, "my_networks.Net"),
        ({"my_package/__init__.py": "", "my_package/sub/__init__.py": "GAIN"}, "my_package.sub.Net"),
        ({"my_folder/net.py": "GAIN"}, "my_folder.net.Net"),
        ({"my_exports/__init__.py": "from .net import Net\n", "my_exports/net.py": "GAIN"}, "my_exports.Net"),
        (
            {
                "my_parts/__init__.py": "",
                "my_parts/net.py": "from . import gains\nNet = gains.Net\n",
                "my_parts/gains.py": "GAIN",
            },
            "my_parts.net.Net",
        ),
    ],
    ids=["file", "package", "folder without __init__", "re-exported", "relative import"],
)
def test_fingerprint_detects_changes_in_a_user_class(tmp_path, monkeypatch, files, class_path):
    monkeypatch.syspath_prepend(tmp_path)
    content = find_recipe("espcn/demo").content
    content["model"]["class_path"] = class_path
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    hashes = []
    for gain in ("1", "2"):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            code = f"from modules.espcn import ESPCN\n\nclass Net(ESPCN):\n    gain = {gain}\n"
            (tmp_path / name).write_text(text.replace("GAIN", code))
        importlib.invalidate_caches()
        hashes.append(code_fingerprint(find_recipe(str(tmp_path / "own.yaml"))))
    assert hashes[0]["training"] != hashes[1]["training"]
    assert hashes[0]["metrics"] == hashes[1]["metrics"]


def test_fingerprint_excludes_packages_that_pip_installs_anywhere(tmp_path, monkeypatch, hash_of):
    packages = tmp_path / "packages"
    (packages / "library-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(packages)
    hashes = []
    for gain in (1, 2):
        (packages / "library.py").write_text(f"gain = {gain}\n")
        hashes.append(hash_of(f"from library import gain\n{BEFORE}"))
    assert hashes[0] == hashes[1]


def test_fingerprint_is_the_same_in_all_versions_of_python(hash_of, monkeypatch):
    """The expected value is that of Python 3.11; functions and classes have a further field since Python 3.12."""
    assert hash_of(BEFORE) == "4feec452a3cc08d9"
    real_parse = ast.parse

    def parse(source):
        tree = real_parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.type_params = []
        return tree

    fingerprint._hash_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", parse)
        for kind in (ast.FunctionDef, ast.ClassDef):
            patch.setattr(kind, "_fields", tuple(dict.fromkeys((*kind._fields, "type_params"))))
        newer = hash_of(BEFORE)
    assert newer == "4feec452a3cc08d9"


def test_shared_contains_all_attributes_of_library_types():
    import torch
    from numpy import ndarray
    from torch import Tensor, nn, optim

    if torch.__version__ < "2.14":
        pytest.skip("older versions of torch have attributes that have been removed, such as names")
    types = (Tensor, ndarray, nn.Module, optim.Optimizer, str, list, dict, set, tuple, int, float, Path)
    paths = [path for package in fingerprint.PACKAGES[:3] for path in (ROOT / package).rglob("*.py")]
    own = {name for path in paths for name in fingerprint._read(path.read_text(), "").attributes} - fingerprint.SHARED
    assert not own & {name for kind in types for name in dir(kind)}, "add these to fingerprint.SHARED"
