"""Records, fingerprints, and the tables rendered from them."""

import json

import pytest
import yaml

from datamodules.catalog.catalog import find
from datamodules.errors import Refused
from experiments import METHODS, ROOT
from experiments.cli.main import main
from experiments.results import records, reproduce, tables
from experiments.results.records import code_fingerprint, committed_records, fingerprints, recipe_fingerprint
from experiments.run.recipes import find_recipe, methods, recipes
from experiments.run.run_dir import Run
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import write_recipe


def test_committed_pages_are_what_the_records_say():
    for method in methods():
        if tables.spec(method)["tables"]:
            page = (METHODS / method / "README.md").read_text()
            assert reproduce.between_marks(page, tables.render(method)) == page, f"darkroom reproduce {method} --write"
    assert reproduce.RESULTS.read_text() == reproduce.results_page()
    readme = (ROOT / "README.md").read_text()
    assert reproduce.between_marks(readme, reproduce.summary()) == readme


def test_no_committed_record_is_stale():
    for cell in tables.cells("espcn"):
        assert not cell["state"].startswith("stale"), cell


def test_cells_for_programs(capsys):
    assert main(["reproduce", "espcn", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)
    keys = {"table", "row", "dataset", "metric", "paper", "ours", "state", "record"}
    assert all(keys <= cell.keys() for cell in cells)
    bicubic = next(cell for cell in cells if cell["row"] == "bicubic" and cell["dataset"] == "set5")
    assert bicubic["metric"] == "psnr/y-shave3"
    assert bicubic["ours"] == pytest.approx(30.39, abs=0.02)
    assert bicubic["state"] == "reproduced"
    assert bicubic["record"] == ["experiments/methods/bicubic/records/x3-seed0.json"]


@pytest.mark.parametrize("recipe", ["espcn/t91_x3", "bicubic/x3"])
def test_a_records_means_are_those_of_its_pictures(recipe):
    for record in committed_records(recipe):
        for data_set in record["metrics"].values():
            for measured in data_set.values():
                values = list(measured["pictures"].values())
                assert measured["mean"] == pytest.approx(sum(values) / len(values), abs=1e-4)


RECORD = {"seed": 0, "file": "a.json", "metrics": {"set5": {"m": {"mean": 30.0, "pictures": {"bird": 31.0, "head": 29.0}}}}}


@pytest.fixture
def one_row(monkeypatch):
    """A table of one row and its record, with room for changes."""

    def cell(paper, row=None, changed=None, dataset="set5"):
        current = {"recipe": "1", "method": "2"}
        monkeypatch.setattr(tables, "fingerprints", lambda recipe: current)
        record = {**RECORD, "fingerprints": {**current, **(changed or {})}}
        monkeypatch.setattr(tables, "committed_records", lambda name: [record])
        table = {"table": "T", "metric": "m", "mark": "V"}
        return tables._cell(table, {"row": "r", "recipe": "bicubic/x3", **(row or {})}, dataset, paper)

    return cell


def test_states(one_row):
    assert one_row(30.0)["state"] == "reproduced"
    assert one_row(29.5)["state"] == "reproduced"  # better than the paper
    assert one_row(29.5, {"exact": True})["state"] == "over by 0.50"  # but not where nothing is trained
    assert one_row(30.55)["state"] == "short by 0.55"
    assert one_row(30.0, changed={"method": "0"})["state"] == "stale: method changed since"
    assert one_row(31.0, dataset="set5/bird")["ours"] == 31.0
    assert one_row(31.0, dataset="set14")["state"] == "not run: its pictures were not at hand"


def test_several_seeds_give_mean_and_spread(monkeypatch):
    found = [
        {**RECORD, "fingerprints": {}, "seed": seed, "metrics": {"set5": {"m": {"mean": mean, "pictures": {}}}}}
        for seed, mean in enumerate((32.5, 32.7, 32.9))
    ]
    monkeypatch.setattr(tables, "committed_records", lambda name: found)
    monkeypatch.setattr(tables, "fingerprints", lambda recipe: {})
    cell = tables._cell({"table": "T", "metric": "m", "mark": "V"}, {"row": "r", "recipe": "bicubic/x3"}, "set5", 32.55)
    assert (cell["ours"], cell["std"], cell["seeds"]) == (32.7, 0.2, 3)
    assert tables.ours(cell) == "32.70 ± 0.20 (3 seeds)"


def test_the_average_weighs_by_pictures():
    record = {"metrics": {name: {"m": {"mean": mean, "pictures": {}}} for name, mean in (("a", 30.0), ("b", 20.0))}}
    assert tables.figure(record, "average", "m", {"a": 1, "b": 3}) == 22.5
    assert tables.figure(record, "average", "m", {"a": 1, "c": 3}) is None


def test_recipe_fingerprint_is_of_what_is_trained(tmp_path):
    recipe = find_recipe("espcn/t91_x3")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe.content, sort_keys=True))
    assert recipe_fingerprint(find_recipe(str(tmp_path / "a.yaml"))) == recipe_fingerprint(recipe)
    remeasured = recipe.content
    remeasured["data"]["init_args"]["test"] = ["set5"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(remeasured))
    assert recipe_fingerprint(find_recipe(str(tmp_path / "c.yaml"))) == recipe_fingerprint(recipe)
    changed = recipe.content
    changed["model"]["init_args"]["images"] += 1
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(changed))
    assert recipe_fingerprint(find_recipe(str(tmp_path / "b.yaml"))) != recipe_fingerprint(recipe)


