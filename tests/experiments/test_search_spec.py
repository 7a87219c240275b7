"""Search files in W&B's format: parsing, rejected input and sampling."""

import csv
import itertools
import json
import time
from importlib.metadata import distribution as package_distribution
from pathlib import Path

import jsonschema
import optuna
import pytest
import yaml
from optuna.trial import TrialState
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.errors import UserError
from experiments import METHODS, ROOT
from experiments.cli.main import main
from experiments.run.lightning_cli import DarkroomCLI
from experiments.run.recipes import find_recipe
from experiments.search import worker as search_worker
from experiments.search.samplers import distributions, ordinal
from experiments.search.spec import read_search
from experiments.search.worker import next_trial, open_study, requeue, requeue_stale
from tests.helpers.fake_datasets import lay_out
from tests.helpers.search_helpers import trials_of, write_search
from tests.helpers.subprocess_helpers import forked

SEARCHES = sorted((ROOT / "sweeps").glob("*.yaml"))


# Files


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_bundled_searches_are_valid_for_wandb(path):
    """Validate with the published schema of W&B, and convert parameters to a command line as the W&B agent does."""
    content = yaml.safe_load(path.read_text())
    schema = package_distribution("sweeps").locate_file("sweeps/config/schema.json")
    jsonschema.validate(content, json.loads(Path(schema).read_text()))
    chosen = {key: {"value": range_.get("values", [range_.get("min")])[0]} for key, range_ in content["parameters"].items()}
    command = wandb_sweeps.create_sweep_command(content["command"])
    assert command[:3] == ["${env}", "darkroom", "fit"]
    argv = [*command[4:-1], *wandb_sweeps.create_sweep_command_args({"args": chosen})["args"]]
    assert forked(check_overrides, command[3], argv, {key: entry["value"] for key, entry in chosen.items()}) == 0


def check_overrides(recipe, argv, params):
    cli = DarkroomCLI("fit", find_recipe(recipe), argv)
    for key, value in params.items():
        section, _, name = key.partition(".")
        assert cli.config[section].init_args[name] == value, key


