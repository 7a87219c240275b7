"""Tables of a paper, rendered from run records: the paper's value, our value, the difference, and the state of each cell.

This module imports no heavy packages.
"""

import math
import statistics
from functools import cache
from typing import Any

from datamodules.errors import UserError
from experiments import METHODS
from experiments.results.fingerprint import canonical, code_fingerprint
from experiments.results.records import Record, changed_code, committed_records, differences
from experiments.run.recipes import find_recipe
from experiments.run.yaml_file import read_yaml

Cell = dict[str, Any]
NOT_RUN = "not run: "
PROVENANCE = {
    "V": "read in a source",
    "C": "[C] recomputed",
    "M+": "[M+] from memory, confirmed by an arithmetic check",
    "M": "(unverified) from memory alone",
}


def load_table(method: str) -> dict[str, Any]:
    """Return the content of a method's `table.yaml`; without the file, `{"tables": []}`."""
    path = METHODS / method / "table.yaml"
    return read_yaml(path) if path.exists() else {"tables": []}


def cells(method: str, check: bool = True) -> list[Cell]:
    """Return all cells of a method's tables.

    With `check=False`, `checked` is empty, and the code of the recipes is not read, which takes seconds for all methods.

    In `table.yaml`, `better` of a table is "higher" (the default) or "lower", and `decimals` is the number of decimals of its
    values (default 2). `comparable: false` means that the paper used another protocol. The paper's value in a row may be null.
    A table has one `metric`, or `columns` with the metric of each; the paper's values in a row are then a map of columns.

    Returns:
        Cells with the keys `table`, `row`, `dataset`, `column` (empty in a table with one metric), `metric` (name of the
        protocol), `decimals`, `paper` (value or None), `provenance` (key of `PROVENANCE`), `ours` (mean over seeds or None),
        `std` (None below two seeds), `seeds` (number of records), `difference`, `state`, `checked` and `record` (paths of the
        record files).
    """
    files = _Files(check)
    return [
        _cell(table, row, dataset, paper, files, column)
        for table in load_table(method)["tables"]
        for row in table["rows"]
        for dataset, papers in row["paper"].items()
        for column, paper in _paper_values(table, papers).items()
    ]


def _paper_values(table: dict[str, Any], papers: Any) -> dict[str, float | None]:
    """Return the paper's values by column; null in the file is None in each column."""
    if "columns" not in table:
        return {"": papers}
    return dict.fromkeys(table["columns"]) if papers is None else papers


class _Files:
    """Functions that read the records, the content and the code of a recipe, by its name. Each file is read once."""

    def __init__(self, check: bool = True) -> None:
        self.check = check
        self.records = cache(committed_records)
        self.content = cache(lambda name: canonical(find_recipe(name)))
        self.code = cache(lambda name: code_fingerprint(find_recipe(name)))


def _cell(
    table: dict[str, Any], row: dict[str, Any], dataset: str, paper: float | None, files: _Files, column: str = ""
) -> Cell:
    metric = table["columns"][column] if column else row.get("metric", table["metric"])
    records, broken = files.records(row["recipe"]) if "recipe" in row else ([], [])
    used = []
    for record in records:
        if (value := record_value(record, dataset, metric, table.get("average", {}))) is not None:
            used.append((record, value))
    values = [value for _, value in used]
    is_finite = all(map(math.isfinite, values))
    mean = statistics.fmean(values) if values and is_finite else None
    cell = {
        "table": table["table"],
        "row": row["row"],
        "dataset": dataset,
        "column": column,
        "metric": metric,
        "decimals": table.get("decimals", 2),
        "paper": paper,
        "provenance": row.get("provenances", {}).get(dataset, table["provenance"]),
        "ours": None if mean is None else round(mean, 8),
        "std": round(statistics.stdev(values), 8) if len(values) > 1 and is_finite else None,
        "seeds": len(values),
        "difference": None if mean is None or paper is None else round(mean - paper, 8),
        "record": [record["file"] for record, _ in used],
    }
    sources = [record for record, _ in used]
    names = set(table.get("average", {})) if dataset == "average" else {dataset.partition("/")[0]}
    try:
        state = _state(cell, table, row, sources, bool(records), broken, files)
        return {**cell, "state": state, "checked": _checked(row, names, sources, files)}
    except UserError as error:  # a missing recipe, or a file with a syntax error
        return {**cell, "state": f"{NOT_RUN}{error}", "checked": ""}


