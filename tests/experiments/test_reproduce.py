"""Records, the tables rendered from them, and missing runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from callbacks.run.record_file import BrokenRecord, read_record, write_record
from datamodules.catalog.catalog import get_dataset
from datamodules.errors import UserError
from experiments import METHODS, ROOT
from experiments.cli.main import main
from experiments.results import records, reproduce, tables
from experiments.results.fingerprint import canonical, code_fingerprint
from experiments.results.records import committed_records, differences, validate
from experiments.run.recipes import Recipe, find_recipe, methods, recipes
from experiments.run.run_dir import Run
from experiments.run.weights_file import read_description
from tests.helpers.record_helpers import a_record
from tests.helpers.subprocess_helpers import forked
from tests.tasks.superresolution import write_recipe

FILES = sorted(METHODS.glob("*/records/*.json"))


def test_committed_pages_are_rendered_from_the_records():
    results = reproduce.results_page()  # contains the tables of all methods
    assert reproduce.RESULTS.read_text() == results
    for method in methods():
        if tables.load_table(method)["tables"]:
            page = (METHODS / method / "README.md").read_text()
            rendered = page.partition(reproduce.BEGIN)[2].partition(reproduce.END)[0].strip()
            assert len(rendered) > 100 and rendered in results, f"darkroom reproduce {method} --write"
    readme = (ROOT / "README.md").read_text()
    assert reproduce.between_marks(readme, reproduce.summary()) == readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_every_committed_record_is_valid_and_belongs_to_its_current_recipe(path):
    record = read_record(path)
    validate(record, path)
    assert differences(record, canonical(find_recipe(record["recipe"]))) == []
    assert not record["commit"].endswith("+")
    assert record.get("certified", record)["commit"]  # a new record was made with the code that it names


def test_json_option_prints_the_cells(capsys):
    assert main(["reproduce", "espcn", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)
    keys = {"table", "row", "dataset", "metric", "paper", "ours", "state", "checked", "record"}
    assert all(keys <= cell.keys() for cell in cells)
    bicubic = next(cell for cell in cells if cell["row"] == "bicubic" and cell["dataset"] == "set5")
    assert bicubic["metric"] == "psnr-y/crop3"
    assert bicubic["ours"] == pytest.approx(30.39, abs=0.02)
    assert bicubic["state"] == "reproduced"
    assert bicubic["record"] == ["experiments/methods/bicubic/records/x3-seed0.json"]


# Invalid records


def test_record_with_a_changed_value_is_rejected(tmp_path):
    path = tmp_path / "record.json"
    write_record(a_record(), path)
    assert read_record(path)["metrics"]["set5"]["m"]["mean"] == 30.0
    path.write_text(path.read_text().replace("30.0", "30.5"))
    with pytest.raises(BrokenRecord, match=r"record\.json: its checksum differs"):
        read_record(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"word"', "\x00", "[" * 100_000, '{"checksum": "x", "a": "\\ud800"}', '{"checksum": "x", "a": NaN}'],
    ids=["empty", "truncated", "list", "string", "null byte", "deep nesting", "lone surrogate", "NaN"],
)
def test_invalid_record_file_is_named(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(BrokenRecord, match=r"record\.json: "):
        read_record(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": {"set5": {"m": {"mean": 30.5, "images": {"bird": 31.0, "head": 29.0}}}}}, "its mean is not that"),
        ({"metrics": {"set5": {"m": {"mean": "inf", "images": {"bird": 31.0}}}}}, "its mean is not that"),
        ({"metrics": {"set5": {"m": {"mean": 10**400, "images": {"bird": 31.0}}}}}, r"metrics\.set5\.m\.mean"),
        ({"metrics": {"set5": {"m": {"images": {"bird": 31.0}}}}}, r"metrics\.set5\.m\.mean"),
        ({"metrics": {"set5": {"m": {"mean": 3, "images": {}}}}}, r"metrics\.set5\.m\.images"),
        ({"metrics": {"set5": []}}, r"metrics\.set5"),
        ({"commit": ""}, "commit"),
        ({"commit": "HEAD"}, "commit"),
        ({"commit": "--output=record"}, "commit"),
        ({"config": None}, "config"),
        ({"config": {"model": {"class_path": "a.B"}, "data": []}}, r"config\.data"),
        ({"content": None}, "content"),
        ({"seed": -1}, "seed"),
        ({"code": [1]}, "code"),
        ({"certified": None}, "certified"),
        ({"certified": {"commit": 5}}, r"certified\.commit"),
        ({"best": 5}, "best"),
    ],
)
def test_inconsistent_record_is_rejected(changes, reason):
    with pytest.raises(BrokenRecord, match=reason):
        validate(a_record(**changes), Path("record.json"))


def test_means_are_compared_at_their_stored_precision():
    for mean, images in ((28.1235, {"a": 28.1233, "b": 28.1236}), ("inf", {"a": "inf", "b": 30.0}), ("nan", {"a": "nan"})):
        validate(a_record(metrics={"set5": {"m": {"mean": mean, "images": images}}}), Path("record.json"))
    older = {"mean": 1.3563, "images": {"all": 1.356271}}
    updated = {"mean": 1.54259797, "images": {"all": 1.54259797}}  # a check replaced one of the metrics
    validate(a_record(metrics={"set5": {"m": older, "n": updated}}), Path("record.json"))
    with pytest.raises(BrokenRecord, match="set5/n: its mean"):
        validate(a_record(metrics={"set5": {"m": older, "n": {**updated, "mean": 1.5426980}}}), Path("record.json"))


@pytest.fixture
def method_folder(tmp_path, monkeypatch):
    """Return a copy of the folder of methods, which a test may modify."""
    copy = tmp_path / "methods"
    for name in ("bicubic", "espcn", "srcnn"):
        shutil.copytree(METHODS / name, copy / name)
    monkeypatch.setattr(records, "METHODS", copy)
    return copy


def test_broken_record_is_named_and_other_cells_are_rendered(method_folder):
    broken = method_folder / "bicubic/records/x3-seed0.json"
    broken.write_text(broken.read_text()[:-100])
    states = {(cell["row"], cell["dataset"]): cell["state"] for cell in tables.cells("espcn") if cell["table"] == "Table 2, x3"}
    assert states["bicubic", "set5"].startswith("broken record: ")
    assert "bicubic/records/x3-seed0.json" in states["bicubic", "set5"]
    assert states["SRCNN (ImageNet), 9-5-5", "set5"] == "not run: needs ImageNet"
    assert tables.cells("espcn")[0]["ours"] == pytest.approx(32.59, abs=0.01)


def test_record_of_another_recipe_is_rejected(method_folder):
    shutil.copy(method_folder / "bicubic/records/x3-seed0.json", method_folder / "bicubic/records/x4-seed0.json")
    found, broken = committed_records("bicubic/x4")
    assert not found
    assert "x4-seed0.json: is a record of bicubic/x3, seed 0" in broken[0]


@pytest.mark.parametrize("method", methods())
def test_pages_follow_one_plan(method):
    page = (METHODS / method / "README.md").read_text()
    plan = ["Recipes", "Protocols", "Logged values", "Search", "Tables"]
    sections = re.findall(r"^## (.*)", page, re.MULTILINE)
    assert sections == [section for section in plan if section in sections]
    assert {"Recipes", "Protocols", "Logged values", "Tables"} <= set(sections)


# Missing runs


def a_run(tmp_path, **changes):
    record = {**a_record("espcn/t91_x3"), "overrides": [], "previous_segments": [], **changes}
    write_record(record, tmp_path / "record.json")
    return Run(tmp_path)


def test_run_of_another_recipe_is_not_committed(tmp_path):
    run = a_run(tmp_path, overrides=["--model.total_images", "3"])
    with pytest.raises(UserError, match="is not a run of the current espcn/t91_x3"):
        reproduce.commit_record(run, find_recipe("espcn/t91_x3"))


def test_run_without_evaluation_is_not_committed(tmp_path):
    record = {**a_record("espcn/t91_x3"), "overrides": [], "previous_segments": []}
    del record["metrics"]
    write_record(record, tmp_path / "record.json")
    with pytest.raises(UserError, match="has not been evaluated"):
        reproduce.commit_record(Run(tmp_path), find_recipe("espcn/t91_x3"))


def test_reproduce_skips_recipes_without_data_and_reports_them(workdir, monkeypatch, capfd):
    """Without data, the recipes of the paper cannot run. Current records remain unchanged."""
    before = {path: path.read_bytes() for path in FILES}
    assert forked(main, ["reproduce", "espcn", "--run", "--only", "espcn/imagenet_x3"]) == 0
    assert "espcn/imagenet_x3: skipped, not installed: imagenet" in capfd.readouterr().out
    assert before == {path: path.read_bytes() for path in FILES}


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_missing_inputs_exclude_embedded_datasets(recipe, workdir):
    """Recipes use all kinds of data: datasets, splits, pairs of domains, and photographs with masks."""
    data = recipe.content["data"].get("init_args", {})
    sets = {data[key].partition("/")[0] for key in ("train", "val") if data.get(key)} or {
        name.partition("/")[0] for name in data.get("test", []) if name != "held-out"
    }
    embedded = all(get_dataset(name).source == "embedded" for name in sets) and "held-out" not in data.get("test", [])
    assert (reproduce.missing_inputs(recipe, bool(data.get("train"))) == []) == embedded


def test_newly_installed_test_sets_are_added_to_the_record(workdir, monkeypatch):
    """Embedded photographs are added to a record of bicubic/x3 that lacks them. The other results are kept."""
    recipe = find_recipe("bicubic/x3")
    path = workdir / "record.json"
    record = read_record(METHODS / "bicubic/records/x3-seed0.json")
    record["code"] = code_fingerprint(recipe)  # the record is current, even if a check is due
    photographs = record["metrics"].pop("photographs-test")
    write_record(record, path)
    monkeypatch.setattr(reproduce, "record_path", lambda recipe, seed: path)
    monkeypatch.setattr(reproduce, "committed_records", lambda name: ([read_record(path)], []))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert reproduce.unevaluated_sets(recipe, record) == ["photographs/test"]
    reproduce.run_recipe(recipe, seeds=1)
    renewed = read_record(path)["metrics"]
    assert renewed["photographs-test"].keys() == photographs.keys()
    for protocol, result in photographs.items():  # rounding differs between processors
        assert renewed["photographs-test"][protocol]["images"] == pytest.approx(result["images"], rel=3e-6)
    assert renewed["set5"] == record["metrics"]["set5"]


def test_interrupted_reproduce_exits_with_the_status_of_its_run(workdir, photos, monkeypatch, capfd):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = write_recipe(workdir / "tiny.yaml", photos, model)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0")
    with pytest.raises(SystemExit) as ended:
        reproduce.run_command("fit", str(recipe), "--run", "one")
    assert ended.value.code == 85
    assert "Stopped and saved" in capfd.readouterr().out
    assert (workdir / "runs/tiny/one/checkpoints/last.ckpt").exists()


@pytest.fixture
def resumed(workdir, photos, three_photos, monkeypatch):
    """Return a finished, evaluated run and its recipe. The record lists other code for the first segment."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = find_recipe(str(write_recipe(workdir / "tiny.yaml", photos, model, test=[str(three_photos)])))
    assert forked(main, ["fit", str(recipe.path), "--run", "long"]) == 0
    run = Run(workdir / "runs/tiny/long")
    record = read_record(run.record)
    segment = {"commit": "", "versions": {}, "code": {**record["code"], "training": "another"}}
    write_record({**record, "previous_segments": [segment]}, run.record)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(reproduce, "REPLAY_STEPS", 8)
    monkeypatch.setattr(reproduce, "record_path", lambda recipe, seed: workdir / "kept/record.json")
    return run, recipe


