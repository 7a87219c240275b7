"""`darkroom reproduce METHOD --check`: check that the current code reproduces the training and the metrics of a record.

A record is valid if its recipe and data are unchanged and a replay succeeds. The replay runs the first steps of the training
twice on this machine: with the code of the certified commit, taken from the git history, and with the current code. It compares
logs and weights exactly. Both code versions then evaluate the committed weights, or the weights of the replay if none are
committed. Both run on the same machine, therefore the result is valid for any processor.
"""

import io
import math
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from callbacks.run.record_file import write_record
from callbacks.run.run_record import cpu_name
from datamodules.errors import UserError
from experiments import METHODS, ROOT
from experiments.results.fingerprint import canonical, code_fingerprint
from experiments.results.records import Record, changed_code, commit, committed_records, differences, record_path
from experiments.results.renames import Renames
from experiments.results.replay import STEPS, Code, Mismatch, Uncheckable, data_hashes, evaluate, replay, result_values
from experiments.results.reproduce import missing_inputs
from experiments.run.recipes import Recipe, recipes
from modules.networks.weights import weights_hash
from modules.training.stages import StagePlan

# Relative tolerances between the metrics of committed weights and those of the record, for means and for single images:
# processors round differently.
MEAN_TOLERANCE, IMAGE_TOLERANCE = 1e-4, 1e-3


