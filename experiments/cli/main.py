"""The `darkroom` command. torch and Lightning are imported only by commands that run a network, so the others start fast."""

import os
import sys
from difflib import get_close_matches
from importlib.metadata import version
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path

from callbacks.run.early_signals import handle_early_signals
from callbacks.run.exit_codes import request_requeue
from datamodules.errors import UserError, is_dead_worker
from experiments.cli import bench_commands, latent_commands, style_commands
from experiments.cli.errors import one_line
from experiments.cli.help_text import COMMAND_OPTIONS, HELP, RUN_HELP
from experiments.cli.parser import Parser
from experiments.cli.process_errors import environment_error, exit_with_parent, is_out_of_memory, report_error
from experiments.run.network import find_network
from experiments.run.recipes import find_recipe, known_method, methods


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit status: 0 for success, 1 if a check failed, 2 for an error of the user or of the machine (a full disk, too
        little memory), 130 if the command was interrupted.
    """
    argv = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files can have bytes that are not UTF-8
    if argv[:1] in (["fit"], ["sweep"]):
        handle_early_signals()
    try:
        require_values(argv)
        status = dispatch(argv)
        request_requeue(status)
        return status
    except SystemExit as ended:
        request_requeue(ended.code)
        raise
    except UserError as error:
        report_error(error)
        return 2
    except KeyboardInterrupt:
        print("darkroom: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `darkroom list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, UnicodeError) as error:
        report_error(environment_error(error))
        return 2
    except RuntimeError as error:
        if is_dead_worker(error):
            advice = "If memory was short, use a lower --data.num_workers"
            report_error(UserError(f"{one_line(str(error)).rstrip('. ')}. {advice}"))
            return 2
        if not is_out_of_memory(error):
            raise
        report_error(environment_error(MemoryError(one_line(str(error)))))
        return 2


def require_values(argv: list[str]) -> None:
    """Refuse options with an empty value, such as that of an unset variable of the shell.

    Raises:
        UserError: a value is empty.
    """
    for word, following in pairwise([*argv, "-"]):
        if word.startswith("--") and ((word.endswith("=") and word.count("=") == 1) or not following):
            raise UserError(f"{word.rstrip('=')} is empty. Give a value, or remove it")


def dispatch(argv: list[str]) -> int:
    """Run the command given by the first argument, and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        from datamodules.io.paths import data_root
        from experiments.run.paths import runs_root

        print(HELP.format(data=data_root(), runs=runs_root()))
        return 0
    if argv[0] == "--version":
        print(version("darkroom"))
        return 0
    command, args = argv[0], argv[1:]
    if command in ("fit", "validate", "test", "predict"):
        return _run(command, args)
    if command not in COMMANDS:
        matches = get_close_matches(command, ["fit", "validate", "test", "predict", *COMMANDS], n=1, cutoff=0)
        raise UserError(f"no command '{command}'; did you mean '{matches[0]}'? (darkroom --help)")
    return COMMANDS[command](args)


