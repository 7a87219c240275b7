"""`darkroom reproduce`: run the recipes of a paper's tables, save their records in the project, and render the tables."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from callbacks.run.exit_codes import INTERRUPTED, PREEMPTED
from callbacks.run.record_file import read_record, write_record
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from experiments import METHODS, ROOT
from experiments.results.fingerprint import canonical, code_fingerprint, recipe_fingerprint
from experiments.results.headers import write_time
from experiments.results.records import Record, changed_code, committed_records, differences, record_path
from experiments.results.tables import cells, format_ours, format_paper, format_provenance, load_table, render
from experiments.run.paths import runs_root
from experiments.run.recipes import Recipe, find_recipe, methods, recipes
from experiments.run.run_dir import Run

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
MAX_WEIGHT_BYTES = 8 * 2**20  # larger weights are not committed
RESULTS = ROOT / "experiments/RESULTS.md"
REPLAY_STEPS = 100  # steps that are replayed if other code started a run; at least two rows of its log


def reproduce(
    method: str, run: bool, seeds: int, only: str | None, write: bool, as_json: bool, table: str | None = None
) -> None:
    """Render a method's tables; with `run`, first run the recipes without a current record whose data are available.

    Raises:
        UserError: the method does not exist or has no tables, an option is invalid, or a run failed.
    """
    tabled = [name for name in methods() if load_table(name)["tables"]]
    if method not in tabled:
        others = [
            name for name in tabled if any(recipe.name.startswith(f"{method}/") for recipe in recipes_in_tables(name, None))
        ]
        advice = (
            f"Its recipes are rows of the tables of {' and '.join(others)}" if others else f"Use one of: {', '.join(tabled)}"
        )
        raise UserError(f"reproduce: no tables for '{method}'. {advice}")
    if not run and (only or seeds != 1):
        raise UserError("reproduce: --seeds and --only require --run; add --run")
    if table and (run or write or as_json):
        raise UserError("reproduce: --table prints tables only. Remove --run, --write and --json, or --table")
    if seeds < 1:
        raise UserError(f"reproduce: --seeds {seeds}: must be at least 1")
    if run:
        for recipe in recipes_in_tables(method, only):
            run_recipe(recipe, seeds)
    if write:
        write_pages(method)
    if as_json:
        print(json.dumps(cells(method), indent=1))
    else:
        Console().print(Markdown(render(method, table, brief=True)))


def recipes_in_tables(method: str, only: str | None) -> list[Recipe]:
    """List the recipes of a method's tables, each once; only the recipe `only` if it is given.

    Raises:
        UserError: the tables do not contain the recipe `only`.
    """
    names = dict.fromkeys(row["recipe"] for table in load_table(method)["tables"] for row in table["rows"] if "recipe" in row)
    if only and only not in names:
        raise UserError(f"--only: no row of {method}'s tables uses '{only}'. Use one of: {', '.join(names)}")
    return [find_recipe(name) for name in names if only in (None, name)]


def run_recipe(recipe: Recipe, seeds: int) -> None:
    """Run the seeds without a record of the current recipe, if the data are available, and save their records.

    If only the code of a record has changed, the seed is not run again; `--check` checks the record.

    Raises:
        UserError: a run failed, or its record cannot be used.
    """
    learns = recipe.is_trainable
    content = canonical(recipe)
    current = {record["seed"]: record for record in committed_records(recipe.name)[0] if not differences(record, content)}
    if 0 in current and (sets := unevaluated_sets(recipe, current[0])):
        words = ["--ckpt", str(recipe.weights)] if learns else []
        run_command("test", recipe.name, *words, "--data.test", json.dumps(sets), "--record", str(record_path(recipe, 0)))
    if missing := missing_inputs(recipe, learns):
        print(f"{recipe.name}: skipped, not installed: {', '.join(missing)}", flush=True)
        return
    for seed in range(seeds if learns else 1):
        if seed in current:
            due = changed_code(current[seed], code_fingerprint(recipe))
            print(f"{recipe.name}: the record of seed {seed} is current{', but a check is due' if due else ''}", flush=True)
            continue
        if learns:
            version = recipe_fingerprint(recipe) + json.dumps(code_fingerprint(recipe))  # a change starts a new run
            name = f"reproduce-seed{seed}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"
            run = Run(runs_root() / recipe.name / name)
            if not run.evaluated:
                run_command("fit", recipe.name, "--seed_everything", str(seed), "--run", name)
            commit_record(run, recipe)
        else:
            path = record_path(recipe, seed)
            path.parent.mkdir(exist_ok=True)
            run_command("test", recipe.name, "--record", str(path))


def run_command(*words: str) -> None:
    """Run a `darkroom` command in a separate process.

    Raises:
        UserError: the command failed; its output contains the error.
        SystemExit: the command was interrupted; its output contains the command that resumes it.
    """
    environment = {key: value for key, value in os.environ.items() if key != "DARKROOM_RUN_FOLDER"}
    print("darkroom " + " ".join(words), flush=True)
    process = subprocess.Popen([sys.executable, "-m", "experiments", *words], env=environment)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        status = _wait_for(process)
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (PREEMPTED, INTERRUPTED):
        print("Run the same command to resume.", flush=True)
        raise SystemExit(status)
    if status:
        raise UserError(f"darkroom {' '.join(words)} failed with status {status}. See the error above")


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process and return its exit status. After Ctrl-C, the process saves its state before it exits."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def missing_inputs(recipe: Recipe, learns: bool) -> list[str]:
    """List the inputs that a recipe lacks: its training data, or all of its test sets."""
    data: dict[str, Any] = recipe.content["data"].get("init_args", {})
    needed = [name for name in (data.get("train"), data.get("val")) if name and learns]
    tests = data.get("test", [])
    return [name for name in needed if not is_available(recipe, name)] or (
        [] if any(is_available(recipe, name) for name in tests) else tests
    )


def unevaluated_sets(recipe: Recipe, record: Record) -> list[str]:
    """List the recipe's test sets that are available but not in its record."""
    tests = recipe.content["data"].get("init_args", {}).get("test", [])
    return [name for name in tests if name.replace("/", "-") not in record["metrics"] and is_available(recipe, name)]