@dataclass
class Outcome:
    """Result of the check of one record.

    Args:
        state: "unchanged", "certified", "differs" or "unchecked".
        reasons: the difference and its size, the reason why the record was not checked, or the datasets without comparison.
        seconds: duration of the check in seconds.
    """

    state: str
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(methods: list[str], renames: Renames, updated: Collection[str] = ()) -> bool:
    """Check the records whose code has changed since their certification, and certify those that are reproduced.

    The metrics of committed weights are always compared with the record.

    Args:
        methods: methods whose records are checked.
        renames: names that have changed since the certification.
        updated: metrics with new values, such as "ms-ssim-real": records take those of their committed weights.

    Returns:
        Whether no record differs.

    Raises:
        UserError: there is no git history, tracked files have uncommitted changes, or `renames` contains an unknown recipe.
    """
    head = commit()
    if not head:
        raise UserError(f"--check: {ROOT} is not a git checkout, or git is not installed. Use a checkout of the project")
    if head.endswith("+"):
        raise UserError("--check: tracked files have uncommitted changes; commit the changes first")
    known = {recipe.name for recipe in recipes()}
    if unknown := sorted(set(renames.recipes.values()) - known):
        raise UserError(f"--renames: recipes: no recipe {', '.join(unknown)}. Correct the names in the file")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends replays with this process
    outcomes: list[Outcome] = []
    for recipe in recipes():
        if recipe.name.partition("/")[0] not in methods:
            continue
        records, broken = _records(recipe, renames)
        for reason in broken:
            outcomes.append(Outcome("differs", [reason]))
            print(f"{recipe.name}: {reason}", flush=True)
        for record in records:
            outcome = check_record(record, recipe, renames, head, updated)
            outcomes.append(outcome)
            name = f"{recipe.name}, seed {record['seed']}"
            print(f"{name:48} {outcome.state:10} {outcome.seconds:5.0f} s", flush=True)
            for reason in outcome.reasons:
                print(f"    {reason}", flush=True)
    for path in _orphans(methods, known, renames):
        outcomes.append(Outcome("unchecked"))
        print(f"{path}: the record of no recipe. Add its recipe to `recipes` of --renames, or delete it", flush=True)
    counts = {state: sum(outcome.state == state for outcome in outcomes) for state in dict.fromkeys(o.state for o in outcomes)}
    total = sum(outcome.seconds for outcome in outcomes) / 60
    print(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; {total:.0f} min", flush=True)
    return counts.get("differs", 0) == 0


def _records(recipe: Recipe, renames: Renames) -> tuple[list[Record], list[str]]:
    """Return the records of a recipe, including those with its old name, and the errors of unusable records."""
    names = dict.fromkeys((recipe.name, renames.old_recipe(recipe.name)))
    results = [committed_records(name) for name in names]
    return [record for records, _ in results for record in records], [reason for _, broken in results for reason in broken]


def _orphans(methods: list[str], known: set[str], renames: Renames) -> list[Path]:
    """Return the record files of methods whose file names belong to no recipe."""
    names = {*known, *renames.recipes}
    return [
        path.relative_to(METHODS)
        for method in methods
        for path in sorted((METHODS / method / "records").glob("*.json"))
        if f"{method}/{re.sub(r'-seed[0-9]+$', '', path.stem)}" not in names or not re.search(r"-seed[0-9]+$", path.stem)
    ]


def check_record(record: Record, recipe: Recipe, renames: Renames, head: str, updated: Collection[str] = ()) -> Outcome:
    """Check one record; if the current code reproduces it, apart from the metrics `updated`, certify the record."""
    began = time.monotonic()
    outcome = Outcome("unchanged")
    try:
        renamed = renames.record(record)
        if changed := differences(renamed, canonical(recipe)):
            raise Mismatch(f"the recipe has changed: {'; '.join(changed)}")
        due = bool(changed_code(record, code_fingerprint(recipe))) or renamed != record
        has_weights = recipe.weights.exists() and record["seed"] == 0
        if due or has_weights:
            if missing := missing_inputs(recipe, recipe.is_trainable):
                raise Uncheckable(f"not installed: {', '.join(missing)}")
            with tempfile.TemporaryDirectory() as folder:
                outcome = Outcome("certified" if due else "unchanged")
                codes = list(_codes(record, recipe, renames, Path(folder), both=due))
                certified, metrics = _compare(codes, renamed, recipe, updated)
            outcome.reasons = [f"without {name}, which is not installed" for name in certified["absent"]]
        if due:
            if commit() != head:
                raise Uncheckable("the checkout was changed during the check. Run the check again")
            _certify(record, {**renamed, "metrics": metrics}, recipe, {"commit": head, **certified})
    except Mismatch as mismatch:
        outcome = Outcome("differs", [str(mismatch)])
    except Uncheckable as reason:
        outcome = Outcome("unchecked", [str(reason)])
    except OSError as error:
        outcome = Outcome("unchecked", [f"cannot write {error.filename or tempfile.gettempdir()}: {error.strerror or error}"])
    except RecursionError:
        outcome = Outcome("unchecked", [f"{record['file']} is nested too deeply"])
    outcome.seconds = time.monotonic() - began
    return outcome


def _codes(record: Record, recipe: Recipe, renames: Renames, folder: Path, both: bool) -> Iterator[Code]:
    """Yield the code of the commit that certified the record, if `both`, and the current code.

    Raises:
        Uncheckable: the certified code is not in the git history, or does not have the recipe.
    """
    if both:
        old_commit = (record.get("certified") or record)["commit"]
        if old_commit.endswith("+"):
            raise Uncheckable(f"created in a modified checkout of {old_commit[:-1]}, which is not in the history")
        old_root = folder / "code"
        archive = subprocess.run(["git", "archive", "--format=tar", old_commit], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            raise Uncheckable(f"commit {old_commit} is not in this history: {archive.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(old_root, filter="data")
        method, _, stem = renames.old_recipe(recipe.name).partition("/")
        path = next(old_root.glob(f"experiments/**/{method}/recipes/{stem}.yaml"), None)
        if path is None:
            raise Uncheckable(f"commit {old_commit} has no recipe {method}/{stem}")
        yield Code(old_root, path, folder / "old", renames)
    yield Code(ROOT, recipe.path, folder / "new", Renames())


def _compare(
    codes: list[Code], record: Record, recipe: Recipe, updated: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replay and evaluate with each code version, and compare the results.

    Args:
        codes: the certified and the current code, or only the current code, which then only evaluates the committed weights.
        record: the record, with current names.
        recipe: the current recipe.
        updated: metrics that are not compared.

    Returns:
        Entries of the certificate, and the metrics of the record, with new values of `updated`. "absent" lists the datasets of
        the record that are not installed; each of their protocols is compared on another dataset.

    Raises:
        Mismatch: the results differ, or the current code fails.
        Uncheckable: the certified code fails, data are missing or differ from those of the record, or a metric has new values
            without committed weights.
    """
    committed = recipe.weights.exists() and record["seed"] == 0
    starts: list[int] = []
    if recipe.is_trainable and len(codes) > 1:
        batch_size = record["config"]["data"]["init_args"].get("batch_size")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise Uncheckable("the config of the record has no data.init_args.batch_size")
        starts = stage_starts(recipe, batch_size, record.get("certified", {}).get("starts", []))
        for i, start in enumerate(starts):
            resumed = f"stage-{i - 1}" if i else ""
            replay(codes, record["seed"], batch_size, f"stage-{i}", start, resumed, updated)
    if committed and not codes[0].renames.weights and record.get("weights") != weights_hash(load_file(recipe.weights)):
        raise Mismatch(f"{recipe.weights.relative_to(ROOT)} are not the weights of the record")
    results = evaluate(codes, "" if committed or not recipe.is_trainable else f"stage-{len(starts) - 1}", bool(updated))
    data = data_hashes(codes[-1], trained=bool(starts))
    if changed := [name for name, value in data.items() if record["data"].get(name) != value]:
        raise Uncheckable(f"the installed data differ from those of the record: {', '.join(changed)}")
    if len(codes) > 1:
        pair = without(results[0], updated), without(results[1], updated)
        _compare_metrics(*pair, 0.0, 0.0, "with the certified code", "with the current code")
    present = {dataset: result for dataset, result in results[-1].items() if dataset in record["metrics"]}
    absent = sorted(record["metrics"].keys() - present.keys())
    evaluated_protocols = {protocol for result in present.values() for protocol in result}
    if not all(record["metrics"][dataset].keys() <= evaluated_protocols for dataset in absent):
        raise Uncheckable(f"not installed: {', '.join(absent)}")
    if committed or not recipe.is_trainable:
        recorded = {dataset: record["metrics"][dataset] for dataset in present}
        pair = without(recorded, updated), without(present, updated)
        _compare_metrics(*pair, MEAN_TOLERANCE, IMAGE_TOLERANCE, "in the record", "with its weights")
    certificate = {
        "steps": STEPS if starts else 0,
        "starts": starts,
        "evaluated": "committed weights" if committed else "replay" if recipe.is_trainable else "no weights needed",
        "absent": absent,
        "processor": cpu_name(),
    }
    return certificate, updated_metrics(record, results, committed or not recipe.is_trainable, updated)


def updated_metrics(record: Record, results: list[dict[str, Any]], exact: bool, updated: Collection[str]) -> dict[str, Any]:
    """Return the metrics of a record, with new values of `updated`.

    Args:
        record: the record.
        results: results of the certified and the current code.
        exact: whether they are those of the weights of the record. Otherwise, they are those of the replay, and a metric has a
            new value only if it does not depend on the weights: with the certified code, it has the value of the record.
        updated: metrics with new values.

    Raises:
        Uncheckable: a metric depends on weights that are not committed, or its dataset is not installed.
    """
    metrics = deepcopy(record["metrics"])
    for dataset, protocols in metrics.items():
        for protocol in [name for name in protocols if is_any_of(name, updated)]:
            before, after = (result.get(dataset, {}).get(protocol) for result in (results[0], results[-1]))
            if not exact and before == after and before is not None:
                continue
            recorded = result_values(protocols[protocol])
            kept = before is not None and all(
                isclose(before.get(name, math.nan), value, MEAN_TOLERANCE) for name, value in recorded.items()
            )
            if after is None or not (exact or kept):
                raise Uncheckable(f"{dataset}/{protocol}: no committed weights and data to update it. Run the recipe again")
            images = {name.removeprefix("image "): value for name, value in after.items() if name != "mean"}
            protocols[protocol] = {"mean": after["mean"], "images": images}
    return metrics


def isclose(left: float, right: float, tolerance: float) -> bool:
    """Return whether two values are equal within a relative tolerance; nan is equal to nan."""
    same = left == right or (math.isnan(left) and math.isnan(right))
    return same or math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance * 1e-3)


def is_any_of(protocol: str, metrics: Collection[str]) -> bool:
    """Return whether a protocol, such as "fid/inception-tf-10000", belongs to one of the metrics, such as "fid"."""
    return protocol.partition("/")[0] in metrics


def without(results: dict[str, Any], metrics: Collection[str]) -> dict[str, Any]:
    """Return results by dataset and protocol without those of the metrics."""
    return {
        dataset: {protocol: value for protocol, value in protocols.items() if not is_any_of(protocol, metrics)}
        for dataset, protocols in results.items()
    }


def stage_starts(recipe: Recipe, batch_size: int, certified: list[int]) -> list[int]:
    """Return the images seen at the start of each stage of a training, rounded up to whole batches; the first is 0.

    Args:
        recipe: the current recipe.
        batch_size: images per batch.
        certified: starts that the last check replayed; stages that the current code no longer has are replayed too.

    Raises:
        Mismatch: the current code cannot create the model.
    """
    try:
        with torch.device("meta"):
            method = recipe.load_class("model")(**recipe.content["model"]["init_args"])
    except (ImportError, AttributeError, SyntaxError, TypeError, UserError) as error:
        raise Mismatch(f"the current code cannot create the model: {error}") from None
    starts = sorted({*StagePlan(method.stages(), batch_size).starts, *certified})
    return [start for start in starts if start < method.total_images]


def _compare_metrics(
    old: dict[str, Any], new: dict[str, Any], mean_tolerance: float, image_tolerance: float, one: str, other: str
) -> None:
    for dataset in old.keys() | new.keys():
        for protocol in old.get(dataset, {}).keys() | new.get(dataset, {}).keys():
            pair = [side.get(dataset, {}).get(protocol) for side in (old, new)]
            left, right = (value if value is None or "images" not in value else result_values(value) for value in pair)
            if left is None or right is None:
                raise Mismatch(f"{dataset}/{protocol}: only {one if right is None else other}")
            for name in left.keys() | right.keys():
                values = left.get(name, math.nan), right.get(name, math.nan)
                tolerance = mean_tolerance if name == "mean" else image_tolerance
                if not isclose(*values, tolerance):
                    raise Mismatch(f"{dataset}/{protocol}, {name}: {values[0]:.8g} {one}, {values[1]:.8g} {other}")


def _certify(record: Record, renamed: Record, recipe: Recipe, certified: dict[str, Any]) -> None:
    """Write a record with its certificate and with current names; delete the file with the old name."""
    path, old = record_path(recipe, record["seed"]), ROOT / record["file"]
    write_record({**renamed, "certified": {**certified, "code": code_fingerprint(recipe)}}, path)
    if old != path:
        old.unlink()
