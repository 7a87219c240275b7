"""`darkroom reproduce --check` on a copy of the project with a separate git history and one small record."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from callbacks.run.record_file import read_record, write_record
from datamodules.errors import UserError
from experiments import ROOT
from experiments.results import records
from experiments.results.check import check, updated_metrics
from experiments.results.renames import Renames, read_renames
from experiments.results.replay import Code, Uncheckable, few_items, has_large_batches
from experiments.run.recipes import Recipe, find_recipe

RECIPE = """\
model:
  class_path: modules.espcn.ESPCN
  init_args: {scale: 3, total_images: 320, warmup: 160}
data:
  class_path: datamodules.superresolution.SuperResolution
  init_args:
    {scale: 3, train: photographs/val, val: photographs/val, test: [photographs/test, set5], batch_size: 4, border_overhang: 4}
trainer:
  callbacks:
    - class_path: callbacks.metrics.psnr_ssim.PSNRSSIM
      init_args: {crop_border: 3}
monitor: photographs-val/psnr-y/crop3
val_every_images: 160
"""
TRAIN = """\
from experiments.cli.main import main
from experiments.results.reproduce import commit_record
from experiments.run.recipes import find_recipe
from experiments.run.paths import runs_root
from experiments.run.run_dir import Run
assert main(["fit", "espcn/small", "--run", "one"]) == 0
commit_record(Run(runs_root() / "espcn/small/one"), find_recipe("espcn/small"))
"""


class Project:
    """A copy of the project with separate commits and records."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("DARKROOM_", "GIT_"))},
            "PYTHONPATH": str(folder),
            "DARKROOM_RUNS": str(folder.parent / "runs"),
        }
        self.record = folder / "experiments/methods/espcn/records/small-seed0.json"

    def run(self, *words):
        return subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)

    def commit(self):
        assert self.run("git", "add", "-A").returncode == 0
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        assert self.run("git", *identity, "commit", "-q", "-m", "change").returncode == 0

    def change(self, file, old, new):
        path = self.folder / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        self.commit()

    def check(self, *words):
        done = self.run(sys.executable, "-m", "experiments", "reproduce", "espcn", "--check", *words)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project") / "darkroom"
    for package in ("modules", "datamodules", "callbacks", "experiments"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "records", "*.safetensors")
        )
    project = Project(folder)
    (folder / "experiments/methods/espcn/recipes/small.yaml").write_text(RECIPE)
    assert project.run("git", "init", "-q").returncode == 0
    project.commit()
    trained = project.run(sys.executable, "-c", TRAIN)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    record = read_record(project.record)
    record["metrics"]["set5"] = record["metrics"]["photographs-test"]  # as if Set5 had been installed during training
    write_record(record, project.record)
    project.commit()
    return project


@pytest.fixture
def project(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "darkroom")
    return Project(tmp_path / "darkroom")


@pytest.mark.slow
def test_renaming_is_certified(project, tmp_path):
    """Both code versions evaluate the current weights, because the commit of the record contains no weights."""
    first = read_record(project.record)
    project.change("modules/tasks/superresolution.py", '{"mse"', '{"squared_error"')
    (tmp_path / "map.yaml").write_text(json.dumps({"names": {"train/mse": "train/squared_error"}}))
    status, said = project.check("--renames", str(tmp_path / "map.yaml"))
    assert status == 0, said
    assert "1 certified" in said
    certified = read_record(project.record)
    assert certified["certified"]["starts"] == [0, 160]  # the end of the warm-up
    assert certified["certified"]["evaluated"] == "committed weights"
    assert certified["certified"]["absent"] == ["set5"]
    assert "without set5, which is not installed" in said
    assert certified["metrics"] == first["metrics"]


@pytest.mark.slow
def test_changed_network_is_reported(project):
    record = read_record(project.record)
    project.change("modules/espcn.py", "nn.PixelShuffle(scale)", "nn.PixelShuffle(scale), nn.Hardtanh(0.0, 0.999)")
    status, said = project.check()
    assert status == 1
    assert "the log, from 0 images on: train/mse after 4 images was" in said
    assert read_record(project.record) == record


