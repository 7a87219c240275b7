"""The `darkroom` command. What needs no network answers at once: torch and Lightning are imported only to run one."""

import os
import sys
import threading
import time
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

from datamodules.errors import UserError
from experiments.cli import latent_commands as picture_commands
from experiments.cli.errors import one_line
from experiments.cli.parser import Parser
from experiments.run.recipes import find_recipe, known_method, methods, recipes

HELP = """\
usage: darkroom COMMAND ...

train, measure and use
  demo                       two minutes from photographs to a network that enlarges them
  fit RECIPE [--KEY VALUE]   train; then measure on the test sets that are here
  validate RECIPE            measure on the pictures that choose the checkpoint
  test RECIPE                measure on the test sets that are here
  predict RECIPE --input PICTURE_OR_FOLDER --output FOLDER (--direction BtoA where there are two)
  sample RECIPE --output FOLDER              images made from noise (--count N)
  interpolate RECIPE --between 3 17 42       the way through latent space between samples, as a picture (or --pictures)
  arithmetic RECIPE --plus 1 2 --minus 3 4   sums of samples' latents, as a picture
  manifold RECIPE                            what two latents mean, as a picture (--side N)
  reconstruct RECIPE                         what comes back of pictures of the test set (--numbers 0 1 2)
  retrieve RECIPE                            the pictures whose codes are nearest to a picture's (--numbers 0 1 2, --k N)

  RECIPE is a name (espcn/t91_x3; espcn for its demo) or a path to a YAML file.
  Any key can be given anew: darkroom fit espcn/t91_x3 --model.activation relu --trainer.devices 2
  --run NAME goes on with a run; --wandb offline logs to Weights & Biases; --ckpt FILE names weights.
  darkroom fit RECIPE --help lists every key.

look
  list                       methods, recipes, table cells, and which data are here
  reproduce METHOD           the paper's tables, our values next to theirs (--run, --check, --seeds N, --write, --json)
  sweep FILE                 search hyperparameters as a file of sweeps/ says; any number of workers share a --store
  submit RECIPE|FILE         train, or search, on a SLURM cluster (--nodes N, --gpus N, --workers N, --dry-run)
  bench RECIPE               how fast training is, beside a bare loop and beside a PIL-fed loader (--json)
  scaling RECIPE ...         what a second process gains here, and may be expected of 8 and 64 GPUs (--write)
  data list | get NAME | verify NAME

environment
  DARKROOM_DATA              where data sets lie (now: {data})
  DARKROOM_RUNS              where runs are kept (now: {runs})
"""

RUN_HELP = """\
usage: darkroom {command} RECIPE {own} [--KEY VALUE ...]

  RECIPE is one of: {recipes}
  or a path to a YAML file. darkroom list tells what each is.

  darkroom {command} RECIPE --help lists every key that can be given anew.
"""
# What each command has beside the keys of a recipe.
OWN = {
    "fit": "[--run NAME] [--wandb offline|online]",
    "validate": "[--ckpt FILE]",
    "test": "[--ckpt FILE] [--record FILE]",
    "predict": "--input PICTURE_OR_FOLDER [--output FOLDER] [--direction AtoB|BtoA] [--ckpt FILE]",
}

STARTED = time.perf_counter()
PARENT = os.getppid()
PATIENCE = 8  # seconds that the first process of a run has to end when the others have
FAREWELL = 30  # seconds that a process of a run has to end when the one that started it has