def is_available(recipe: Recipe, spec: str) -> bool:
    """Return whether the datamodule of a recipe finds the dataset `spec`."""
    try:
        return recipe.load_class("data").is_installed(spec, recipe.content["data"].get("init_args", {}))
    except DatasetNotFound:
        return False


def commit_record(run: Run, recipe: Recipe) -> None:
    """Copy the record of a finished run, and the weights of seed 0, into the project.

    If other code started the run, the current code must reproduce its first steps (`replay`).

    Raises:
        UserError: recipe or code of the run are not the current ones, the run was not evaluated, or the replay differs.
    """
    from experiments.run.export import export
    from modules.networks.weights import inference_state_dict, read_checkpoint

    record = read_record(run.record)
    changed = [*differences(record, canonical(recipe)), *changed_code(record, code_fingerprint(recipe))]
    if changed or [word for word in record["overrides"] if word.startswith(("--model", "--data", "--trainer"))]:
        raise UserError(f"{run.folder} is not a run of the current {recipe.name}; repeat it: {changed or record['overrides']}")
    if "metrics" not in record:
        raise UserError(f"{run.folder} has not been evaluated on its test sets. Install one of them, and run the command again")
    if any(segment["code"] != record["code"] for segment in record["previous_segments"]):
        record["replayed_images"] = replay(run, recipe, record["seed"])
    write_record(record, record_path(recipe, record["seed"]))
    weights = inference_state_dict(recipe.load_class("model"), read_checkpoint(run.best_checkpoint)["state_dict"])
    if record["seed"] == 0 and sum(tensor.nbytes for tensor in weights.values()) <= MAX_WEIGHT_BYTES:
        recipe.weights.parent.mkdir(exist_ok=True)
        export(recipe, ["--ckpt", str(run.best_checkpoint)], recipe.weights)


def replay(run: Run, recipe: Recipe, seed: int) -> int:
    """Repeat the first steps of a run with the current code, and compare the logs exactly.

    Returns:
        The number of images seen in these steps.

    Raises:
        UserError: the logs differ or contain no step, or the replay failed.
    """
    from callbacks.run.csv_logger import TRAINING, read_metrics_csv

    repeated = Run(runs_root() / recipe.name / f"replay-of-{run.folder.name}")
    shutil.rmtree(repeated.folder, ignore_errors=True)
    words = ["--seed_everything", str(seed), "--run", repeated.folder.name, "--data.test", "[]"]
    run_command("fit", str(recipe.path), *words, "--trainer.max_steps", str(REPLAY_STEPS))
    rows = [row for row in read_metrics_csv(repeated.log) if row["name"].startswith(TRAINING)]
    shutil.rmtree(repeated.folder)
    images = max((int(row["images"]) for row in rows), default=0)
    began = [row for row in read_metrics_csv(run.log) if row["name"].startswith(TRAINING) and int(row["images"]) <= images]
    if not rows or rows != began:
        raise UserError(
            f"{run.folder} was started with other code, and the current code does not reproduce its first steps. Repeat the run"
        )
    return images


def write_pages(method: str) -> None:
    """Write the rendered tables into the method's page, the results page and the README."""
    for page, text in ((METHODS / method / "README.md", render(method)), (ROOT / "README.md", summary())):
        page.write_text(between_marks(page.read_text(), text))
    RESULTS.write_text(results_page())
    for recipe in recipes():
        if recipe.name.startswith(f"{method}/"):
            write_time(recipe)


def results_page() -> str:
    """Render the tables of all methods."""
    parts = ["# Results", "", "Rendered from the records by `darkroom reproduce METHOD --write`. Do not edit."]
    for method in methods():
        if load_table(method)["tables"]:
            parts += ["", f"## {load_table(method)['title']}", "", load_table(method)["paper"], "", render(method)]
    return "\n".join(parts) + "\n"


def summary() -> str:
    """Render the cells of all methods that have a value of ours and a value of the paper on a whole dataset."""
    lines = ["| method | row | dataset | protocol | paper | ours | state |", "|---|---|---|---|---:|---:|---|"]
    for method in methods():
        for cell in cells(method):
            if None in (cell["ours"], cell["paper"]) or "/" in cell["dataset"]:
                continue
            row = f"{cell['table']}: {cell['row']}"
            values = f"{format_paper(cell)}{format_provenance(cell)} | {format_ours(cell)} | {cell['state']}"
            lines.append(f"| {method} | {row} | {cell['dataset']} | `{cell['metric']}` | {values} |")
    return "\n".join(lines)


def between_marks(page: str, text: str) -> str:
    """Replace the text between the marks `BEGIN` and `END` of a page."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