@pytest.mark.slow
def test_renamed_parameters_are_certified_with_weights_of_the_replay(project, tmp_path):
    (project.folder / "experiments/methods/espcn/weights/small.safetensors").unlink()  # its parameters have the old names
    project.change("modules/espcn.py", "self.network", "self.layers")
    project.change("modules/espcn.py", "nn.PixelShuffle(scale)", "nn.PixelShuffle(1 * scale)")
    (tmp_path / "map.yaml").write_text(json.dumps({"weights": {"network": "layers"}}))
    status, said = project.check("--renames", str(tmp_path / "map.yaml"))
    assert status == 0, said
    assert "1 certified" in said
    assert read_record(project.record)["certified"]["evaluated"] == "replay"
    assert "1 unchanged" in project.check()[1]


@pytest.mark.slow
def test_renamed_loss_is_reported_without_the_map(project):
    project.change("modules/tasks/superresolution.py", '{"mse"', '{"squared_error"')
    status, said = project.check()
    assert status == 1
    assert "the log, from 0 images on: train/mse after 4 images was" in said


@pytest.mark.slow
def test_changed_metric_or_later_stage_is_reported(project):
    project.change("modules/training/method.py", "self.learning_rate * 0.5 * (1 +", "self.learning_rate * 0.4 * (1 +")
    assert "the log, from 160 images on: learning_rate after" in project.check()[1]
    project.change("modules/training/method.py", "self.learning_rate * 0.4 * (1 +", "self.learning_rate * 0.5 * (1 +")
    project.change("callbacks/metrics/psnr_ssim.py", "* 255 + 0.5", "* 254 + 0.5")
    status, said = project.check()
    assert status == 1
    assert "photographs-val/psnr-y/crop3 after 40 images was" in said


@pytest.mark.slow
def test_updated_metric_has_the_new_value_of_the_committed_weights(project):
    old = read_record(project.record)
    project.change("callbacks/metrics/psnr_ssim.py", "* 255 + 0.5", "* 254 + 0.5")
    status, said = project.check("--update", "psnr-y", "ssim-y")
    assert status == 0
    assert "1 unchecked" in said
    assert "set5/psnr-y/crop3: no committed weights and data to update it" in said
    del old["metrics"]["set5"]
    write_record(old, project.record)
    project.commit()
    status, said = project.check("--update", "psnr-y", "ssim-y")
    assert status == 0, said
    assert "1 certified" in said
    project.commit()
    assert "1 unchanged" in project.check()[1]  # its weights have the values of the record
    new = read_record(project.record)
    assert new["metrics"] != old["metrics"]
    before, after = (record["metrics"]["photographs-test"]["psnr-y/crop3"] for record in (old, new))
    assert after["images"].keys() == before["images"].keys()
    assert after["mean"] == pytest.approx(np.mean(list(after["images"].values())), rel=1e-6)


def test_metrics_without_committed_weights_are_updated_if_they_do_not_depend_on_them():
    def result(value):
        return {"mean": value, "image all": value}

    recorded = {name: {"mean": value, "images": {"all": value}} for name, value in (("swd/8", 4.0), ("floor/8", 1.0))}
    record = {"metrics": {"digits": recorded}}
    before = {"digits": {"swd/8": result(9.0), "floor/8": result(1.00001)}}  # of the replay, with the certified code
    after = {"digits": {"swd/8": result(9.0), "floor/8": result(1.5)}}
    expected = {"swd/8": recorded["swd/8"], "floor/8": {"mean": 1.5, "images": {"all": 1.5}}}
    assert updated_metrics(record, [before, after], False, ["swd", "floor"]) == {"digits": expected}
    after["digits"]["swd/8"] = result(8.0)
    assert updated_metrics(record, [before, after], False, ["floor"]) == {"digits": expected}
    with pytest.raises(Uncheckable, match="digits/swd/8: no committed weights"):
        updated_metrics(record, [before, after], False, ["swd"])
    assert updated_metrics(record, [before, after], True, ["swd"])["digits"]["swd/8"]["mean"] == 8.0


@pytest.mark.slow
def test_failed_records_are_named_and_the_check_continues(project):
    records, method = project.record.parent, project.folder / "experiments/methods/espcn"
    record = read_record(project.record)
    # A record of other weights.
    shutil.copy(method / "recipes/small.yaml", method / "recipes/other.yaml")
    write_record({**record, "recipe": "espcn/other"}, records / "other-seed0.json")
    weights = load_file(method / "weights/small.safetensors")
    save_file({name: tensor * 1.0001 for name, tensor in weights.items()}, method / "weights/other.safetensors")
    # A record with a changed value and a matching checksum.
    result = record["metrics"]["photographs-test"]["psnr-y/crop3"]
    for name in result["images"]:
        result["images"][name] += 0.5
    result["mean"] += 0.5
    write_record(record, project.record)
    project.commit()
    status, said = project.check()
    assert status == 1
    assert "2 differs" in said
    assert "photographs-test/psnr-y/crop3" in said
    assert "in the record" in said
    assert "other.safetensors are not the weights of the record" in said


