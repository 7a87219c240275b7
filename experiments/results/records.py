"""Run records: what was run and what came of it, with what it stands on; read with every check that a reader can make.

Nothing heavy is imported here: tables are rendered from records alone.
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
    """Base of what a record must hold; more keys may be there."""

    model_config = ConfigDict(strict=True)


class Entry(Strict):
    """A class of a recipe and its arguments."""

    class_path: str
    init_args: dict[str, Any] = {}


class Content(Strict):
    """What was run: a recipe, or a run's resolved configuration."""

    model: Entry
    data: Entry
    trainer: dict[str, Any] | None = None


class Result(Strict):
    """A metric of a dataset."""

    mean: Number
    images: dict[str, Number] = Field(min_length=1)


class Certificate(Strict):
    """By which commit, and by which hashes of the code, a check has certified a record."""

    commit: Commit
    code: dict[str, str] = {}
    starts: list[int] = []
    absent: list[str] = []


class Best(Strict):
    """The best validation of a training."""

    metric: str | None


class Schema(Strict):
    """What a record must hold."""

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
    """What a run's record can say before the run starts."""
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
    """The commit of this checkout, with "+" if tracked files other than records differ from it; empty outside a checkout."""
    try:
        _git("ls-files", "--error-unmatch", "experiments/__init__.py")  # not in a repository around it
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
    """Refuse a record that lacks a key, has a value of another type, or whose means are not those of its images.

    Raises:
        BrokenRecord: see there.
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
    # Means and values are stored with a number of decimals each: the most that occur in the record.
    means = [mean for mean, _ in results.values()]
    images = [value for _, values in results.values() for value in values]
    tolerance = 0.5 * (10.0 ** -_decimals(means) + 10.0 ** -_decimals(images))
    for name, (mean, values) in results.items():
        if not _is_mean(mean, values, tolerance):
            raise BrokenRecord(f"{path}: {name}: its mean is not that of its images")


def _decimals(values: list[float]) -> int:
    finite = [Decimal(repr(value)).as_tuple().exponent for value in values if math.isfinite(value)]
    return max((-int(exponent) for exponent in finite), default=0)


def _is_mean(mean: float, values: list[float], tolerance: float) -> bool:
    expected = sum(values) / len(values)
    if not math.isfinite(expected) or not math.isfinite(mean):
        return mean == expected or (math.isnan(mean) and math.isnan(expected))
    return abs(mean - expected) <= tolerance + 1e-12 * abs(expected)


def record_path(recipe: Recipe, seed: int) -> Path:
    """Where a recipe's committed record of a seed stands."""
    return METHODS / recipe.name.partition("/")[0] / "records" / f"{recipe.path.stem}-seed{seed}.json"


def committed_records(recipe: str) -> tuple[list[Record], list[str]]:
    """The records of a recipe in its method's folder, by seed, and what is wrong with those that cannot be used.

    A file belongs to a recipe by its name, so that a broken one is missed where it stood.
    """
    method, _, stem = recipe.partition("/")
    records, broken = [], []
    for path in sorted((METHODS / method / "records").glob(f"{stem}-seed*.json")):
        file = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        try:
            record = read_record(path)
            validate(record, path)
            if record["recipe"] != recipe or path.stem != f"{stem}-seed{record['seed']}":
                raise BrokenRecord(f"{path}: is a record of {record['recipe']}, seed {record['seed']}")
        except BrokenRecord as error:
            broken.append(str(error).replace(str(path), file.as_posix()))
        else:
            records.append({**record, "file": file.as_posix()})
    return sorted(records, key=lambda record: record["seed"]), broken


def differences(record: Record, recipe: Recipe) -> list[str]:
    """The keys in which a recipe differs from what a record was made by, with both values."""
    return _differences(record["content"], canonical(recipe), "")


def _differences(old: Any, new: Any, key: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for name in keys for line in _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in _differences(*pair, f"{key}[{i}]")]
    return [] if old == new else [f"{key} {json.dumps(old)}, now {json.dumps(new)}"]


def changed_code(record: Record, recipe: Recipe) -> list[str]:
    """The parts of the code, "training" and "metrics", that have changed since the record was made or last certified."""
    known = [code for code in (record.get("code"), record.get("certified", {}).get("code")) if code]
    return [part for part, value in code_fingerprint(recipe).items() if all(code.get(part) != value for code in known)]
