"""YAML files of users: recipes, searches and configurations of runs."""

import pytest
import yaml

from datamodules.errors import UserError
from experiments.run.recipes import recipes
from experiments.run.run_dir import Run
from experiments.run.yaml_file import read_yaml


def test_recipes_have_the_content_of_the_safe_loader():
    for recipe in recipes():
        assert read_yaml(recipe.path) == yaml.safe_load(recipe.path.read_text())


def test_byte_order_mark_and_aliases_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &x [1, 2]\nb: *x\nc: {a: 1, b: {a: 2}}\n")
    assert read_yaml(path) == {"a": [1, 2], "b": [1, 2], "c": {"a": 1, "b": {"a": 2}}}


def aliases_of_aliases() -> str:
    """Return nine lists, of which each repeats the one before nine times: 9 ** 9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: {c: 1}\na: 2\n", r"line 3: the key 'a' occurs twice"),
        (b"model:\n  init_args: {x: 1, y: [{z: 1}], x: 2}\n", r"line 2: the key 'x' occurs twice"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, r"line 1: nested more than 50 deep"),
        (b"[" * 100_000, r"nested more than 50 deep"),
        (aliases_of_aliases().encode(), r"line 6: the file contains more than 100,000 values"),
        ("# café\na: 1\n".encode("latin-1"), r"byte 5: not UTF-8"),
        ("a: 1\n".encode("utf-16"), r"byte 0: not UTF-8"),
        (b"a: [1\n", r"a\.yaml: .*line 2"),
        (b"a: !!python/object/apply:os.system [ls]\n", r"could not determine a constructor"),
        (b"a: 2026-02-31\n", r"a\.yaml: .*day"),
        (b"a: \x00\n", r"a\.yaml: .*"),
    ],
    ids=["twice", "twice in a map", "deep", "open", "aliases", "latin-1", "utf-16", "syntax", "python", "date", "null byte"],
)
def test_unusable_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "model: 1\ndata: {}\n", "model: {class_path: a}\ndata: {init_args: {}}\n", "\x00"]
)
def test_damaged_configuration_of_a_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        Run(tmp_path).read_config()