def _run(command: str, argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        or_run = "" if command == "fit" else ", or the folder of a run, or a .safetensors file of its weights"
        print(RUN_HELP.format(command=command, options=COMMAND_OPTIONS[command], methods=" ".join(methods()), or_run=or_run))
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError(f"{command}: the recipe comes first. Example: darkroom {command} espcn/demo (darkroom list shows all)")
    if command == "fit":
        recipe, overrides = find_recipe(argv[0]), argv[1:]
    else:
        parser = Parser(prog=f"darkroom {command}", add_help=False)
        parser.add_argument("--run")
        parser.add_argument("--modules")
        args, overrides = parser.parse_known_args(argv[1:])
        recipe, overrides = find_network(argv[0], args.run, overrides, args.modules)
        if recipe.embedded is not None and command != "predict" and "trainer" not in recipe.embedded:
            raise UserError(f"{command}: {argv[0]} names no metrics. Use darkroom {command} RECIPE --ckpt {argv[0]}")
    if os.environ.get("LOCAL_RANK", "0") != "0" and "DARKROOM_RUN_FOLDER" in os.environ:  # launched by Lightning in rank 0
        exit_with_parent()
    from experiments.run.execute import execute

    execute(command, recipe, overrides)
    return 0


def _demo(argv: list[str]) -> int:
    Parser(prog="darkroom demo", description="Train ESPCN x3 on photographs and compare it with bicubic.").parse_args(argv)
    from experiments.run.demo import demo

    demo()
    return 0


def _list(argv: list[str]) -> int:
    parser = Parser(prog="darkroom list", description="List the methods, or the recipes of one method.")
    parser.add_argument("method", nargs="?", help="method whose recipes are described")
    args = parser.parse_args(argv)
    from experiments.cli.listing import show_method, show_methods

    show_method(known_method(args.method)) if args.method else show_methods()
    return 0


def _data(argv: list[str]) -> int:
    parser = Parser(prog="darkroom data", description="List, download and verify datasets.")
    commands = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    commands.add_parser("list", help="list all datasets with status and installation instructions")
    for action, description in (
        ("get", "download a dataset"),
        ("verify", "compare a dataset with its manifest, pixel by pixel"),
    ):
        commands.add_parser(action, help=description).add_argument("name", help="name of the dataset")
    args = parser.parse_args(argv)
    from experiments.cli import listing

    if args.action == "list":
        listing.show_data()
        return 0
    return {"get": listing.get_data, "verify": listing.verify_data}[args.action](args.name)


def _reproduce(argv: list[str]) -> int:
    parser = Parser(
        prog="darkroom reproduce", description="Print a paper's tables, with the published values and ours, from run records."
    )
    parser.add_argument("method", nargs="?", help="a method; darkroom list shows all")
    parser.add_argument(
        "--run", action="store_true", help="run the recipes whose records are missing or stale, if their data are installed"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="with --run: train with seeds 0 ... N-1 (default 1)")
    parser.add_argument("--only", metavar="RECIPE", help="with --run: run only this recipe")
    parser.add_argument("--table", metavar="TEXT", help="print only tables with TEXT in their names, such as 'Table 2'")
    parser.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="all",
        help="for records whose code has changed: run the first steps with the old and the new code, and compare them",
    )
    parser.add_argument("--renames", metavar="FILE", type=Path, help="with --check: YAML file of old and new names")
    parser.add_argument("--update", nargs="+", default=[], metavar="METRIC", help="with --check: metrics with new values")
    parser.add_argument("--write", action="store_true", help="write the tables to the method's page, RESULTS.md and the README")
    parser.add_argument("--json", action="store_true", help="print the cells of the tables as JSON")
    args = parser.parse_args(argv)
    if (args.renames or args.update) and args.check is None:
        raise UserError("reproduce: --renames and --update require --check. Add --check")
    if args.check is not None and (args.run or args.write or args.json or args.only or args.table or args.seeds != 1):
        raise UserError("reproduce: --check takes no option but --renames and --update. Remove the others")
    if args.check and args.method:
        raise UserError("reproduce: --check all checks every method. Remove 'all' or the method")
    method = args.method or args.check
    if not method:
        raise UserError("reproduce: no method given. Give a method, or check the records of all methods with --check all")
    if args.check is not None:
        from experiments.results.check import check
        from experiments.results.renames import read_renames

        checked = methods() if method == "all" else [known_method(method)]
        return 0 if check(checked, read_renames(args.renames), args.update) else 1
    from experiments.results.reproduce import reproduce

    reproduce(args.method, args.run, args.seeds, args.only, args.write, args.json, args.table)
    return 0


def _folds(argv: list[str]) -> int:
    parser = Parser(
        prog="darkroom folds", description="Cross-validation: train once for each of N shares. --KEY VALUE overrides a key."
    )
    parser.add_argument("recipe", help="recipe whose data have the key fold, such as unet/folder")
    parser.add_argument("count", type=int, metavar="N", help="number of folds, from 2 on")
    args, overrides = parser.parse_with_overrides(argv)
    if not 2 <= args.count <= 1000:
        raise UserError(f"folds: {args.count} folds; use 2 to 1000")
    recipe = find_recipe(args.recipe)
    from experiments.run.folds import folds

    folds(recipe, args.count, overrides)
    return 0


