"""Searches: W&B's format, workers that share a store, what a killed one loses, and what a search leaves."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import distribution as installed
from pathlib import Path

import jsonschema
import optuna
import pytest
import yaml
from filelock import FileLock
from optuna.trial import TrialState
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from callbacks.csv_log import read_log
from datamodules.refused import Refused
from experiments import sweep
from experiments.cli import DarkroomCLI
from experiments.main import main
from experiments.recipes import find_recipe
from experiments.records import ROOT
from experiments.runs import Run
from experiments.search import read_search
from experiments.sweep import again, distributions, next_trial, open_study, place, put_back
from tests.forked import forked
from tests.layouts import lay_out
from tests.tiny import write_recipe

SEARCHES = sorted((ROOT / "sweeps").glob("*.yaml"))
RATE = {"model.learning_rate": {"values": [1e-2, 1e-3, 1e-5]}}


def write_search(folder, photos, **changes):
    """Of a network of 15 steps."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "images": 60}}
    recipe = write_recipe(folder / "tiny.yaml", photos, model)
    settings = yaml.safe_load(recipe.read_text())
    del settings["trainer"]["callbacks"][1:]  # the tests' own, which a user's process does not find
    recipe.write_text(yaml.safe_dump(settings))
    content = {
        "method": "grid",
        "metric": {"name": f"{photos.name}-kept/psnr/y-shave3", "goal": "maximize"},
        "parameters": RATE,
        "command": ["${env}", "darkroom", "fit", str(recipe), "${args}"],
        **changes,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def trials_of(workplace, name="search"):
    with (workplace / f"runs/sweeps/{name}/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# The files


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
    assert forked(parses, command[3], words, chosen) == 0


def parses(recipe, words, chosen):
    cli = DarkroomCLI("fit", find_recipe(recipe), words)
    for key, entry in chosen.items():
        part, _, name = key.partition(".")
        assert cli.config[part].init_args[name] == entry["value"], key


def test_there_is_one_for_every_method_that_learns():
    trained = {path.parent.parent.name for path in (ROOT / "experiments").glob("*/recipes/demo.yaml")}
    assert {path.stem for path in SEARCHES} == trained
    assert all(path.suffix == ".yaml" for path in (ROOT / "sweeps").iterdir())


SHRUNK = {
    "espcn": ["--model.images", "32", "--validate_every", "16"],
    "srcnn": ["--model.images", "32", "--validate_every", "16"],
    "gan": ["--model.images", "200", "--validate_every", "100"],
    "dcgan": ["--model.images", "64", "--validate_every", "32"],
    "cyclegan": [
        "--model.images",
        "2",
        "--validate_every",
        "1",
        "--data.most",
        "1",
        "--model.width",
        "2",
        "--model.blocks",
        "1",
    ],
    "unet": [
        "--model.images",
        "8",
        "--validate_every",
        "4",
        "--data.crop",
        "44",
        "--data.margin",
        "40",
        "--model.depth",
        "2",
        "--model.tile",
        "100",
    ],
    "deeplab": [
        "--model.images",
        "8",
        "--validate_every",
        "4",
        "--data.batch_size",
        "2",
        "--data.crop",
        "64",
        "--model.tile",
        "96",
    ],
    "vae": [],
    "autoencoder": ["--model.images", "200", "--validate_every", "100"],
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
    log = read_log(workplace / "runs" / search.recipe.name / trial["run"] / "metrics.csv")
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
    with pytest.raises(Refused, match=says):
        read_search(write_search(workplace, photos, **changes), [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sweep", "nowhere.yaml"], "no search nowhere.yaml; those that are shipped are in sweeps/"),
        (["sweep", "search.yaml", "--trials", "0"], "sweep: --trials 0: at least 1"),
        (["sweep", "search.yaml", "--model.learning_rate", "1e-3"], "--model.learning_rate is searched for by search.yaml"),
        (["sweep", "search.yaml", "--model.images"], "--model.images: each key of a recipe needs one value"),
        (["sweep", "search.yaml", "--store", "oracle://nowhere"], "--store oracle://nowhere:"),
        (["sweep", "search.yaml", "--model.imags", "60"], "unknown key 'model.imags' of modules.espcn.ESPCN"),
        pytest.param(
            ["sweep", "search.yaml", "--model.images", "0"],
            "the first 3 trials failed; the last: darkroom: model.images: 0 is not a budget",
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
    assert f"metric: no figure 'psnr' is logged by tiny; these are: {photos.name}-kept/psnr" in capfd.readouterr().err


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
    with pytest.raises(Refused, match=r"'search' was begun as another search; give the file another `name`"):
        open_study(other, None)


# Workers


def fast_worker(words):
    sweep.BEAT, sweep.EXPIRED, sweep.LOOK = 0.3, 8, 0.2
    return main(words)


def started(words):
    """A worker as a user starts it, with a pulse that tests can wait for."""
    code = f"from tests.test_sweep import fast_worker; import sys; sys.exit(fast_worker({words!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "store", [None, pytest.param("sqlite:///{}/trials.db", marks=pytest.mark.slow)], ids=["journal", "sql"]
)
def test_of_two_workers_one_is_killed_and_nothing_is_missing(workplace, photos, store):
    """SIGKILL ends its trial with it; the other worker, or the next one to be started, goes on with that very run."""
    write_search(workplace, photos)
    words = ["sweep", "search.yaml", "--model.images", "4000", "--validate_every", "400"]
    words += ["--store", store.format(workplace)] if store else []
    workers = [started(words) for _ in range(2)]
    wait_for(lambda: len(list((workplace / "runs/tiny").glob("search-*/checkpoints/last.ckpt"))) == 2)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].wait()
    said = workers[1].communicate(timeout=280)[0]
    if "is put back" not in said:  # it had nothing left to do before the other one's pulse was missed
        time.sleep(9)
        assert forked(fast_worker, words) == 0
    trials = trials_of(workplace)
    assert sorted(float(trial["model.learning_rate"]) for trial in trials) == [1e-5, 1e-3, 1e-2]
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    assert len({trial["run"] for trial in trials}) == 3
    texts = [path.read_text() for path in (workplace / "runs/sweeps/search").glob("*.txt")]
    assert sum("going on with" in text for text in texts) == 1


def test_a_run_that_is_still_trained_is_waited_for(tmp_path, monkeypatch):
    """As by a worker that was thought dead."""
    monkeypatch.setattr(sweep, "LOOK", 0.05)
    run, stop = Run(tmp_path), threading.Event()
    with FileLock(tmp_path / ".lock"):
        waiting = threading.Thread(target=sweep.wait_until_free, args=(run, stop))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_a_worker_that_is_asked_to_stop_puts_its_trial_back_and_goes_on_later(workplace, photos):
    """The trial's last weights are those of a run that nobody stopped."""
    write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    words = ["sweep", "search.yaml", "--model.images", "4000", "--validate_every", "400"]
    worker = started(words)
    wait_for(lambda: list((workplace / "runs/tiny").glob("search-*/checkpoints/last.ckpt")))
    worker.send_signal(signal.SIGTERM)
    said = worker.communicate(timeout=120)[0]
    assert worker.returncode == 85 and "is put back" in said and "The same command goes on" in said
    assert forked(main, words) == 0
    (trial,) = trials_of(workplace)
    settings = ["--model.images", "4000", "--validate_every", "400", "--model.learning_rate", "0.01"]
    assert forked(main, ["fit", "tiny.yaml", "--run", "whole", *settings]) == 0
    records = [json.loads((workplace / f"runs/tiny/{name}/record.json").read_text()) for name in (trial["run"], "whole")]
    assert records[0]["weights"] == records[1]["weights"]


def test_a_trial_that_is_behind_ends_early(workplace, photos):
    early = {"type": "hyperband", "min_iter": 1, "max_iter": 2}
    path = write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2, 1e-7]}}, early_terminate=early)
    assert forked(fast_worker, ["sweep", str(path), "--model.images", "12000", "--validate_every", "400"]) == 0
    good, bad = trials_of(workplace)
    assert (good["state"], bad["state"]) == ("COMPLETE", "PRUNED")
    runs = workplace / "runs/tiny"
    assert (runs / good["run"] / "record.json").exists()
    assert not (runs / bad["run"] / "record.json").exists()


