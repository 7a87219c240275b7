"""Recipes: short YAML files, found by name. This module does not import torch, so that the command line starts fast."""

import sys
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError
from experiments import METHODS
from experiments.run.paths import runs_root
from experiments.run.yaml_file import read_yaml


@dataclass(frozen=True)
class Recipe:
    """A recipe file and its name, such as "espcn/t91_x3"; a user's file is named by its stem.

    Args:
        name: name.
        path: YAML file, or a file of weights that contains the recipe.
        embedded: content of the recipe in a file of weights; None for a YAML file.
    """

    name: str
    path: Path
    embedded: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def content(self) -> dict[str, Any]:
        """The parsed YAML.

        Raises:
            UserError: the file is not a recipe.
        """
        content = read_yaml(self.path) if self.embedded is None else deepcopy(self.embedded)
        if not isinstance(content, dict) or not {"model", "data"} <= content.keys():
            raise UserError(f"{self.path}: not a recipe. Add the keys `model` and `data`")
        _check_sections(self.path, content)
        return content

    @property
    def config(self) -> str:
        """The recipe as an argument of `--config`: the path of the file, or YAML."""
        return str(self.path) if self.embedded is None else yaml.safe_dump(self.embedded)

    @property
    def argument(self) -> str:
        """The recipe as an argument of a command: its name, or the path of a user's file."""
        return self.name if self.bundled else str(self.path)

    def class_path(self, section: str) -> str:
        """Return the class path of the section "model" or "data"."""
        return self.content[section]["class_path"]

    def load_class(self, section: str) -> Any:
        """Import and return the class of the section "model" or "data"."""
        return import_class(self.class_path(section))

    @property
    def is_trainable(self) -> bool:
        """Whether the method of the recipe is trained, and not only evaluated with weights of its authors (`released`).

        The class is imported only if the recipe does not state the budget.
        """
        init_args = self.content["model"].get("init_args", {})
        if init_args.get("released"):
            return False
        return "total_images" in init_args or "total_images" in signature(self.load_class("model")).parameters

    @property
    def bundled(self) -> bool:
        """Whether the recipe is part of the project."""
        return self.path.is_relative_to(METHODS)

    @property
    def header(self) -> list[str]:
        """Lines of the comment at the top of the file: purpose, expected value, time, command."""
        lines = self.path.read_text().splitlines()
        return [line.removeprefix("#").strip() for line in lines[: _header_length(lines)]]

    @property
    def weights(self) -> Path:
        """Path of its committed weights; the file exists only for small networks."""
        return self.path.parent.parent / "weights" / f"{self.path.stem}.safetensors"


def import_class(class_path: str) -> Any:
    """Import and return a class by its path, such as "modules.espcn.ESPCN"."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _check_sections(path: Path, content: dict[str, Any]) -> None:
    """Check the types of the sections of a recipe.

    Raises:
        UserError: a section, a class or its arguments have another type.
    """
    if unnamed := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path}: the key {unnamed[0]} is not a name. Remove it")
    if dotted := [key for key in content if "." in key]:
        section, _, rest = dotted[0].partition(".")
        raise UserError(f"{path}: {dotted[0]}: keys with dots are for the command line. Write {rest} below {section}")
    trainer = content.get("trainer", {})
    if not isinstance(trainer, dict):
        raise UserError(f"{path}: trainer: {trainer} is not a map of keys. Remove it, or give keys")
    callbacks = trainer.get("callbacks") or []
    entries = {f"trainer.callbacks[{i}]": entry for i, entry in enumerate(callbacks if isinstance(callbacks, list) else [])}
    for key, entry in {"model": content["model"], "data": content["data"], **entries}.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
            raise UserError(f"{path}: {key}: {entry} has no class. Give class_path and init_args")
        if not isinstance(entry.get("init_args", {}), dict):
            raise UserError(f"{path}: {key}.init_args: {entry['init_args']} is not a map of arguments. Give name: value")


def _header_length(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def methods() -> list[str]:
    """List the methods, one folder each."""
    return sorted(path.parent.name for path in METHODS.glob("*/recipes"))


def known_method(name: str) -> str:
    """Return the name of a method if it exists.

    Raises:
        UserError: there is no such method; the message contains the closest name.
    """
    if name not in methods():
        matches = get_close_matches(name, methods(), n=1, cutoff=0)
        raise UserError(f"no method '{name}'; did you mean '{matches[0]}'? (darkroom list shows all)")
    return name


def recipes() -> list[Recipe]:
    """List the recipes of the project."""
    paths = sorted(METHODS.glob("*/recipes/*.yaml"))
    return [Recipe(f"{path.parent.parent.name}/{path.stem}", path) for path in paths]


def add_to_path(folder: Path) -> None:
    """Let Python find the user's classes in the files of a folder, after all installed packages."""
    if (entry := str(folder.resolve())) not in sys.path:
        sys.path.append(entry)


def _name_of_run(config: Path) -> str | None:
    """Return the name of the recipe of a run from the path of its configuration; None if it is not that of a run."""
    folder, root = config.resolve().parent, runs_root().resolve()
    is_run = config.name == "config.yaml" and folder.is_relative_to(root) and folder.parent != root
    return folder.parent.relative_to(root).as_posix() if is_run else None


def find_recipe(name: str) -> Recipe:
    """Find a recipe by name ("espcn/t91_x3", or "espcn" for its demo) or by the path of a YAML file.

    Raises:
        UserError: there is no such recipe; the message contains the closest name.
    """
    known = {recipe.name: recipe for recipe in recipes()}
    full = f"{name}/demo" if f"{name}/demo" in known else name
    if full in known:
        return known[full]
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no recipe file {name}. Check the path")
        for recipe in known.values():
            if recipe.path.resolve() == path.resolve():
                return recipe
        add_to_path(path.parent)
        return Recipe(_name_of_run(path) or path.stem, path)
    if name in methods():
        raise UserError(f"{name} has no demo. Use one of: {', '.join(n for n in known if n.startswith(f'{name}/'))}")
    matches = get_close_matches(name, [*known, *methods()], n=1, cutoff=0)
    raise UserError(f"no recipe '{name}'; did you mean '{matches[0]}'? (darkroom list shows all)")
