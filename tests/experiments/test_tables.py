"""Tables rendered from records: the states of their cells."""

import re

import pytest

from datamodules.errors import UserError
from experiments.results import tables
from experiments.results.fingerprint import canonical, code_fingerprint
from experiments.run.recipes import find_recipe
from tests.helpers.record_helpers import a_record


@pytest.fixture
def one_row(monkeypatch):
    """Return a function that creates a table cell from a record with the given changes."""

    def cell(paper, row=None, dataset="set5", settings=None, **changes):
        record = {**a_record(**changes), "file": "a.json"}
        monkeypatch.setattr(tables, "committed_records", lambda name: ([record], []))
        table = {"table": "T", "metric": "m", "provenance": "V", **(settings or {})}
        return tables._cell(table, {"row": "r", "recipe": "bicubic/x3", **(row or {})}, dataset, paper, tables._Files())

    return cell


def test_cell_state_follows_the_difference_from_the_paper(one_row):
    assert one_row(30.0)["state"] == "reproduced"
    assert one_row(29.5)["state"] == "reproduced"  # better than the paper
    assert one_row(29.5, {"exact": True})["state"] == "over by 0.50"  # but exact rows must match the paper
    assert one_row(30.55)["state"] == "short by 0.55"
    assert one_row(29.5, settings={"better": "lower"})["state"] == "short by 0.50"
    assert one_row(29.5, settings={"comparable": False})["state"] == "not comparable"
    assert one_row(30.0, commit="abcdef0+")["state"] == "reproduced, made in a modified checkout"
    assert one_row(31.0, dataset="set5/bird")["ours"] == 31.0
    assert one_row(31.0, dataset="set14")["state"] == "not run: its images were not available"


@pytest.mark.parametrize("method", ["espcn", "cyclegan"])
def test_cells_without_runs_are_listed_in_one_line_per_reason(method):
    lines = tables.render(method).splitlines()
    assert not [line for line in lines if line.startswith("| ") and "not run" in line]
    for cell in tables.cells(method):
        if cell["state"].startswith("not run: "):
            reason = f"Not run ({cell['state'].removeprefix('not run: ')})."
            value = tables.format_paper(cell)
            assert any(line.startswith(reason) and cell["row"] in line and value in line for line in lines), cell


def test_columns_have_a_metric_each(monkeypatch):
    """Cells that were run have a line each; the others have a table with the columns that contain a value."""
    record = {**a_record(metrics={"set5": {"m": {"mean": 30.0, "images": {"a": 30.0}}}}), "file": "a.json"}
    monkeypatch.setattr(tables, "committed_records", lambda name: ([record], []))
    rows = [
        {"row": "ours", "recipe": "bicubic/x3", "paper": {"set5": {"A": 29.0, "B": 31.0}}},
        {"row": "open", "recipe": "bicubic/x3", "paper": {"set5": None}},
        {"row": "other", "reason": "quoted", "paper": {"set5": {"C": 7.0}, "set14": {"B": 8.0, "C": 9.0}}},
    ]
    table = {"table": "T", "caption": "C.", "columns": {"A": "m", "B": "n", "C": "o"}, "provenance": "V", "rows": rows}
    monkeypatch.setattr(tables, "load_table", lambda method: {"tables": [table]})
    lines = tables.render("bicubic").splitlines()
    assert lines[0] == "**T.** C. Protocols: A `m`, B `n`, C `o`."
    assert "| ours: A | set5 | 29.00 | 30.00 | +1.00 | reproduced | abcdef0 |" in lines
    assert "| open: A | set5 |  | 30.00 |  | measured | abcdef0 |" in lines
    start = lines.index("Not run (its images were not available). In the paper on set5:")
    assert lines[start + 2 : start + 6] == ["| row | B | C |", "|---|---:|---:|", "| ours | 31.00 |  |", "| open |  |  |"]
    start = lines.index("Not run (quoted). In the paper:")
    assert lines[start + 2] == "| row | dataset | B | C |"
    assert lines[start + 4 : start + 6] == ["| other | set5 |  | 7.00 |", "| other | set14 | 8.00 | 9.00 |"]


def test_non_finite_value_is_not_reproduced(one_row):
    for value in ("nan", "inf"):
        cell = one_row(30.0, metrics={"set5": {"m": {"mean": value, "images": {"bird": value}}}})
        assert (cell["state"], cell["ours"], cell["difference"]) == ("not finite", None, None)


def test_missing_recipe_is_named_in_the_state(one_row):
    assert one_row(30.0, {"recipe": "bicubic/gone"})["state"].startswith("not run: no recipe 'bicubic/gone'")


def test_changed_recipe_makes_the_cell_stale_and_names_the_key(one_row):
    content = canonical(find_recipe("bicubic/x3"))
    content["model"]["init_args"]["scale"] = 2
    assert one_row(30.0, content=content)["state"] == "stale: the recipe has changed: model.init_args.scale 2, now 3"


def test_changed_code_is_due_for_a_check_until_it_is_certified(one_row):
    now = code_fingerprint(find_recipe("bicubic/x3"))
    assert one_row(30.0)["checked"] == "abcdef0"
    changed = one_row(30.0, code={**now, "metrics": "0"})
    assert (changed["state"], changed["checked"]) == ("reproduced", "check due: code of metrics")
    certified = {"commit": "0123456789ab", "code": now}
    assert one_row(30.0, code={"training": "0", "metrics": "0"}, certified=certified)["checked"] == "0123456"
    certified["absent"] = ["set5"]
    assert one_row(30.0, certified=certified)["checked"] == "0123456, without set5"
    assert one_row(31.0, dataset="set5/bird", certified=certified)["checked"] == "0123456, without set5"


def test_several_seeds_give_mean_and_spread(monkeypatch):
    found = [
        {**a_record(seed=seed, metrics={"set5": {"m": {"mean": mean, "images": {"a": mean}}}}), "file": "a.json"}
        for seed, mean in enumerate((32.5, 32.7, 32.9))
    ]
    monkeypatch.setattr(tables, "committed_records", lambda name: (found, []))
    table = {"table": "T", "metric": "m", "provenance": "V"}
    cell = tables._cell(table, {"row": "r", "recipe": "bicubic/x3"}, "set5", 32.55, tables._Files())
    assert (cell["ours"], cell["std"], cell["seeds"]) == (32.7, 0.2, 3)
    assert tables.format_ours(cell) == "32.70 ± 0.20 (3 seeds)"


def test_average_is_weighted_by_images():
    record = {"metrics": {name: {"m": {"mean": mean, "images": {}}} for name, mean in (("a", 30.0), ("b", 20.0))}}
    assert tables.record_value(record, "average", "m", {"a": 1, "b": 3}) == 22.5
    assert tables.record_value(record, "average", "m", {"a": 1, "c": 3}) is None


def test_one_table_is_rendered_alone():
    text = tables.render("espcn", "x4", brief=True)
    assert re.findall(r"^\*\*(.*)\.\*\*", text, re.MULTILINE) == ["Table 2, x4"]
    assert "check due:" not in text
    with pytest.raises(UserError, match=r"--table x9: no such table\. Use one of: Table 1; "):
        tables.render("espcn", "x9")