def test_a_trial_may_be_of_several_processes(workplace, photos):
    """One decision: the second process trains in the first one's run."""
    path = write_search(workplace, photos, parameters={"model.learning_rate": {"values": [1e-2]}})
    assert forked(main, ["sweep", str(path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]) == 0
    (trial,) = trials_of(workplace)
    assert len(list((workplace / "runs/tiny").iterdir())) == 1
    record = json.loads((workplace / f"runs/tiny/{trial['run']}/record.json").read_text())
    assert record["hardware"]["processes"] == 2


# What it leaves


def test_table_pictures_and_the_best_recipe(workplace, photos):
    rates = {"model.learning_rate": {"values": [1e-2, 1e-4]}, "model.activation": {"value": "relu"}}
    write_search(workplace, photos, name="<b>rates", parameters=rates)
    assert forked(main, ["sweep", "search.yaml"]) == 0
    folder = workplace / "runs/sweeps/<b>rates"
    trials = trials_of(workplace, "<b>rates")
    metric = f"{photos.name}-kept/psnr/y-shave3"
    assert len(trials) == 2
    assert [float(trial[metric]) for trial in trials] == sorted((float(trial[metric]) for trial in trials), reverse=True)
    page = (folder / "report.html").read_text()
    assert "<b>rates" not in page and "&lt;b&gt;rates" in page
    assert 'src="http' not in page and "Parallel coordinates" in page
    for plot in ("optimization_history", "param_importances", "parallel_coordinate"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert forked(main, ["fit", str(folder / "best.yaml"), "--run", "best"]) == 0
    best = read_log(workplace / "runs/best/best/metrics.csv")
    assert max(float(row["value"]) for row in best if row["name"] == metric) == float(trials[0][metric])
    before = (folder / "trials.csv").read_text()
    assert forked(main, ["sweep", "search.yaml", "--report"]) == 0
    assert (folder / "trials.csv").read_text() == before