def test_run_of_other_code_is_committed_if_the_current_code_repeats_its_first_steps(workdir, resumed, monkeypatch):
    run, recipe = resumed
    weights = workdir / "kept/weights.safetensors"
    monkeypatch.setattr(Recipe, "weights", weights)
    reproduce.commit_record(run, recipe)
    assert read_record(workdir / "kept/record.json")["replayed_images"] == 32
    description = read_description(weights)
    assert (description.recipe, description.model.class_path) == ("tiny", "modules.espcn.ESPCN")
    assert description.images_seen == read_record(run.record)["best_images"]


def test_run_of_other_code_is_not_committed_if_its_first_steps_differ(workdir, resumed):
    run, recipe = resumed
    lines = run.log.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "train/" in line)
    run.log.write_text("\n".join([*lines[:at], lines[at] + "1", *lines[at + 1 :]]) + "\n")
    with pytest.raises(UserError, match="was started with other code, and the current code does not reproduce"):
        reproduce.commit_record(run, recipe)
    assert not (workdir / "kept").exists()


def test_only_option_rejects_recipes_without_a_row(capsys):
    assert main(["reproduce", "espcn", "--run", "--only", "espcn/demo"]) == 2
    assert "no row of espcn's tables uses 'espcn/demo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "reproduce: no method given"),
        (["--check"], "reproduce: no method given"),
        (["espcm", "--check"], "no method 'espcm'; did you mean 'espcn'?"),
        (["espcn", "--check", "all"], "reproduce: --check all"),
        (["espcn", "--renames", "map.yaml"], "reproduce: --renames"),
        (["espcn", "--check", "--write"], "reproduce: --check takes no option but --renames"),
        (["espcn", "--check", "--seeds", "2"], "reproduce: --check takes no option but --renames"),
        (["espcn", "--check", "--renames", "nowhere.yaml"], "--renames nowhere.yaml cannot be read: "),
    ],
)
def test_invalid_reproduce_arguments_are_refused(capsys, workdir, words, reason):
    assert main(["reproduce", *words]) == 2
    assert reason in capsys.readouterr().err


def test_committed_weights_give_the_recorded_values(with_real_data, tmp_path, monkeypatch):
    """On this machine, the committed weights give the value in the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARKROOM_RUNS", str(tmp_path / "runs"))
    words = ["test", "espcn/t91_x3", "--record", "record.json", "--data.test", "[set5]"]
    assert forked(main, words) == 0
    measured = read_record(tmp_path / "record.json")["metrics"]["set5"]["psnr-y/crop3"]["mean"]
    recorded = committed_records("espcn/t91_x3")[0][0]["metrics"]["set5"]["psnr-y/crop3"]["mean"]
    assert measured == pytest.approx(recorded, abs=1e-3)
    assert measured > 32.55