def test_code_fingerprint_ignores_what_cannot_move_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "modules").mkdir()
    file, shared = tmp_path / "modules/a.py", tmp_path / "modules/b.py"

    def fingerprint(text, other="y = 1\n"):
        file.write_text(text)
        shared.write_text(other)
        code_fingerprint.cache_clear()
        return code_fingerprint("modules.a")

    code = "from modules.b import y\n\ndef f(x):\n    return x + y\n"
    before = fingerprint(code)
    same = '"""About."""\nfrom typing import Any\nfrom modules.b import y  # shared\n\ndef f(x: Any) -> Any:\n    """Adds."""\n    return (x + y)\n'
    assert fingerprint(same) == before
    assert fingerprint(code.replace("+", "-")) != before
    assert fingerprint(code, other="y = 2\n") != before
    code_fingerprint.cache_clear()


def test_a_run_of_another_recipe_is_not_kept(tmp_path):
    recipe = find_recipe("espcn/t91_x3")
    record = {"fingerprints": fingerprints(recipe), "overrides": ["--model.images", "3"], "seed": 0}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="is not a run of espcn/t91_x3 as it stands"):
        reproduce.keep(Run(tmp_path), recipe)


def test_reproduce_runs_what_is_feasible_and_says_what_is_not(workplace, monkeypatch, capfd):
    """Without data, nothing of the paper's is feasible; current records stay as they are."""
    before = {path: path.read_bytes() for path in METHODS.glob("*/records/*.json")}
    assert forked(main, ["reproduce", "espcn", "--run", "--only", "espcn/imagenet_x3"]) == 0
    assert "espcn/imagenet_x3: not feasible here, imagenet not here" in capfd.readouterr().out
    assert before == {path: path.read_bytes() for path in METHODS.glob("*/records/*.json")}


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_what_a_recipe_lacks_is_what_is_not_embedded(recipe, workplace):
    """Whatever the kind of its data: a set, a split, two domains, photographs with masks."""
    data = recipe.content["data"].get("init_args", {})
    sets = {data[key].partition("/")[0] for key in ("train", "val") if data.get(key)} or {
        name.partition("/")[0] for name in data.get("test", [])
    }
    embedded = all(find(name).get == "embedded" for name in sets)
    assert (reproduce.lacking(recipe, bool(data.get("train"))) == []) == embedded


