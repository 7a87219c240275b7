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
from typing import Any

from callbacks.run.record_file import BrokenRecord, read_record
from experiments import METHODS, ROOT
from experiments.results.fingerprint import canonical, code_fingerprint
from experiments.run.recipes import Recipe

Record = dict[str, Any]
REQUIRED = {"recipe": str, "content": dict, "seed": int, "commit": str, "config": dict, "data": dict, "metrics": dict}


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
    """Refuse a record that lacks a key or a commit, or whose means are not those of its images.

    Raises:
        BrokenRecord: see there.
    """
    for key, kind in REQUIRED.items():
        if not isinstance(record.get(key), kind):
            raise BrokenRecord(f"{path}: has no {key}")
    if not record["commit"]:
        raise BrokenRecord(f"{path}: was not made at a commit")
    results = {}
    for dataset, protocols in record["metrics"].items():
        for protocol, result in protocols.items():
            try:
                mean, values = float(result["mean"]), [float(value) for value in result["images"].values()]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise BrokenRecord(f"{path}: {dataset}/{protocol} has no mean or no images") from None
            results[f"{dataset}/{protocol}"] = mean, values
    # Means and values are stored with a number of decimals each: the most that occur in the record.
    means = [mean for mean, _ in results.values()]
    images = [value for _, values in results.values() for value in values]
    tolerance = 0.5 * (10.0 ** -_decimals(means) + 10.0 ** -_decimals(images))
    for name, (mean, values) in results.items():
        if not values or not _is_mean(mean, values, tolerance):
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
