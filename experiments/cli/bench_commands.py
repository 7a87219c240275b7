"""Command lines of `darkroom bench` and `darkroom scaling`."""

import time

from datamodules.errors import UserError
from experiments.cli.parser import Parser
from experiments.run.recipes import find_recipe

STARTED = time.perf_counter()


def bench(argv: list[str]) -> int:
    """Run `darkroom bench` and return the exit status."""
    parser = Parser(
        prog="darkroom bench",
        description="Compare the training speed with a plain PyTorch loop and with PIL loading, and show what a step does. "
        "--KEY VALUE overrides a key: --trainer.precision bf16-mixed, --compile true, --trainer.accelerator cpu.",
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="recipe to time; with --feed: one or more recipes")
    parser.add_argument(
        "--feed",
        action="store_true",
        help="time only the data: training images a second without a network; without RECIPE, for a demo of each task",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help="interleaved pairs of a Trainer and a bare-loop interval; every six pairs, a PIL interval and a pair with one "
        "batch held (default 60). With --feed: pairs of a datamodule and a PIL interval (default 10)",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps per interval (default 20)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args, overrides = parser.parse_with_overrides(argv)
    pairs = args.pairs if args.pairs is not None else 10 if args.feed else 60
    if not 6 <= pairs <= 10_000 or not 1 <= args.steps <= 10_000:
        raise UserError("bench: --pairs must be from 6 to 10,000, and --steps from 1 to 10,000")
    if not args.feed and len(args.recipes) != 1:
        raise UserError(f"bench: {len(args.recipes)} recipes. Give one, or measure the data of several with --feed")
    recipes = [find_recipe(name) for name in args.recipes]
    if args.feed:
        from experiments.bench.feed import FEED_RECIPES, bench_feed

        bench_feed(recipes or [find_recipe(name) for name in FEED_RECIPES], overrides, pairs, args.json)
        return 0
    from experiments.bench import bench as training

    training.bench(recipes[0], overrides, pairs, args.steps, args.json, STARTED)
    return 0


def scaling(argv: list[str]) -> int:
    """Run `darkroom scaling` and return the exit status."""
    parser = Parser(
        prog="darkroom scaling", description="Measure the speedup of several processes, and estimate it for 8 and 64 GPUs."
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="recipes to time")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="number of processes on this machine (default 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved intervals of each kind (default 5)")
    parser.add_argument("--seconds", type=float, default=3, metavar="S", help="length of an interval (default 3)")
    parser.add_argument(
        "--bandwidth",
        default="",
        metavar="RATE",
        help="also connect two processes by a link of this rate, such as 1gbit (Linux, as root)",
    )
    parser.add_argument(
        "--write", action="store_true", help="write experiments/bench/scaling.json and experiments/bench/SCALING.md"
    )
    args = parser.parse_args(argv)
    if args.processes < 2 or args.rounds < 1 or not args.seconds > 0:
        raise UserError("scaling: --processes must be at least 2, --rounds at least 1, and --seconds above 0")
    if args.bandwidth and args.processes != 2:
        raise UserError("scaling: --bandwidth connects two processes. Use --processes 2")
    recipes = [find_recipe(name) for name in args.recipes]
    from experiments.bench import scaling as processes

    processes.scaling(recipes, args.processes, args.rounds, args.seconds, args.write, args.bandwidth)
    return 0