def test_sets_that_have_come_since_are_measured_into_the_record(workplace, monkeypatch):
    """bicubic/x3's record without its embedded photographs gets them, and keeps what cannot be measured here."""
    recipe = find_recipe("bicubic/x3")
    path = workplace / "record.json"
    record = json.loads(reproduce.record_path(recipe, 0).read_text())
    photographs = record["metrics"].pop("photographs-test")
    path.write_text(json.dumps(record))
    monkeypatch.setattr(reproduce, "record_path", lambda recipe, seed: path)
    monkeypatch.setattr(reproduce, "committed_records", lambda name: [json.loads(path.read_text())])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert reproduce.unmeasured(recipe, record) == ["photographs/test"]
    reproduce.run_recipe(recipe, seeds=1)
    renewed = json.loads(path.read_text())["metrics"]
    assert renewed["photographs-test"].keys() == photographs.keys()
    for protocol, of_protocol in photographs.items():  # another processor rounds otherwise
        assert renewed["photographs-test"][protocol]["pictures"] == pytest.approx(of_protocol["pictures"], rel=3e-6)
    assert renewed["set5"] == record["metrics"]["set5"]


def test_an_interrupted_reproduction_ends_as_its_run_does(workplace, photos, monkeypatch, capfd):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "images": 60}}
    recipe = write_recipe(workplace / "tiny.yaml", photos, model)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0")
    with pytest.raises(SystemExit) as ended:
        reproduce.darkroom("fit", str(recipe), "--run", "one")
    assert ended.value.code == 85
    assert "nothing is lost" in capfd.readouterr().out
    assert (workplace / "runs/tiny/one/checkpoints/last.ckpt").exists()


def test_a_run_that_was_not_measured_is_not_kept(tmp_path):
    recipe = find_recipe("espcn/t91_x3")
    record = {"fingerprints": fingerprints(recipe), "overrides": [], "seed": 0, "earlier_legs": []}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="has not been measured"):
        reproduce.keep(Run(tmp_path), recipe)


@pytest.fixture
def resumed(workplace, photos, monkeypatch):
    """A finished, measured run whose first leg was another code's, by its record."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "images": 60}}
    recipe = find_recipe(str(write_recipe(workplace / "tiny.yaml", photos, model, test=["photographs/test"])))
    assert forked(main, ["fit", str(recipe.path), "--run", "long"]) == 0
    run = Run(workplace / "runs/tiny/long")
    record = json.loads(run.record.read_text())
    leg = {"commit": "", "versions": {}, "fingerprints": {**record["fingerprints"], "method": "another"}}
    run.record.write_text(json.dumps({**record, "earlier_legs": [leg]}))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(reproduce, "REPLAYED", 8)
    monkeypatch.setattr(reproduce, "record_path", lambda recipe, seed: workplace / "kept/record.json")
    monkeypatch.setattr(reproduce, "LARGEST", 0)
    return run, recipe


def test_a_run_that_other_code_began_is_kept_if_todays_code_repeats_its_first_steps(workplace, resumed):
    run, recipe = resumed
    reproduce.keep(run, recipe)
    assert json.loads((workplace / "kept/record.json").read_text())["replayed_images"] == 32


def test_a_run_that_other_code_began_otherwise_is_not_kept(workplace, resumed):
    run, recipe = resumed
    lines = run.log.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "train/" in line)
    run.log.write_text("\n".join([*lines[:at], lines[at] + "1", *lines[at + 1 :]]) + "\n")
    with pytest.raises(Refused, match="was begun by other code than it was ended by, and today's does not repeat"):
        reproduce.keep(run, recipe)
    assert not (workplace / "kept").exists()


def test_reproduce_only_names_rows(capsys):
    assert main(["reproduce", "espcn", "--run", "--only", "espcn/demo"]) == 2
    assert "no row of espcn's tables needs 'espcn/demo'" in capsys.readouterr().err


def test_committed_weights_give_the_recorded_figures(with_real_data, tmp_path, monkeypatch):
    """The weights that come with the project measure what the table says, on this machine too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARKROOM_RUNS", str(tmp_path / "runs"))
    words = ["test", "espcn/t91_x3", "--record", "record.json", "--data.test", "[set5]"]
    assert forked(main, words) == 0
    measured = json.loads((tmp_path / "record.json").read_text())["metrics"]["set5"]["psnr/y-shave3"]["mean"]
    recorded = committed_records("espcn/t91_x3")[0]["metrics"]["set5"]["psnr/y-shave3"]["mean"]
    assert measured == pytest.approx(recorded, abs=1e-3)
    assert measured > 32.55