def record_value(record: Record, dataset: str, metric: str, average: dict[str, int]) -> float | None:
    """Return the value of a record for a dataset, for one image ("set14/baboon"), or for "average".

    Args:
        record: the run record.
        dataset: name of a dataset, "dataset/image", or "average" for the mean over all images of several datasets.
        metric: name of the protocol.
        average: number of images of each dataset of the average.

    Returns:
        The value; None if the record does not contain it.
    """
    metrics = record.get("metrics", {})
    if dataset == "average":
        parts = [(record_value(record, name, metric, {}), count) for name, count in average.items()]
        known = [(value, count) for value, count in parts if value is not None]
        if len(known) < len(parts):
            return None
        return sum(value * count for value, count in known) / sum(count for _, count in known)
    name, _, image = dataset.partition("/")
    result = metrics.get(name, {}).get(metric)
    if result is None:
        return None
    value = result["images"].get(image) if image else result["mean"]
    return None if value is None else float(value)


def _state(
    cell: Cell,
    table: dict[str, Any],
    row: dict[str, Any],
    records: list[Record],
    has_records: bool,
    broken: list[str],
    files: _Files,
) -> str:
    if broken:
        return f"broken record: {'; '.join(broken)}"
    if not records:
        return f"{NOT_RUN}{_why_not(cell, row, has_records)}"
    content = files.content(row["recipe"])
    if changed := list(dict.fromkeys(line for record in records for line in differences(record, content))):
        return f"stale: the recipe has changed: {'; '.join(changed)}"
    state = _verdict(cell, table, row)
    if any(record["commit"].endswith("+") for record in records):
        state += ", made in a modified checkout"
    return state


def _verdict(cell: Cell, table: dict[str, Any], row: dict[str, Any]) -> str:
    if cell["ours"] is None:
        return "not finite"
    if cell["paper"] is None:
        return "measured"
    if not table.get("comparable", True):
        return "not comparable"
    sign = -1 if table.get("better") == "lower" else 1
    ahead = sign * (round(cell["ours"], cell["decimals"]) - cell["paper"])
    if row.get("exact") and ahead > 0.02 + 1e-9:
        return f"over by {ahead:.2f}"
    missed = ahead < (-0.02 if row.get("exact") else 0) - 1e-9
    return f"short by {-sign * cell['difference']:.{cell['decimals']}f}" if missed else "reproduced"


def _checked(row: dict[str, Any], datasets: set[str], records: list[Record], files: _Files) -> str:
    """Return the certified commits and the datasets without a check; "check due: ..." if the code has changed."""
    if not (records and files.check):
        return ""
    code = files.code(row["recipe"])
    if changed := {part for record in records for part in changed_code(record, code)}:
        return f"check due: code of {' and '.join(sorted(changed))}"
    commits = ", ".join(dict.fromkeys(record.get("certified", record)["commit"][:7] for record in records))
    absent = {name for record in records for name in record.get("certified", {}).get("absent", [])}
    return f"{commits}, without {', '.join(sorted(absent & datasets))}" if absent & datasets else commits


def _why_not(cell: Cell, row: dict[str, Any], has_records: bool) -> str:
    """Return why a cell has no value. Only committed files are used, so that tables are equal on all machines."""
    if "reason" in row:
        return row["reason"]
    if has_records:
        return "not all of its datasets are evaluated" if cell["dataset"] == "average" else "its images were not available"
    return "no record yet"


def format_paper(cell: Cell) -> str:
    """Format the paper's value; empty if there is none."""
    return "" if cell["paper"] is None else f"{cell['paper']:.{cell['decimals']}f}"


def format_provenance(cell: Cell) -> str:
    """Format the provenance of the paper's value as a suffix; empty if the value was read in a source."""
    if cell["paper"] is None or cell["provenance"] == "V":
        return ""
    return " (unverified)" if cell["provenance"] == "M" else f" [{cell['provenance']}]"


def format_ours(cell: Cell) -> str:
    """Format our value, for several seeds as mean and standard deviation; empty if there is none."""
    if cell["ours"] is None:
        return ""
    places = cell["decimals"]
    spread = f" ± {cell['std']:.{places}f} ({cell['seeds']} seeds)" if cell["std"] is not None else ""
    return f"{cell['ours']:.{places}f}{spread}"


