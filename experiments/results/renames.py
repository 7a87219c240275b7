"""Maps from old names to new names, which let a check distinguish renamed keys from changed ones."""

import re
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from datamodules.errors import UserError
from experiments.run.yaml_file import read_yaml


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Renames:
    """Maps from old names to new names; an empty map renames nothing.

    Args:
        recipes: names of recipes.
        classes: class paths.
        keys: for each class, by its new name without the module, the names of constructor arguments.
        options: top-level keys of a recipe, which are also options of `darkroom fit`.
        values: string values in a recipe; only complete values are replaced.
        names: regular expressions and their replacements, applied in order to the names of metrics, losses and datasets.
        weights: regular expressions and their replacements, applied in order to the names of parameters and buffers.
    """

    recipes: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def name(self, name: str) -> str:
        """Return the new name of a metric, a loss or a dataset."""
        return _replace(self.names, name)

    def weight(self, name: str) -> str:
        """Return the new name of a parameter or a buffer."""
        return _replace(self.weights, name)

    def old_recipe(self, name: str) -> str:
        """Return the old name of a recipe."""
        return {new: old for old, new in self.recipes.items()}.get(name, name)

    def old_option(self, name: str) -> str:
        """Return the old name of an option."""
        return {new: old for old, new in self.options.items()}.get(name, name)

    def content(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a recipe, or the resolved configuration of a run, with new names."""
        return {self.options.get(key, key): self._entry(value) for key, value in content.items()}

    def record(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a record with new names.

        Raises:
            UserError: two datasets get the same name.
        """
        metrics = {
            self.name(dataset): {self.name(protocol): result for protocol, result in protocols.items()}
            for dataset, protocols in record["metrics"].items()
        }
        data = {self.name(dataset): value for dataset, value in record["data"].items()}
        if len(metrics) < len(record["metrics"]) or len(data) < len(record["data"]):
            raise UserError(f"--renames: names: two datasets of {record['recipe']} get the same name. Change the patterns")
        renamed = {
            "recipe": self.recipes.get(record["recipe"], record["recipe"]),
            "content": self.content(record["content"]),
            "config": self.content(record["config"]),
            "data": data,
            "metrics": metrics,
        }
        if "best" in record and record["best"]["metric"]:
            renamed["best"] = {**record["best"], "metric": self.name(record["best"]["metric"])}
        return {**record, **renamed}

    def _entry(self, entry: Any) -> Any:
        if isinstance(entry, list):
            return [self._entry(item) for item in entry]
        if isinstance(entry, str):
            return self.name(self.values.get(entry, entry))
        if not isinstance(entry, dict):
            return entry
        if "class_path" not in entry:
            return {key: self._entry(value) for key, value in entry.items()}
        path = str(self.classes.get(entry["class_path"], entry["class_path"]))
        keys = self.keys.get(path.rpartition(".")[2], {})
        arguments = {keys.get(key, key): self._entry(value) for key, value in (entry.get("init_args") or {}).items()}
        return {"class_path": path, **({"init_args": arguments} if "init_args" in entry else {})}


def read_renames(path: Path | None) -> Renames:
    """Read the maps from a YAML file; return empty maps if `path` is None.

    Raises:
        UserError: the file cannot be read, has an unknown key, or contains an invalid pattern.
    """
    if path is None:
        return Renames()
    try:
        content = read_yaml(path)
    except UserError as error:
        raise UserError(f"--renames {error}") from None
    try:
        if not isinstance(content, dict):
            raise UserError(f"--renames {path}: must be a map of {', '.join(Renames.__dataclass_fields__)}")
        renames = Renames(**content)
        if dotted := [name for name in renames.keys if "." in name]:
            raise UserError(f"--renames {path}: keys.{dotted[0]}: use the name of the class, {dotted[0].rpartition('.')[2]}")
        for patterns in (renames.names, renames.weights):
            _replace(patterns, "")  # raises an error for an invalid pattern or replacement
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--renames {path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
    except (TypeError, re.error) as error:
        raise UserError(f"--renames {path}: {' '.join(str(error).split())}") from None
    return renames


def _replace(patterns: dict[str, str], name: str) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name