def main(arguments: list[str] | None = None) -> int:
    """Carry out a command line.

    Returns:
        The exit status: 0, 1 if a check found something, 2 for a command that cannot be carried out.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return dispatch(words)
    except UserError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("darkroom: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `darkroom list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def complain(error: UserError) -> None:
    """Say it once: what is wrong in one process of a run is, as a rule, wrong in all, and the first has said it and ended."""
    if (rank := os.environ.get("LOCAL_RANK", "0")) == "0":
        print(f"darkroom: {one_line(str(error))}", file=sys.stderr)
        return
    time.sleep(PATIENCE)
    if os.getppid() == PARENT:
        print(f"darkroom: process {rank}: {one_line(str(error))}", file=sys.stderr)


def end_with_parent() -> None:
    """End soon after the process that started this one: killed before the two have met, it would be waited for half an hour."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(FAREWELL)
        print(f"darkroom: process {os.environ['LOCAL_RANK']} ends: the first of its run is gone", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def dispatch(words: list[str]) -> int:
    """Hand the words to their command."""
    if not words or words[0] in ("-h", "--help", "help"):
        from datamodules.catalog.catalog import data_root
        from experiments.run.run_dir import runs_root

        print(HELP.format(data=data_root(), runs=runs_root()))
        return 0
    if words[0] == "--version":
        print(version("darkroom"))
        return 0
    command, rest = words[0], words[1:]
    if command in ("fit", "validate", "test", "predict"):
        return _run(command, rest)
    if command not in COMMANDS:
        near = get_close_matches(command, ["fit", "validate", "test", "predict", *COMMANDS], n=1, cutoff=0)
        raise UserError(f"no command '{command}'; did you mean '{near[0]}'? (darkroom --help)")
    return COMMANDS[command](rest)


def _run(command: str, rest: list[str]) -> int:
    if rest[:1] in (["-h"], ["--help"]):
        print(RUN_HELP.format(command=command, own=OWN[command], recipes=" ".join(recipe.name for recipe in recipes())))
        return 0
    if not rest or rest[0].startswith("-"):
        raise UserError(f"{command} needs a recipe first: darkroom {command} espcn/demo (darkroom list shows all)")
    recipe = find_recipe(rest[0])
    if os.environ.get("LOCAL_RANK", "0") != "0" and "DARKROOM_RUN_FOLDER" in os.environ:  # Lightning's child, of a run's first
        end_with_parent()
    from experiments.run.execute import execute

    execute(command, recipe, rest[1:])
    return 0


def _demo(rest: list[str]) -> int:
    Parser(prog="darkroom demo", description="Train ESPCN x3 on embedded photographs and look at it.").parse_args(rest)
    from experiments.run.demo import demo

    demo()
    return 0


def _list(rest: list[str]) -> int:
    Parser(prog="darkroom list", description="Methods, recipes, table cells and data.").parse_args(rest)
    from experiments.cli.listing import show_all

    show_all()
    return 0


def _data(rest: list[str]) -> int:
    parser = Parser(prog="darkroom data", description="Data sets: which are here, getting them, checking them.")
    commands = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    commands.add_parser("list", help="all data sets and where they come from")
    for action, text in (("get", "download one"), ("verify", "compare one with its manifest, pixel by pixel")):
        commands.add_parser(action, help=text).add_argument("name", help="data set")
    chosen = parser.parse_args(rest)
    from experiments.cli import listing

    if chosen.action == "list":
        listing.show_data()
        return 0
    return {"get": listing.get_data, "verify": listing.verify_data}[chosen.action](chosen.name)


def _reproduce(rest: list[str]) -> int:
    parser = Parser(prog="darkroom reproduce", description="A paper's tables from run records, our values next to theirs.")
    parser.add_argument("method", nargs="?", help="a method: darkroom list shows them")
    parser.add_argument("--run", action="store_true", help="run what is missing or stale and feasible with the data here")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="with --run: seeds 0 ... N-1 of each training")
    parser.add_argument("--only", metavar="RECIPE", help="with --run: this recipe alone")
    parser.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="all",
        help="replay the records whose code has changed by the old code and by today's, and certify those that are equal",
    )
    parser.add_argument("--renames", metavar="FILE", type=Path, help="with --check: YAML of keys and names that were renamed")
    parser.add_argument("--write", action="store_true", help="put the tables into the method's page and the results page")
    parser.add_argument("--json", action="store_true", help="the cells, for programs")
    chosen = parser.parse_args(rest)
    if chosen.renames and chosen.check is None:
        raise UserError("reproduce: --renames goes with --check")
    if chosen.check and chosen.method:
        raise UserError("reproduce: --check all takes every method; without all, the one that is named")
    method = chosen.method or chosen.check
    if not method:
        raise UserError("reproduce: name a method, or --check all for the records of every method")
    if chosen.check is not None:
        from experiments.results.check import check
        from experiments.results.renames import read_renames

        return 0 if check(methods() if method == "all" else [known_method(method)], read_renames(chosen.renames)) else 1
    from experiments.results.reproduce import reproduce

    reproduce(chosen.method, chosen.run, chosen.seeds, chosen.only, chosen.write, chosen.json)
    return 0


