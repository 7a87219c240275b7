"""Recipes: short YAML files, found by name. Nothing heavy is imported here."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError
from experiments import METHODS


@dataclass(frozen=True)
class Recipe:
    """A recipe file and its name, such as "espcn/t91_x3"; a file of one's own is named by its stem."""

    name: str
    path: Path

    @property
    def content(self) -> dict[str, Any]:
        """The parsed YAML.

        Raises:
            Refused: it is not a recipe.
        """
        try:
            content = yaml.safe_load(self.path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{self.path}: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or not {"model", "data"} <= content.keys():
            raise UserError(f"{self.path}: not a recipe, which has `model` and `data`")
        return content

    def class_path(self, part: str) -> str:
        """The class that is its "model" or its "data"; empty if the file does not say it as it should."""
        entry = self.content[part]
        return entry.get("class_path", "") if isinstance(entry, dict) else ""

    @property
    def shipped(self) -> bool:
        """Whether it comes with the project."""
        return self.path.is_relative_to(METHODS)

    @property
    def header(self) -> list[str]:
        """The opening comment: what the recipe is for, the expected figure, the time, the command."""
        lines = self.path.read_text().splitlines()
        return [line.removeprefix("#").strip() for line in lines[: _first(lines)]]

    @property
    def weights(self) -> Path:
        """Where its small trained weights lie, if they are committed."""
        return self.path.parent.parent / "weights" / f"{self.path.stem}.safetensors"


def _first(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def methods() -> list[str]:
    """The methods, one folder each."""
    return sorted(path.parent.name for path in METHODS.glob("*/recipes"))


def known_method(name: str) -> str:
    """The name of a method.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in methods():
        near = get_close_matches(name, methods(), n=1, cutoff=0)
        raise UserError(f"no method '{name}'; did you mean '{near[0]}'?")
    return name


def recipes() -> list[Recipe]:
    """The shipped recipes."""
    paths = sorted(METHODS.glob("*/recipes/*.yaml"))
    return [Recipe(f"{path.parent.parent.name}/{path.stem}", path) for path in paths]


def find_recipe(name: str) -> Recipe:
    """The recipe that a user names: "espcn/t91_x3", "espcn" for its demo, or a path to a YAML file.

    Raises:
        Refused: there is none; the message names the nearest.
    """
    known = {recipe.name: recipe for recipe in recipes()}
    full = f"{name}/demo" if f"{name}/demo" in known else name
    if full in known:
        return known[full]
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no recipe file {name}")
        shipped = (recipe for recipe in known.values() if recipe.path.resolve() == path.resolve())
        return next(shipped, Recipe(path.stem, path))
    near = get_close_matches(name, [*known, *methods()], n=1, cutoff=0)
    raise UserError(f"no recipe '{name}'; did you mean '{near[0]}'? (darkroom list shows all)")