def _sweep(argv: list[str]) -> int:
    parser = Parser(
        prog="darkroom sweep",
        description="Search hyperparameters; each trial is one `darkroom fit` run. --KEY VALUE overrides a key of the recipe.",
    )
    parser.add_argument(
        "search", metavar="FILE", help="YAML file in the sweep format of Weights & Biases, such as sweeps/espcn.yaml"
    )
    parser.add_argument(
        "--storage", metavar="S", help="storage shared by the workers: a journal file, or the URL of an SQL database"
    )
    parser.add_argument("--n-trials", type=int, metavar="N", help="maximum number of trials; overrides the file's run_cap")
    parser.add_argument("--report", action="store_true", help="only report the results so far")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the trials with Ray: the cluster's address, auto (this machine's cluster), or local (this machine only)",
    )
    parser.add_argument("--gpus", type=float, metavar="N", help="with --ray: GPUs per trial (default 0)")
    parser.add_argument("--cores", type=float, metavar="N", help="with --ray: CPU cores per trial (default 1)")
    args, keys = parser.parse_known_args(argv)
    if args.n_trials is not None and args.n_trials < 1:
        raise UserError(f"sweep: --n-trials {args.n_trials}: must be at least 1")
    if not args.ray and (args.gpus is not None or args.cores is not None):
        raise UserError("sweep: --gpus and --cores require --ray. Add --ray, or remove them: a worker uses its whole machine")
    from experiments.search.spec import read_search

    search = read_search(Path(args.search), keys, args.n_trials)
    from experiments.search import report, worker

    if args.report:
        study = worker.open_study(search, args.storage)
    else:
        from experiments.run.lightning_cli import validate_overrides
        from experiments.search.samplers import examples

        validate_overrides(search.recipe, *examples(search))
        if args.ray:
            from experiments.search.ray_backend import sweep_on_ray

            study = sweep_on_ray(search, args.storage, args.ray, args.gpus or 0, args.cores or 1)
        else:
            study = worker.sweep(search, args.storage)
    report.report(search, study, worker.folder_of(search))
    return 0


def _submit(argv: list[str]) -> int:
    parser = Parser(prog="darkroom submit", description="Train a recipe, or run the workers of a search, on a SLURM cluster.")
    parser.add_argument("target", metavar="RECIPE|FILE", help="a recipe, or a search such as sweeps/espcn.yaml")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default 1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs per node (default 0: train on CPUs)")
    parser.add_argument("--processes", type=int, metavar="N", help="processes per node without GPUs (default 1)")
    parser.add_argument("--cores", type=int, default=4, metavar="N", help="CPU cores per process (default 4)")
    parser.add_argument(
        "--time", default="24:00:00", help="time limit of the job; unfinished work resumes in the next job (default 24:00:00)"
    )
    parser.add_argument(
        "--notice",
        type=int,
        default=120,
        metavar="S",
        help="seconds before the time limit at which the run saves (default 120)",
    )
    parser.add_argument(
        "--prologue", action="append", default=[], metavar="LINE", help="shell line before the command: 'module load cuda'"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="for a search: number of jobs in the array (default 1)")
    parser.add_argument("--storage", metavar="S", help="for a search: storage shared by the workers, as in darkroom sweep")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="option passed to sbatch: --sbatch=--partition=gpu"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the batch file")
    args, keys = parser.parse_known_args(argv)
    for name in ("nodes", "cores", "processes", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"submit: --{name} {value}: must be at least 1")
    if args.gpus < 0 or (args.gpus and args.processes):
        raise UserError("submit: --gpus must be at least 0, and excludes --processes, because each GPU has one process")
    processes = args.processes or args.gpus or 1
    from experiments.cluster.slurm import Job, submit_search, submit_training
    from experiments.search.spec import is_search

    if args.notice < 1:
        raise UserError(f"submit: --notice {args.notice}: must be at least 1")
    job = Job(
        args.nodes, processes, args.gpus, args.cores, args.time, args.notice, args.prologue, args.workers or 0, args.sbatch
    )
    if is_search(Path(args.target)):
        submit_search(Path(args.target), keys, job, args.storage, args.dry_run)
        return 0
    for name in ("workers", "storage"):
        if getattr(args, name):
            raise UserError(f"submit: --{name} requires a search, but {args.target} is a recipe. Remove --{name}")
    submit_training(find_recipe(args.target), keys, job, args.dry_run)
    return 0


COMMANDS = {
    "demo": _demo,
    "list": _list,
    "data": _data,
    "reproduce": _reproduce,
    "folds": _folds,
    "bench": bench_commands.bench,
    "scaling": bench_commands.scaling,
    "sweep": _sweep,
    "submit": _submit,
    "sample": latent_commands.sample,
    "interpolate": latent_commands.interpolate,
    "arithmetic": latent_commands.arithmetic,
    "manifold": latent_commands.manifold,
    "growth": latent_commands.growth,
    "export": latent_commands.export,
    "nearest": latent_commands.nearest,
    "reconstruct": latent_commands.reconstruct,
    "retrieve": latent_commands.retrieve,
    "neural-style": style_commands.neural_style,
    "deepdream": style_commands.deepdream,
    "style-speed": style_commands.style_speed,
    "style-objective": style_commands.style_objective,
}