@pytest.mark.slow
def test_skipped_checks_state_the_reason(project):
    shutil.copy(project.record, project.record.with_name("gone-seed0.json"))
    record = read_record(project.record)
    elsewhere = {"code": {}, "certified": {"commit": "0123456789ab", "code": {"training": "0"}}}
    write_record({**record, **elsewhere}, project.record)
    project.commit()
    status, said = project.check()
    assert status == 0
    assert "2 unchecked" in said
    assert "commit 0123456789ab is not in this history" in said
    assert "espcn/records/gone-seed0.json: the record of no recipe" in said


def test_check_rejects_a_modified_checkout(project, monkeypatch):
    monkeypatch.setattr(records, "ROOT", project.folder)
    (project.folder / "modules/espcn.py").write_text("# changed\n")
    with pytest.raises(UserError, match="commit the changes first"):
        check(["espcn"], Renames())


@pytest.mark.parametrize(
    ("recipe", "expected"), [("vae/demo", True), ("dcgan/mnist", True), ("cyclegan/camvid", False), ("espcn/t91_x3", False)]
)
def test_replay_limits_the_evaluation_only_with_large_batches(recipe, expected, tmp_path):
    assert has_large_batches(Code(ROOT, find_recipe(recipe).path, tmp_path, Renames())) == expected


def test_probes_of_a_replay_read_few_items(tmp_path):
    recipe = find_recipe("dcgan/cifar10_jpeg")
    few = Recipe("few", few_items(Code(ROOT, recipe.path, tmp_path, Renames())))
    probes = [callback["init_args"] for callback in few.content["trainer"]["callbacks"][1:]]
    assert [probe["per_class"] for probe in probes] == [10, 10]
    assert probes[1]["repeats"] == 2
    assert few.content["model"] == recipe.content["model"]
    assert few.content["data"] == recipe.content["data"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be a map of recipes, classes"),
        ("- a", "must be a map of recipes, classes"),
        ("recipes: [1]", "recipes: "),
        ("recipes: {espcn/t91_x3: 5}", "recipes.espcn/t91_x3: "),
        ("keys: {ESPCN: }", "keys.ESPCN: "),
        ("keys: {modules.espcn.ESPCN: {scale: factor}}", "keys.modules.espcn.ESPCN: "),
        ("places: {a: b}", "places: "),
        ("names: {'(a': b}", "missing )"),
        ("names: {'(a)': '\\2'}", "invalid group reference"),
        ("[" * 5000, "nested more than 50 deep"),
    ],
)
def test_invalid_map_of_renames_is_rejected_with_its_key(tmp_path, text, reason):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "map.yaml"))) as error:
        read_renames(tmp_path / "map.yaml")
    assert reason in str(error.value)


def test_two_datasets_with_the_same_new_name_are_rejected():
    record = {"recipe": "a/b", "metrics": {"set14": {}, "set14-gray": {}}, "data": {}, "content": {}, "config": {}}
    with pytest.raises(UserError, match="--renames: names: two datasets of a/b"):
        Renames(names={"-gray$": ""}).record(record)


def test_map_of_renames_applies_keys_to_their_class_only():
    renames = Renames(
        classes={"a.Old": "b.New"},
        keys={"New": {"width": "channels"}},
        values={"frechet": "fid"},
        names={"-kept(?=/)": "-holdout"},
    )
    content = {
        "model": {
            "class_path": "a.Old",
            "init_args": {"width": 3, "inner": {"class_path": "c.Other", "init_args": {"width": 4}}},
        },
        "monitor": "t91-kept/psnr",
        "list": ["frechet", "frechet distance"],
    }
    assert renames.content(content) == {
        "model": {
            "class_path": "b.New",
            "init_args": {"channels": 3, "inner": {"class_path": "c.Other", "init_args": {"width": 4}}},
        },
        "monitor": "t91-holdout/psnr",
        "list": ["fid", "frechet distance"],
    }
