"""Searches: W&B's format, what is refused, and what is chosen."""

import csv
import itertools
import json
import time
from importlib.metadata import distribution as installed
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
from experiments.search import worker as sweep
from experiments.search.spec import read_search
from experiments.search.worker import again, distributions, next_trial, open_study, place, put_back
from tests.helpers.fake_datasets import lay_out
from tests.helpers.search_helpers import trials_of, write_search
from tests.helpers.subprocess_helpers import forked

SEARCHES = sorted((ROOT / "sweeps").glob("*.yaml"))


# The files


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_files_are_what_wandb_takes(path):
    """By W&B's published schema, and its agent's own way from parameters to a command line."""
    content = yaml.safe_load(path.read_text())
    schema = installed("sweeps").locate_file("sweeps/config/schema.json")
    jsonschema.validate(content, json.loads(Path(schema).read_text()))
    chosen = {key: {"value": range_.get("values", [range_.get("min")])[0]} for key, range_ in content["parameters"].items()}
    command = wandb_sweeps.create_sweep_command(content["command"])
    assert command[:3] == ["${env}", "darkroom", "fit"]
    words = [*command[4:-1], *wandb_sweeps.create_sweep_command_args({"args": chosen})["args"]]
    assert forked(parses, command[3], words, {key: entry["value"] for key, entry in chosen.items()}) == 0


def parses(recipe, words, chosen):
    cli = DarkroomCLI("fit", find_recipe(recipe), words)
    for key, value in chosen.items():
        part, _, name = key.partition(".")
        assert cli.config[part].init_args[name] == value, key


