"""Files of weights that describe their network, so that one file is enough to use it.

The metadata of the .safetensors file contain the recipe's `model` and `data` sections, the names of the classes, and the date
and the images of the training, as JSON. A file of somebody else is data: the classes that it names must be those of this
project or of a file that the user gives, and the weights bound the size of the network.
"""

import importlib.util
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from datamodules.errors import UserError
from experiments import ROOT
from modules.networks.weights import check_shapes, inference_state_dict, read_weights_file
from modules.training.method import Method

KEY = "darkroom"  # of the metadata
MAX_INTEGER = 2**16  # of a hyperparameter, except a number of images
MAX_VALUES = 10_000  # in a description
PACKAGES = ("modules", "datamodules")


class Entry(BaseModel):
    """A class with its arguments."""

    model_config = ConfigDict(strict=True, extra="forbid")
    class_path: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    init_args: dict[str, Any]


class Description(BaseModel):
    """What a file of weights says of its network.

    Attributes:
        version: version of this format.
        recipe: name of the recipe.
        model, data: classes and arguments of the training. They contain the number of channels, the reduction and the names of
            the classes; images are in [0, 1].
        class_names: names of the classes by id; empty if the method has none.
        images_seen: images seen by the training at these weights; None if unknown.
        date: day of the weights, such as "2026-11-22".
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    version: Literal[1] = 1
    recipe: str
    model: Entry
    data: Entry
    class_names: list[str] = []
    images_seen: int | None = None
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


def write_weights_file(path: Path, method: Method, description: Description) -> None:
    """Write the weights that are used after training, with their description.

    Args:
        path: .safetensors file; an existing file is replaced when the new one is complete.
        method: method with its weights.
        description: what the file says of them.
    """
    weights = inference_state_dict(method, method.state_dict())
    tmp_path = path.with_suffix(".part")
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()},
        tmp_path,
        {KEY: description.model_dump_json()},
    )
    tmp_path.chmod(0o644)  # safetensors writes files that only their owner can read
    tmp_path.replace(path)


def read_description(path: Path) -> Description | None:
    """Read the description of a file of weights; None if it has none.

    Raises:
        UserError: the file is damaged, or its description is not valid.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as weights: {error}. Replace the file") from None
    if text is None:
        return None
    try:
        return Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: description of the network: {key}: {first['msg'].lower()}. Replace the file") from None


def trusted_content(path: Path, description: Description) -> dict[str, Any]:
    """Return the recipe in a description, after a check of its classes, its numbers and its network.

    Raises:
        UserError: a class is not one of the project or of `load_modules`, a number is too large, or the weights do not fit.
    """
    sections = {"model": description.model.model_dump(), "data": description.data.model_dump()}
    _check_values(path, sections)
    if isinstance(names := sections["data"]["init_args"].get("class_names", []), str):
        raise UserError(f"{path}: data.class_names: {names!r} is a path, but a description names no files. Replace the file")
    method_class = _load_class(path, sections["model"], Method)
    _load_class(path, sections["data"], L.LightningDataModule)
    try:
        with torch.device("meta"):
            method = method_class(**sections["model"]["init_args"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {description.model.class_path}: {' '.join(str(error).split())}. Replace the file") from None
    check_shapes(path, read_weights_file(path), inference_state_dict(method, method.state_dict()))
    return sections


def _check_values(path: Path, content: Any) -> None:
    """Check all numbers and nested classes of a description, without recursion."""
    pending, count = [("", content)], 0
    while pending:
        key, value = pending.pop()
        count += 1
        if count > MAX_VALUES:
            raise UserError(f"{path}: its description has more than {MAX_VALUES:,} values. Replace the file")
        if isinstance(value, dict):
            if "class_path" in value and key not in ("model", "data"):
                _load_class(path, value, nn.Module)
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, int | float) and abs(value) > MAX_INTEGER and not re.search("images|warmup|seed", key):
            raise UserError(f"{path}: {key}: {value} is larger than {MAX_INTEGER:,}. Replace the file")


def _load_class(path: Path, entry: dict[str, Any], base: type) -> Any:
    """Import a class that a file of weights names, if it is one of the project or of the user's modules, and of this base."""
    module, _, name = str(entry["class_path"]).rpartition(".")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    shipped = module.partition(".")[0] in PACKAGES and source.is_file()
    if not shipped and module not in USER_MODULES:
        raise UserError(
            f"{path}: its class {entry['class_path']} is not part of Darkroom. If you trust its code, add --modules FILE.py"
        )
    found = getattr(import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, base) and found.__module__ == module):
        raise UserError(f"{path}: {entry['class_path']} is not a {base.__name__}. Replace the file")
    return found


USER_MODULES: set[str] = set()  # imported by `load_modules`


def load_modules(file: str) -> None:
    """Import a Python file of the user, whose classes files of weights may then name.

    Raises:
        UserError: there is no such file, its name is that of another module, or it cannot be imported.
    """
    path = Path(file)
    if path.suffix != ".py" or not path.stem.isidentifier() or not path.is_file():
        raise UserError(f"--modules {file}: not a Python file whose name can be imported. Check the path")
    if path.stem not in USER_MODULES and (path.stem in sys.modules or importlib.util.find_spec(path.stem)):
        raise UserError(f"--modules {file}: another module has the name '{path.stem}'. Rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise UserError(f"--modules {file}: {type(error).__name__}: {error}. Correct the file") from None
    USER_MODULES.add(path.stem)


def date_of(path: Path) -> str:
    """Return the day at which a file was last changed."""
    return time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
