"""Run records: configuration, code and data versions, and results of a run; records are validated when they are read.

This module imports no heavy packages, because tables are rendered from records alone.
"""

import json
import math
import platform
import subprocess
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from callbacks.run.record_file import BrokenRecord, read_record
from experiments import METHODS, ROOT
from experiments.results.fingerprint import canonical, code_fingerprint
from experiments.run.recipes import Recipe

Record = dict[str, Any]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}\+?$")]
Number = float | Literal["nan", "inf", "-inf"]


class Strict(BaseModel):
    """Base class of the record schema; additional keys are allowed."""

    model_config = ConfigDict(strict=True)


class Entry(Strict):
    """A class in a recipe, with its arguments."""

    class_path: str
    init_args: dict[str, Any] = {}


class Content(Strict):
    """Content of a recipe, or the resolved configuration of a run."""

    model: Entry
    data: Entry
    trainer: dict[str, Any] | None = None


class Result(Strict):
    """A metric on a dataset: the mean, and the value of each image."""

    mean: Number
    images: dict[str, Number] = Field(min_length=1)


class Certificate(Strict):
    """Commit and code hashes for which a check has certified a record."""

    commit: Commit
    code: dict[str, str] = {}
    starts: list[int] = []
    absent: list[str] = []


class Best(Strict):
    """Metric that selects the best validation of a training."""

    metric: str | None


class Schema(Strict):
    """Required keys of a record, with their types."""

    recipe: str
    content: Content
    config: Content
    seed: NonNegativeInt
    commit: Commit
    code: dict[str, str] = {}
    data: dict[str, str]
    metrics: dict[str, dict[str, Result]]
    certified: Certificate = Certificate.model_construct()  # may be absent, but not null
    best: Best = Best.model_construct()


def metadata(recipe: Recipe, overrides: list[str]) -> Record:
    """Return the entries of a run record that are known before the run starts."""
    return {
        "recipe": recipe.name,
        "content": canonical(recipe),
        "overrides": overrides,
        "commit": commit(),
        "code": code_fingerprint(recipe),
        "versions": {name: version(name) for name in ("torch", "lightning", "pytorch-optimizer")},
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return the commit of this checkout; empty if the project is not in a git checkout.

    A "+" follows the commit if tracked files other than records differ from it.
    """
    try:
        _git("ls-files", "--error-unmatch", "experiments/__init__.py")  # fails if only an outer repository exists
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("diff", "--name-only", "HEAD", "--", ".", ":(exclude)experiments/methods/*/records/*")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+" if changed else head


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


# Files


def validate(record: Record, path: Path) -> None:
    """Validate the keys, types and means of a record.

    Args:
        record: content of the file.
        path: path of the file, for messages.

    Raises:
        BrokenRecord: a key is missing, a value has the wrong type, or a mean differs from the mean of the image values.
    """
    try:
        Schema.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BrokenRecord(f"{path}: {key}: {first['msg'].lower()}") from None
    results = {
        f"{dataset}/{protocol}": (float(result["mean"]), [float(value) for value in result["images"].values()])
        for dataset, protocols in record["metrics"].items()
        for protocol, result in protocols.items()
    }
    for name, (mean, values) in results.items():
        tolerance = 0.5 * (10.0 ** -_decimals([mean]) + 10.0 ** -_decimals(values))  # both are rounded
        if not _is_mean(mean, values, tolerance):
            raise BrokenRecord(f"{path}: {name}: its mean is not that of its images. Restore the file, or repeat the run")


def _decimals(values: list[float]) -> int:
    """Return the number of decimals of values without zeros at their end; at least 4, to which no record rounds less."""
    finite = [Decimal(repr(value)).as_tuple().exponent for value in values if math.isfinite(value)]
    return max(4, *(-int(exponent) for exponent in finite)) if finite else 4


def _is_mean(mean: float, values: list[float], tolerance: float) -> bool:
    expected = sum(values) / len(values)
    if not math.isfinite(expected) or not math.isfinite(mean):
        return mean == expected or (math.isnan(mean) and math.isnan(expected))
    return abs(mean - expected) <= tolerance + 1e-12 * abs(expected)


def record_path(recipe: Recipe, seed: int) -> Path:
    """Return the path of the committed record of a recipe and a seed."""
    return METHODS / recipe.name.partition("/")[0] / "records" / f"{recipe.path.stem}-seed{seed}.json"


def committed_records(recipe: str) -> tuple[list[Record], list[str]]:
    """Return the committed records of a recipe, sorted by seed, and the errors of records that cannot be used.

    The file name determines the recipe, so a broken file is reported for its recipe.
    """
    method, _, stem = recipe.partition("/")
    records, broken = [], []
    for path in sorted((METHODS / method / "records").glob(f"{stem}-seed*.json")):
        file = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        try:
            record = read_record(path)
            validate(record, path)
            if record["recipe"] != recipe or path.stem != f"{stem}-seed{record['seed']}":
                raise BrokenRecord(f"{path}: is a record of {record['recipe']}, seed {record['seed']}. Rename it")
        except BrokenRecord as error:
            broken.append(str(error).replace(str(path), file.as_posix()))
        else:
            records.append({**record, "file": file.as_posix()})
    return sorted(records, key=lambda record: record["seed"]), broken


def differences(record: Record, content: dict[str, Any]) -> list[str]:
    """List the keys in which a recipe differs from the recipe of a record, with both values; `content`: see `canonical`."""
    return _differences(record["content"], content, "")


def _differences(old: Any, new: Any, key: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for name in keys for line in _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in _differences(*pair, f"{key}[{i}]")]
    return [] if old == new else [f"{key} {json.dumps(old)}, now {json.dumps(new)}"]


def changed_code(record: Record, code: dict[str, str]) -> list[str]:
    """List the parts of the code ("training", "metrics") that differ from both the record's code and the certified code.

    Args:
        record: the run record.
        code: hashes of the current code, see `code_fingerprint`.
    """
    known = [hashes for hashes in (record.get("code"), record.get("certified", {}).get("code")) if hashes]
    return [part for part, value in code.items() if all(hashes.get(part) != value for hashes in known)]