def test_there_is_one_for_every_method_that_learns():
    trained = {path.parent.parent.name for path in METHODS.glob("*/recipes/demo.yaml")}
    assert {path.stem for path in SEARCHES} == trained
    assert all(path.suffix == ".yaml" for path in (ROOT / "sweeps").iterdir())


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("name", ["espcn", "vae"])
def test_what_came_of_a_search_is_what_its_file_asked_for(name):
    search = read_search(ROOT / f"sweeps/{name}.yaml", [])
    folder = METHODS / f"{name}/search"
    with (folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == search.cap
    assert list(trials[0]) == ["trial", "state", search.metric, *search.searched, "seconds", "run"]
    best = find_recipe(str(folder / "best.yaml")).content
    chosen = {key: best[key.partition(".")[0]]["init_args"][key.partition(".")[2]] for key in search.searched}
    assert {key: str(value) for key, value in chosen.items()} == {key: trials[0][key] for key in chosen}
    assert forked(parses, str(folder / "best.yaml"), [], chosen) == 0


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


QUICK = ("espcn", "vae", "cyclegan")  # one of each kind; the others are searched by longer proofs


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in SEARCHES],
    ids=lambda path: path.stem,
)
def test_each_runs_a_trial_whose_metric_is_there(path, workplace):
    search = read_search(path, [])
    for name in {search.recipe.content["data"]["init_args"][key] for key in ("train", "val")}:
        lay_out(name)
    if path.stem == "vae":  # whose budget the file says
        path = workplace / "vae.yaml"
        path.write_text((ROOT / "sweeps/vae.yaml").read_text().replace("200000", "200").replace("50000", "100"))
    assert forked(main, ["sweep", str(path), "--trials", "1", *SHRUNK[path.stem]]) == 0
    (trial,) = trials_of(workplace, path.stem)
    assert trial["state"] == "COMPLETE"
    log = read_metrics_csv(workplace / "runs" / search.recipe.name / trial["run"] / "metrics.csv")
    values = [float(row["value"]) for row in log if row["name"] == search.metric]
    assert float(trial[search.metric]) == (max if search.maximise else min)(values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "annealing"}, r"method: annealing; one of grid, random, bayes"),
        ({"metric": None}, r"not a search, which has `method`, `metric`"),
        ({"command": ["darkroom", "fit", "${args}"]}, r"command: .* it is to end in \[fit, RECIPE"),
        ({"command": ["darkroom", "fit", "nonsense", "${args}"]}, r"no recipe 'nonsense'"),
        ({"parameters": {"model.scale": {"min": 3, "max": 2}}}, r"model\.scale: .* a `min` below its `max`"),
        ({"parameters": {"model.scale": {"min": 2, "max": 3}}}, r"model\.scale: a grid needs `values`"),
        ({"parameters": {"model.scale": 3}}, r"model\.scale: 3; `value`, `values`, or"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0, "distribution": "beta"}}}, r"x: distribution: beta; one of uniform"),
        ({"early_terminate": {"type": "hyperband"}}, r"early_terminate: .*type hyperband with min_iter"),
        ({"controller": {"type": "local"}}, r"controller: only W&B's own agent knows"),
        ({"name": "../x"}, r"name: \.\./x; a name, not a path"),
    ],
)
def test_what_cannot_be_done_is_refused(workplace, photos, changes, says):
    with pytest.raises(UserError, match=says):
        read_search(write_search(workplace, photos, **changes), [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sweep", "nowhere.yaml"], "no search nowhere.yaml; those that are shipped are in sweeps/"),
        (["sweep", "search.yaml", "--trials", "0"], "sweep: --trials 0: at least 1"),
        (["sweep", "search.yaml", "--model.learning_rate", "1e-3"], "--model.learning_rate is searched for by search.yaml"),
        (["sweep", "search.yaml", "--model.total_images"], "--model.total_images: each key of a recipe needs one value"),
        (["sweep", "search.yaml", "--store", "oracle://nowhere"], "--store oracle://nowhere:"),
        (["sweep", "search.yaml", "--model.imags", "60"], "unknown key 'model.imags' of modules.espcn.ESPCN"),
        pytest.param(
            ["sweep", "search.yaml", "--model.total_images", "0"],
            "all 3 trials so far failed; the last: darkroom: model.total_images: 0 is not a budget",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistakes_are_answered_in_a_line(workplace, photos, capfd, words, says):
    write_search(workplace, photos)
    assert forked(main, words) == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_metric_that_is_not_logged_is_refused_with_those_that_are(workplace, photos, capfd):
    write_search(workplace, photos, metric={"name": "psnr", "goal": "maximize"})
    assert forked(main, ["sweep", "search.yaml"]) == 2
    assert f"metric: no figure 'psnr' is logged by tiny; these are: {photos.name}-holdout/psnr" in capfd.readouterr().err


# What is chosen


def test_ranges_are_wandbs(workplace, photos):
    """W&B's documentation: log_uniform_values between min and max, q_uniform in steps, whole numbers where both ends are."""
    parameters = {
        "log": {"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"},
        "whole": {"min": 3, "max": 5},
        "real": {"min": 0.0, "max": 1.0},
        "steps": {"min": 0.0, "max": 1.0, "q": 0.25, "distribution": "q_uniform"},
        "lists": {"values": [[1, 2], [3]]},
        "always": {"value": 7},
    }
    search = read_search(write_search(workplace, photos, parameters=parameters, method="random"), [])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    chosen = [study.ask(distributions(search)).params for _ in range(400)]
    assert {params["whole"] for params in chosen} == {3, 4, 5}
    assert {params["steps"] for params in chosen} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {params["lists"] for params in chosen} == {"[1, 2]", "[3]"}
    logs = [params["log"] for params in chosen]
    assert min(logs) >= 1e-4 and max(logs) <= 1e-1
    assert 0.4 < sum(value < 10**-2.5 for value in logs) / 400 < 0.6  # half of them below the geometric middle
    assert 0.4 < sum(params["real"] < 0.5 for params in chosen) / 400 < 0.6
    words = search.words(chosen[0])
    assert words[words.index("--always") + 1] == "7"
    assert words[words.index("--lists") + 1] in ("[1, 2]", "[3]")


def study_of(workplace, photos, **changes):
    search = read_search(write_search(workplace, photos, **changes), [])
    (workplace / "runs/sweeps/search").mkdir(parents=True)
    return search, open_study(search, None)


def test_a_grid_has_every_combination_once_whatever_is_put_back(workplace, photos):
    parameters = {"a": {"values": [1, 2, 3]}, "b": {"values": ["x", "y"]}}
    search, study = study_of(workplace, photos, parameters=parameters)
    done = []
    for turn in range(20):
        trial = next_trial(search, study)
        if trial is None:
            break
        if turn in (1, 4, 5):
            again(study, trial)
            continue
        done.append((trial.params["a"], trial.params["b"]))
        study.tell(trial, 0.0)
    assert sorted(done) == sorted(itertools.product([1, 2, 3], ["x", "y"]))
    assert next_trial(search, study) is None


def test_only_trials_without_a_sign_of_life_are_put_back_and_once(workplace, photos, monkeypatch):
    search, study = study_of(workplace, photos)
    lost, alive = next_trial(search, study), next_trial(search, study)
    now = time.time()
    lost.set_user_attr("beat", now)
    alive.set_user_attr("beat", now + 60)
    monkeypatch.setattr(time, "time", lambda: now + sweep.EXPIRED + 30)
    other = open_study(search, None)  # another worker's view of the same store
    put_back(study)
    put_back(other)
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert study.get_trials()[2].system_attrs["fixed_params"] == lost.params
    assert next_trial(search, other).params == lost.params
    assert place(study, 3) == 2


def test_a_store_keeps_one_search_of_a_name(workplace, photos):
    search, _ = study_of(workplace, photos)
    open_study(search, None)
    other = read_search(write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1.0]}}), [])
    with pytest.raises(UserError, match=r"'search' was begun as another search; give the file another `name`"):
        open_study(other, None)