def _bench(rest: list[str]) -> int:
    parser = Parser(prog="darkroom bench", description="Training speed beside a bare loop and a PIL-fed loader, in one run.")
    parser.add_argument("recipe", help="what to time")
    parser.add_argument(
        "--pairs", type=int, default=60, metavar="N", help="interleaved stretches, ours and bare; one with PIL every six"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of a stretch")
    parser.add_argument("--json", action="store_true", help="the figures, for programs")
    chosen = parser.parse_args(rest)
    if chosen.pairs < 6 or chosen.steps < 1:
        raise UserError("bench: --pairs is at least 6, and --steps at least 1")
    recipe = find_recipe(chosen.recipe)
    from experiments.bench.bench import bench

    bench(recipe, chosen.pairs, chosen.steps, chosen.json, STARTED)
    return 0


def _scaling(rest: list[str]) -> int:
    parser = Parser(
        prog="darkroom scaling", description="What more processes gain here, and may be expected to gain elsewhere."
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="what to time")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that work together (default 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="stretches of each kind, interleaved (default 5)")
    parser.add_argument("--seconds", type=float, default=3, metavar="S", help="of a stretch (default 3)")
    parser.add_argument(
        "--write", action="store_true", help="keep it as experiments/bench/scaling.json and experiments/bench/SCALING.md"
    )
    chosen = parser.parse_args(rest)
    if chosen.processes < 2 or chosen.rounds < 1 or not chosen.seconds > 0:
        raise UserError("scaling: --processes is at least 2, --rounds at least 1, and --seconds above 0")
    recipes = [find_recipe(name) for name in chosen.recipes]
    from experiments.bench.scaling import scaling

    scaling(recipes, chosen.processes, chosen.rounds, chosen.seconds, chosen.write)
    return 0


def _sweep(rest: list[str]) -> int:
    parser = Parser(
        prog="darkroom sweep",
        description="Search hyperparameters, a `darkroom fit` a trial. Any key of the recipe can be given anew.",
    )
    parser.add_argument("search", metavar="FILE", help="a search in W&B's sweep format, such as sweeps/espcn.yaml")
    parser.add_argument("--store", metavar="S", help="what the workers share: a journal file, or the URL of an SQL database")
    parser.add_argument("--trials", type=int, metavar="N", help="trials at most, instead of the file's run_cap")
    parser.add_argument("--report", action="store_true", help="only say what came of it so far")
    parser.add_argument("--ray", metavar="ADDRESS", help="let a Ray cluster place the trials: its address, auto, or local")
    parser.add_argument("--gpus", type=float, metavar="N", help="of a trial, with --ray (default 0)")
    parser.add_argument("--cores", type=float, metavar="N", help="of a trial, with --ray (default 1)")
    chosen, keys = parser.parse_known_args(rest)
    if chosen.trials is not None and chosen.trials < 1:
        raise UserError(f"sweep: --trials {chosen.trials}: at least 1")
    if not chosen.ray and (chosen.gpus is not None or chosen.cores is not None):
        raise UserError("sweep: --gpus and --cores go with --ray; a worker by itself has the machine it is started on")
    from experiments.search.spec import read_search

    search = read_search(Path(chosen.search), keys, chosen.trials)
    from experiments.search import report as sweep_report
    from experiments.search import worker as sweep

    if chosen.report:
        study = sweep.open_study(search, chosen.store)
    else:
        from experiments.run.lightning_cli import check_keys

        check_keys(search.recipe, search.example)
        if chosen.ray:
            from experiments.search.ray_backend import sweep_on_ray

            study = sweep_on_ray(search, chosen.store, chosen.ray, chosen.gpus or 0, chosen.cores or 1)
        else:
            study = sweep.sweep(search, chosen.store)
    sweep_report.report(search, study, sweep.folder_of(search))
    return 0


def _submit(rest: list[str]) -> int:
    parser = Parser(prog="darkroom submit", description="Train a recipe, or work on a search, as a job of a SLURM cluster.")
    parser.add_argument("what", metavar="RECIPE|FILE", help="a recipe, or a search such as sweeps/espcn.yaml")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="of each node (default 0: on processors)")
    parser.add_argument("--processes", type=int, metavar="N", help="on each node, without GPUs (default 1)")
    parser.add_argument("--cores", type=int, default=4, metavar="N", help="of each process (default 4)")
    parser.add_argument("--time", default="24:00:00", help="of the job; what has not ended by then goes on in the next one")
    parser.add_argument("--workers", type=int, metavar="N", help="of a search: jobs of an array (default 1)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="for SLURM, as it stands: --sbatch=--partition=gpu"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch file, and do nothing else")
    chosen, keys = parser.parse_known_args(rest)
    for name in ("nodes", "cores", "processes", "workers"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            raise UserError(f"submit: --{name} {value}: at least 1")
    if chosen.gpus < 0 or (chosen.gpus and chosen.processes):
        raise UserError("submit: --gpus 0 or more; with GPUs there is a process for each")
    processes = chosen.processes or chosen.gpus or 1
    from experiments.cluster.slurm import Job, submit_search, submit_training
    from experiments.search.spec import is_search

    job = Job(chosen.nodes, processes, chosen.gpus, chosen.cores, chosen.time, chosen.workers or 0, chosen.sbatch)
    if is_search(Path(chosen.what)):
        submit_search(Path(chosen.what), keys, job, chosen.dry_run)
        return 0
    if chosen.workers:
        raise UserError(f"submit: --workers is for searches, and {chosen.what} is none")
    submit_training(find_recipe(chosen.what), keys, job, chosen.dry_run)
    return 0


COMMANDS = {
    "demo": _demo,
    "list": _list,
    "data": _data,
    "reproduce": _reproduce,
    "bench": _bench,
    "scaling": _scaling,
    "sweep": _sweep,
    "submit": _submit,
    "sample": picture_commands.sample,
    "interpolate": picture_commands.interpolate,
    "arithmetic": picture_commands.arithmetic,
    "manifold": picture_commands.manifold,
    "reconstruct": picture_commands.reconstruct,
    "retrieve": picture_commands.retrieve,
}