def render(method: str, only: str | None = None, brief: bool = False) -> str:
    """Render a method's tables in Markdown: one line per cell that was run, then the other cells by their reason.

    The protocol of a row is next to its name if it differs from that of the table.

    Args:
        method: the method.
        only: a part of the names of the tables; None for all tables.
        brief: leave out what a check is due to, for a terminal.

    Raises:
        UserError: the method has no table with such a name.
    """
    lines: list[str] = []
    of_method = [{**cell, "checked": cell["checked"].partition(":")[0]} if brief else cell for cell in cells(method)]
    known = load_table(method)["tables"]
    tables = [table for table in known if (only or "").lower() in table["table"].lower()]
    if not tables:
        raise UserError(f"--table {only}: no such table. Use one of: {'; '.join(table['table'] for table in known)}")
    for table in tables:
        of_table = [cell for cell in of_method if cell["table"] == table["table"]]
        lines += [f"**{table['table']}.** {table['caption']} {_protocols(table)}.", ""]
        not_run = [cell for cell in of_table if cell["state"].startswith(NOT_RUN)]
        if run := [cell for cell in of_table if not cell["state"].startswith(NOT_RUN)]:
            lines += ["| row | dataset | paper | ours | difference | state | checked |", "|---|---|---:|---:|---:|---|---|"]
            lines += [*(_table_line(cell, table) for cell in run), ""]
        lines += _not_run_lines(not_run, table)
        lines += [table["note"].strip(), ""] if "note" in table else []
    names = {table["table"] for table in tables}
    used = {cell["provenance"] for cell in of_method if cell["paper"] is not None and cell["table"] in names}
    if used:
        marks = "; ".join(PROVENANCE[mark] for mark in PROVENANCE if mark in used)
        lines.append(f"Provenance of the paper's values: {marks}.")
    return "\n".join(lines)


def _protocols(table: dict[str, Any]) -> str:
    if "columns" not in table:
        return f"Protocol: `{table['metric']}`"
    return "Protocols: " + ", ".join(f"{column} `{metric}`" for column, metric in table["columns"].items())


def _row_name(cell: Cell, table: dict[str, Any]) -> str:
    """Return the row with its column, or with its protocol if that of the table is another."""
    if cell["column"]:
        return f"{cell['row']}: {cell['column']}"
    return cell["row"] if cell["metric"] == table["metric"] else f"{cell['row']} (`{cell['metric']}`)"


def _table_line(cell: Cell, table: dict[str, Any]) -> str:
    difference = "" if cell["difference"] is None else f"{cell['difference']:+.{cell['decimals']}f}"
    columns = [
        _row_name(cell, table),
        cell["dataset"],
        _paper(cell),
        format_ours(cell),
        difference,
        cell["state"],
        cell["checked"],
    ]
    return f"| {' | '.join(columns)} |"


def _paper(cell: Cell) -> str:
    return f"{format_paper(cell)}{format_provenance(cell)}"


def _not_run_lines(of_table: list[Cell], table: dict[str, Any]) -> list[str]:
    """Return the rows of each reason with the paper's values: one line, or a table if there are columns."""
    by_reason: dict[str, list[Cell]] = {}
    for cell in of_table:
        by_reason.setdefault(cell["state"].removeprefix(NOT_RUN), []).append(cell)
    lines = []
    for reason, group in by_reason.items():
        datasets = list(dict.fromkeys(cell["dataset"] for cell in group))
        beginning = "In the paper" if any(cell["paper"] is not None for cell in group) else "Rows"
        beginning = f"Not run ({reason}). {beginning}" + (f" on {datasets[0]}:" if len(datasets) == 1 else ":")
        if "columns" in table:
            lines += [beginning, "", *_column_lines(group, list(table["columns"]), len(datasets) > 1), ""]
        else:
            lines += [f"{beginning} {'; '.join(_row_values(group, table, len(datasets) > 1))}.", ""]
    return lines


def _row_values(group: list[Cell], table: dict[str, Any], several_datasets: bool) -> list[str]:
    """Format each row with the paper's values, and with the datasets if there are several."""
    by_row: dict[str, list[str]] = {}
    for cell in group:
        value = f"{cell['dataset']} {_paper(cell)}".strip() if several_datasets else _paper(cell)
        by_row.setdefault(_row_name(cell, table), []).append(value)
    if several_datasets:
        return [f"{row}: {', '.join(values)}" for row, values in by_row.items()]
    return [" ".join([row, *values]).strip() for row, values in by_row.items()]


def _column_lines(group: list[Cell], columns: list[str], several_datasets: bool) -> list[str]:
    """Format a table of the paper's values."""
    by_row: dict[str, dict[str, str]] = {}
    for cell in group:
        row = f"{cell['row']} | {cell['dataset']}" if several_datasets else cell["row"]
        by_row.setdefault(row, {})[cell["column"]] = _paper(cell)
    used = [column for column in columns if any(column in values for values in by_row.values())]
    names = ["row", "dataset"] if several_datasets else ["row"]
    head = [f"| {' | '.join([*names, *used])} |", f"|{'---|' * len(names)}{'---:|' * len(used)}"]
    return head + [f"| {row} | {' | '.join(values.get(column, '') for column in used)} |" for row, values in by_row.items()]
