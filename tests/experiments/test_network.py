"""Commands that use the network of a run: RECIPE --run NAME, --run latest, or the folder of the run."""

import pytest
import yaml

from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run.network import find_network
from experiments.run.paths import runs_root
from experiments.run.run_dir import Run
from tests.helpers.subprocess_helpers import forked
from tests.tasks.superresolution import write_recipe

MODEL = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}


def test_network_of_a_run_has_the_settings_of_the_run(workdir, photos, capfd):
    """The configuration of the run contains keys of `fit`, and a key that is null although its default is not."""
    recipe = write_recipe(workdir / "tiny.yaml", photos, MODEL)
    settings = ["--model.activation", "relu", "--data.val_every_nth", "3", "--trainer.log_every_n_steps", "null"]
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]", *settings]) == 0
    config = yaml.safe_load((workdir / "runs/tiny/one/config.yaml").read_text())
    assert "log_every_n_steps" in config["trainer"]
    capfd.readouterr()
    argv = ["--input", str(photos), "--output", "out"]
    best = "runs/tiny/one/checkpoints/best.ckpt"
    for words in (
        ["runs/tiny/one"],
        [str(recipe), "--run", "one"],
        [str(recipe), "--run=latest"],
        ["runs/tiny/one/config.yaml"],
        [best],
    ):
        assert forked(main, ["predict", *words, *argv]) == 0
        assert "runs/tiny/one/checkpoints/best.ckpt" in capfd.readouterr().out.replace("\n", "")
    assert forked(main, ["predict", "runs/tiny/one", "--model.activation", "tanh", *argv]) == 2
    assert 'trained with model.activation "relu", but the model has "tanh"' in capfd.readouterr().err


def a_run(name, **sections):
    run = Run(runs_root() / "espcn/demo" / name)
    run.checkpoints.mkdir(parents=True)
    content = {"model": {"class_path": "a.B", "init_args": {}}, "data": {"class_path": "c.D", "init_args": {}}, **sections}
    run.config.write_text(yaml.safe_dump(content))
    return run


def test_latest_run_is_the_one_with_the_newest_weights(workdir):
    old, new, unfinished = (a_run(name) for name in ("old", "new", "unfinished"))
    for run in (old, new):
        run.best_checkpoint.write_bytes(b"")
    recipe, words = find_network("espcn/demo", "latest", ["--seed", "1"])
    assert (recipe.name, recipe.path) == ("espcn/demo", new.config)
    assert words == ["--seed", "1", "--ckpt", str(new.best_checkpoint)]
    assert find_network("espcn/demo", "old", ["--ckpt=x.ckpt"])[1] == ["--ckpt=x.ckpt"]  # other weights
    assert find_network("espcn/demo", None, ["--seed", "1"]) == (find_network("espcn", None, [])[0], ["--seed", "1"])
    with pytest.raises(UserError, match=r"unfinished: no best\.ckpt before the first validation"):
        find_network(str(unfinished.folder), None, [])


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("espcn/demo", "two", r"--run two: .*espcn/demo has one"),
        ("espcn/t91_x3", "latest", r"espcn/t91_x3 has no run with weights\. Train .*fit espcn/t91_x3"),
        ("runs/espcn/demo/one", "one", r"--run one: runs/espcn/demo/one is not a recipe"),
        ("runs/espcn/demo", None, r"runs/espcn/demo/config\.yaml cannot be read: No such file"),
        ("runs/espcn/demo/two", None, r"no recipe 'runs/espcn/demo/two'"),
    ],
)
def test_missing_run_is_named(workdir, monkeypatch, name, run, message):
    monkeypatch.setenv("DARKROOM_RUNS", "runs")
    a_run("one")
    with pytest.raises(UserError, match=message):
        find_network(name, run, [])


def test_damaged_configuration_is_named(workdir):
    with pytest.raises(UserError, match=r"config\.yaml: not the configuration of a run"):
        find_network(str(a_run("one", model=3).folder), None, [])
