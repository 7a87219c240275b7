"""A paper's tables, rendered from run records alone: the paper's figure, ours, the difference, and the state of each cell.

Nothing heavy is imported here.
"""

import statistics
from typing import Any

import yaml

from experiments import METHODS
from experiments.results.records import committed_records, fingerprints
from experiments.run.recipes import find_recipe

Cell = dict[str, Any]
MARKS = {
    "V": "read in a source",
    "C": "[C] recomputed",
    "M+": "[M+] from memory, passing an arithmetic check",
    "M": "(unverified) from memory alone",
}


def spec(method: str) -> dict[str, Any]:
    """The tables of a method's paper as `table.yaml` states them; empty if it has none."""
    path = METHODS / method / "table.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {"tables": []}


def cells(method: str) -> list[Cell]:
    """All cells of a method's tables.

    A table says what is `better`, "higher" (the default) or "lower", and with how many `decimals` (2) its figures are shown;
    a row's figure of the paper may be null: it has none. Each cell has `table`, `row`, `dataset`, `metric` (the protocol's
    name), `decimals`, `paper`, `mark` (how sure the paper's figure is), `ours`, `std` and `seeds` (None and 0 without a
    record), `difference`, `state` and `record` (the files).
    """
    return [
        _cell(table, row, data_set, paper)
        for table in spec(method)["tables"]
        for row in table["rows"]
        for data_set, paper in row["paper"].items()
    ]


def _cell(table: dict[str, Any], row: dict[str, Any], data_set: str, paper: float | None) -> Cell:
    metric = row.get("metric", table["metric"])
    found = []
    for record in _records(row):
        if (value := figure(record, data_set, metric, table.get("average", {}))) is not None:
            found.append((record, value))
    values = [value for _, value in found]
    mean = statistics.fmean(values) if values else None
    cell = {
        "table": table["table"],
        "row": row["row"],
        "dataset": data_set,
        "metric": metric,
        "decimals": table.get("decimals", 2),
        "paper": paper,
        "mark": row.get("marks", {}).get(data_set, table["mark"]),
        "ours": None if mean is None else round(mean, 8),
        "std": round(statistics.stdev(values), 8) if len(values) > 1 else None,
        "seeds": len(values),
        "difference": None if mean is None or paper is None else round(mean - paper, 8),
        "record": [record["file"] for record, _ in found],
    }
    return {**cell, "state": _state(cell, row, [record for record, _ in found], table.get("better", "higher"))}


def _records(row: dict[str, Any]) -> list[dict[str, Any]]:
    return committed_records(row["recipe"]) if "recipe" in row else []


def figure(record: dict[str, Any], data_set: str, metric: str, average: dict[str, int]) -> float | None:
    """A record's figure: of a data set, of one picture ("set14/baboon"), or the mean over all pictures ("average")."""
    metrics = record.get("metrics", {})
    if data_set == "average":
        parts = [(figure(record, name, metric, {}), count) for name, count in average.items()]
        known = [(value, count) for value, count in parts if value is not None]
        if len(known) < len(parts):
            return None
        return sum(value * count for value, count in known) / sum(count for _, count in known)
    name, _, picture = data_set.partition("/")
    measured = metrics.get(name, {}).get(metric)
    if measured is None:
        return None
    value = measured["pictures"].get(picture) if picture else measured["mean"]
    return None if value is None else float(value)


def _state(cell: Cell, row: dict[str, Any], records: list[dict[str, Any]], better: str) -> str:
    if not records:
        return f"not run: {_why_not(cell, row)}"
    current = fingerprints(find_recipe(row["recipe"]))
    changed = sorted({part for record in records for part in current if record["fingerprints"].get(part) != current[part]})
    if changed:
        return f"stale: {', '.join(changed)} changed since"
    if cell["paper"] is None:
        return "measured"
    sign = -1 if better == "lower" else 1
    ahead = sign * (round(cell["ours"], cell["decimals"]) - cell["paper"])
    if row.get("exact") and ahead > 0.02 + 1e-9:
        return f"over by {ahead:.2f}"
    missed = ahead < (-0.02 if row.get("exact") else 0) - 1e-9
    return f"short by {-sign * cell['difference']:.{cell['decimals']}f}" if missed else "reproduced"


def _why_not(cell: Cell, row: dict[str, Any]) -> str:
    """From what is committed alone, so that a table reads the same on every machine."""
    if "why" in row:
        return row["why"]
    if _records(row):
        return "not all of its sets are measured" if cell["dataset"] == "average" else "its pictures were not at hand"
    return f"no record of {row['recipe']} yet"


def paper(cell: Cell) -> str:
    """The paper's figure; empty if it has none."""
    return "" if cell["paper"] is None else f"{cell['paper']:.{cell['decimals']}f}"


def ours(cell: Cell) -> str:
    """Our figure, with mean and spread where there are several seeds; empty if there is none."""
    if cell["ours"] is None:
        return ""
    places = cell["decimals"]
    spread = f" ± {cell['std']:.{places}f} ({cell['seeds']} seeds)" if cell["std"] is not None else ""
    return f"{cell['ours']:.{places}f}{spread}"


def render(method: str) -> str:
    """A method's tables in Markdown."""
    lines: list[str] = []
    of_method = cells(method)
    for table in spec(method)["tables"]:
        lines += [f"**{table['table']}.** {table['caption']} Protocol: `{table['metric']}`.", ""]
        lines += ["| row | data set | paper | ours | difference | state |", "|---|---|---:|---:|---:|---|"]
        for cell in (cell for cell in of_method if cell["table"] == table["table"]):
            mark = {"V": "", "M": " (unverified)"}.get(cell["mark"], f" [{cell['mark']}]") if cell["paper"] is not None else ""
            difference = "" if cell["difference"] is None else f"{cell['difference']:+.{cell['decimals']}f}"
            figures = f"{paper(cell)}{mark} | {ours(cell)} | {difference}"
            lines.append(f"| {cell['row']} | {cell['dataset']} | {figures} | {cell['state']} |")
        lines += ["", *([table["note"].strip(), ""] if "note" in table else [])]
    used = {cell["mark"] for cell in of_method if cell["paper"] is not None}
    if used:
        lines.append("How sure the paper's figures are: " + "; ".join(MARKS[mark] for mark in MARKS if mark in used) + ".")
    return "\n".join(lines)