def test_every_search_is_named_after_a_trained_method():
    trained = {path.parent.parent.name for path in METHODS.glob("*/recipes/demo.yaml")}
    assert {path.stem for path in SEARCHES} <= trained
    assert all(path.suffix == ".yaml" for path in (ROOT / "sweeps").iterdir())


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("name", ["espcn", "vae"])
def test_committed_results_match_the_search_file(name):
    search = read_search(ROOT / f"sweeps/{name}.yaml", [])
    folder = METHODS / f"{name}/search"
    with (folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == search.max_trials
    assert list(trials[0]) == ["trial", "state", search.metric, *search.search_space, "seconds", "run"]
    best = find_recipe(str(folder / "best.yaml")).content
    chosen = {key: best[key.partition(".")[0]]["init_args"][key.partition(".")[2]] for key in search.search_space}
    assert {key: str(value) for key, value in chosen.items()} == {key: trials[0][key] for key in chosen}
    assert forked(check_overrides, str(folder / "best.yaml"), [], chosen) == 0


SHRUNK = {
    "espcn": ["--model.total_images", "32", "--val_every_images", "16"],
    "srcnn": ["--model.total_images", "32", "--val_every_images", "16"],
    "gan": ["--model.total_images", "200", "--val_every_images", "100"],
    "dcgan": ["--model.total_images", "64", "--val_every_images", "32"],
    "cyclegan": [
        "--model.total_images",
        "2",
        "--val_every_images",
        "1",
        "--data.max_val_images",
        "1",
        "--model.base_channels",
        "2",
        "--model.n_residual_blocks",
        "1",
    ],
    "perceptual_sr": ["--model.total_images", "64", "--val_every_images", "32", "--model.pixel_images", "32"],
    "unet": [
        "--model.total_images",
        "8",
        "--val_every_images",
        "4",
        "--data.crop",
        "44",
        "--data.margin",
        "40",
        "--model.depth",
        "2",
        "--model.tile_size",
        "100",
    ],
    "deeplab": [
        "--model.total_images",
        "8",
        "--val_every_images",
        "4",
        "--data.batch_size",
        "2",
        "--data.crop",
        "64",
        "--model.tile_size",
        "96",
    ],
    "vae": [],
    "autoencoder": ["--model.total_images", "200", "--val_every_images", "100"],
}
SHRUNK["progan"] = [*SHRUNK["dcgan"], "--model.stable_images", "2", "--model.fade_images", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_bundled_search_completes_a_trial_with_its_metric(path, workdir):
    search = read_search(path, [])
    for name in {search.recipe.content["data"]["init_args"][key] for key in ("train", "val")}:
        lay_out(name)
    if path.stem == "vae":  # its search file sets the number of images
        path = workdir / "vae.yaml"
        path.write_text((ROOT / "sweeps/vae.yaml").read_text().replace("200000", "200").replace("50000", "100"))
    assert forked(main, ["sweep", str(path), "--n-trials", "1", *SHRUNK.get(path.stem, SHRUNK["dcgan"])]) == 0
    (trial,) = trials_of(workdir, path.stem)
    assert trial["state"] == "COMPLETE"
    log = read_metrics_csv(workdir / "runs" / search.recipe.name / trial["run"] / "metrics.csv")
    values = [float(row["value"]) for row in log if row["name"] == search.metric]
    assert float(trial[search.metric]) == (max if search.maximize else min)(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "annealing"}, r"search\.yaml: method: annealing"),
        ({"metric": None}, r"search\.yaml: not a search.*`metric`"),
        ({"command": ["darkroom", "fit", "${args}"]}, r"search\.yaml: command: .*fit, RECIPE"),
        ({"command": ["darkroom", "fit", "nonsense", "${args}"]}, r"'nonsense'"),
        ({"parameters": {"model.scale": {"min": 3, "max": 2}}}, r"model\.scale: .*`min` below its `max`"),
        ({"parameters": {"model.scale": {"min": 2, "max": 3}}}, r"model\.scale: a grid needs `values`"),
        ({"parameters": {"model.scale": 3}}, r"model\.scale: 3;"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0, "distribution": "beta"}}}, r"x: distribution: beta;.*uniform"),
        ({"early_terminate": {"type": "hyperband"}}, r"early_terminate: .*min_iter"),
        ({"controller": {"type": "local"}}, r"search\.yaml: controller:"),
        ({"name": "../x"}, r"search\.yaml: name: \.\./x;"),
        ({"name": ".."}, r"search\.yaml: name: \.\.;"),
        ({"run_cap": -3}, r"search\.yaml: run_cap: -3; it must be an integer of at least 1"),
        ({"run_cap": "many"}, r"search\.yaml: run_cap: many; it must be an integer"),
        ({"command": "fit"}, r"search\.yaml: command: fit; it must end in"),
        ({"parameters": ["model.scale"]}, r"search\.yaml: parameters: .* must be a map"),
        ({"parameters": {"help": {"values": [1]}}}, r"search\.yaml: help: not a key of a recipe"),
        ({"parameters": {"model.scale": {"values": []}}}, r"model\.scale: values: \[\]; it must be a list"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0, "q": 0}}}, r"x: q: 0; it must be greater than 0"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0, "q": 0.5}}}, r"x: q: 0\.5; it needs distribution: q_uniform"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [0, 1]}}}, r"x: probabilities is not supported"),
        ({"parameters": {"x": {"mu": 0, "sigma": 1}}}, r"x: mu is not supported\. Use distribution, max, min, q"),
        ({"parameters": {"x": {"min": 0.0, "max": float("inf")}}}, r"x: .*`min` below its `max`"),
        (
            {"parameters": {"x": {"min": 0.0, "max": 1.0, "distribution": "log_uniform_values"}}},
            r"x: min: 0\.0; log_uniform_values needs a value greater than 0",
        ),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 0}}, r"early_terminate\.eta: 0;"),
        ({"early_terminate": ["hyperband"]}, r"early_terminate: \['hyperband'\]; it needs type hyperband"),
    ],
)
def test_invalid_search_raises_an_error(workdir, photos, changes, message):
    with pytest.raises(UserError, match=message):
        read_search(write_search(workdir, photos, **changes), [])


def test_numbers_need_no_quotation_marks_and_no_decimal_point(workdir, photos):
    path = write_search(workdir, photos, method="random", parameters={"model.learning_rate": {"min": "1e-4", "max": "1e-2"}})
    path.write_text(path.read_text().replace("- ${args}", "- --model.total_images\n- 64\n- ${args}").replace("'1e-4'", "1e-4"))
    search = read_search(path, [])
    assert search.parameters["model.learning_rate"] == {"min": 1e-4, "max": 1e-2, "distribution": "uniform"}
    assert search.fixed_args == ("--model.total_images", "64")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep", "nowhere.yaml"], "nowhere.yaml"),
        (["sweep", "search.yaml", "--n-trials", "0"], "sweep: --n-trials 0:"),
        (
            ["sweep", "search.yaml", "--model.learning_rate", "1e-3"],
            "--model.learning_rate: already a parameter of search.yaml",
        ),
        (["sweep", "search.yaml", "--model.total_images"], "--model.total_images:"),
        (["sweep", "search.yaml", "--storage", "oracle://nowhere"], "--storage oracle://nowhere:"),
        (["sweep", "search.yaml", "--model.imags", "60"], "unknown key 'model.imags' of modules.espcn.ESPCN"),
        (["sweep", "search.yaml", "--data.train", "./nowhere"], "darkroom: ./nowhere: no such folder"),
    ],
)
def test_errors_are_printed_on_one_line(workdir, photos, capfd, argv, message):
    write_search(workdir, photos)
    assert forked(main, argv) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_every_value_is_checked_before_the_first_trial(workdir, photos, capfd):
    for values in (["tanh", "sinh"], ["tanh", 3]):
        write_search(workdir, photos, parameters={"model.activation": {"values": values}})
        assert forked(main, ["sweep", "search.yaml"]) == 2
        assert f"model.activation: '{values[1]}' is not one of" in capfd.readouterr().err
        assert not (workdir / "runs").exists()


def test_unknown_metric_lists_the_logged_metrics(workdir, photos, capfd):
    write_search(workdir, photos, metric={"name": "psnr", "goal": "maximize"})
    assert forked(main, ["sweep", "search.yaml"]) == 2
    error = capfd.readouterr().err
    assert "metric: 'psnr'" in error and f"{photos.name}-holdout/psnr" in error


# Sampling


def test_distributions_match_wandb(workdir, photos):
    """W&B: log_uniform_values between min and max, q_uniform in steps, integers if both bounds are integers."""
    parameters = {
        "log": {"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"},
        "integer": {"min": 3, "max": 5},
        "real": {"min": 0.0, "max": 1.0},
        "steps": {"min": 0.0, "max": 1.0, "q": 0.25, "distribution": "q_uniform"},
        "integer_steps": {"min": 8, "max": 32, "q": 8, "distribution": "q_uniform"},
        "lists": {"values": [[1, 2], [3]]},
        "always": {"value": 7},
    }
    search = read_search(write_search(workdir, photos, parameters=parameters, method="random"), [])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    samples = [study.ask(distributions(search)).params for _ in range(400)]
    assert {params["integer"] for params in samples} == {3, 4, 5}
    assert {params["steps"] for params in samples} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {params["integer_steps"] for params in samples} == {8, 16, 24, 32}
    assert all(type(params["integer_steps"]) is int for params in samples)
    assert {params["lists"] for params in samples} == {"[1, 2]", "[3]"}
    logs = [params["log"] for params in samples]
    assert min(logs) >= 1e-4 and max(logs) <= 1e-1
    assert 0.4 < sum(value < 10**-2.5 for value in logs) / 400 < 0.6  # half of them are below the geometric mean
    assert 0.4 < sum(params["real"] < 0.5 for params in samples) / 400 < 0.6
    argv = search.to_argv(samples[0])
    assert argv[argv.index("--always") + 1] == "7"
    assert argv[argv.index("--lists") + 1] in ("[1, 2]", "[3]")


def make_study(workdir, photos, **changes):
    search = read_search(write_search(workdir, photos, **changes), [])
    (workdir / "runs/sweeps/search").mkdir(parents=True)
    return search, open_study(search, None)


def test_grid_samples_every_combination_once_despite_requeued_trials(workdir, photos):
    parameters = {"a": {"values": [1, 2, 3]}, "b": {"values": ["x", "y"]}}
    search, study = make_study(workdir, photos, parameters=parameters)
    done = []
    for i in range(20):
        trial = next_trial(search, study)
        if trial is None:
            break
        if i in (1, 4, 5):
            requeue(study, trial)
            continue
        done.append((trial.params["a"], trial.params["b"]))
        study.tell(trial, 0.0)
    assert sorted(done) == sorted(itertools.product([1, 2, 3], ["x", "y"]))
    assert next_trial(search, study) is None


def test_only_stale_trials_are_requeued_and_only_once(workdir, photos, monkeypatch):
    search, study = make_study(workdir, photos)
    lost, alive = next_trial(search, study), next_trial(search, study)
    now = time.time()
    lost.set_user_attr("heartbeat", now)
    alive.set_user_attr("heartbeat", now + 60)
    monkeypatch.setattr(time, "time", lambda: now + search_worker.STALE_S + 30)
    other = open_study(search, None)  # another worker's view of the same storage
    requeue_stale(study)
    requeue_stale(other)
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert study.get_trials()[2].system_attrs["fixed_params"] == lost.params
    assert next_trial(search, other).params == lost.params
    assert ordinal(study, 3) == 2


def test_storage_rejects_another_search_of_the_same_name(workdir, photos):
    search, _ = make_study(workdir, photos)
    open_study(search, None)
    other = read_search(write_search(workdir, photos, parameters={"model.learning_rate": {"values": [1.0]}}), [])
    with pytest.raises(UserError, match=r"journal\.log: 'search'.*`name`"):
        open_study(other, None)
