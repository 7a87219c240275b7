"""Command lines of `darkroom neural-style`, `deepdream`, `style-speed` and `style-objective`."""

import math

from datamodules.errors import UserError
from experiments.cli.parser import Parser
from experiments.run.recipes import find_recipe

NETWORKS = ("vgg19", "vgg16", "vgg19-distilled")
MINIMA = {"size": 32, "steps": 1}
MAXIMA = {"size": 16384, "steps": 10**6, "octaves": 100, "seed": 2**32 - 1}


def neural_style(argv: list[str]) -> int:
    """Run `darkroom neural-style` and return the exit status."""
    parser = Parser(
        prog="darkroom neural-style",
        description="Transfer the style of an image to a photograph by optimization (Gatys et al.). Saves intermediate images.",
    )
    parser.add_argument("content", metavar="CONTENT", help="photograph")
    parser.add_argument("style", metavar="STYLE", help="image with the style; its shorter side is resized to --size")
    _add_common(parser, "stylized.png")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps (default 500)")
    parser.add_argument("--optimizer", choices=("lbfgs", "adam"), default="lbfgs", help="optimizer (default lbfgs)")
    parser.add_argument("--init", choices=("content", "noise"), default="content", help="initial image (default content)")
    parser.add_argument("--pooling", choices=("max", "average"), default="max", help="pooling of the network (default max)")
    parser.add_argument(
        "--style-weight",
        type=float,
        default=20.0,
        metavar="W",
        help="weight of the style loss (default 20, tuned for vgg19-distilled)",
    )
    parser.add_argument(
        "--tv-weight",
        type=float,
        default=1e-4,
        metavar="W",
        help="weight of total variation (default 1e-4, tuned for vgg19-distilled)",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between intermediate images; L-BFGS restarts at each, so it changes the result (default 100)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of --init noise (default 0)")
    parser.add_argument("--resume", action="store_true", help="continue after the last intermediate image")
    args = parser.parse_args(argv)
    _require("neural-style", args, {**MINIMA, "seed": 0, "save_every": 1, "style_weight": 0, "tv_weight": 0})
    from experiments.run import neural_style

    neural_style.neural_style(**vars(args))
    return 0


def deepdream(argv: list[str]) -> int:
    """Run `darkroom deepdream` and return the exit status."""
    parser = Parser(prog="darkroom deepdream", description="Amplify the features of a network in an image (DeepDream).")
    parser.add_argument("image", metavar="IMAGE", help="image file")
    _add_common(parser, "dream.png")
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="layer to amplify, such as relu3_3 (default: relu3_1 of vgg19-distilled, relu5_1 of vgg19, relu4_3 of vgg16)",
    )
    parser.add_argument("--octaves", type=int, default=4, metavar="N", help="resolutions, from coarse to fine (default 4)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps per octave (default 10)")
    args = parser.parse_args(argv)
    _require("deepdream", args, {**MINIMA, "octaves": 1})
    from experiments.run import neural_style

    neural_style.deepdream(**vars(args))
    return 0


def style_speed(argv: list[str]) -> int:
    """Run `darkroom style-speed` and return the exit status."""
    parser = Parser(
        prog="darkroom style-speed",
        description="Compare the speed of a style network with that of optimization (Johnson et al., Table 1). Takes about ten "
        "minutes on two CPU cores. --KEY VALUE overrides a key of the recipe.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe of style transfer")
    parser.add_argument(
        "--write", action="store_true", help="write the record and the page in experiments/methods/style/comparison"
    )
    args, overrides = parser.parse_known_args(argv)
    if any(word.partition("=")[0] == "--ckpt" for word in overrides):
        raise UserError("style-speed: --ckpt has no effect, because the weights do not influence the time. Remove it")
    recipe = find_recipe(args.recipe)
    from experiments.bench import style

    style.speed(recipe, overrides, args.write)
    return 0


def style_objective(argv: list[str]) -> int:
    """Run `darkroom style-objective` and return the exit status."""
    parser = Parser(
        prog="darkroom style-objective",
        description="Compare the objective of a trained style network with that of optimization, by iterations (Johnson et "
        "al., Figure 5). --KEY VALUE overrides a key of the recipe.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe of style transfer")
    parser.add_argument("--ckpt", metavar="FILE", help="weights (default: those of the newest run, or the committed ones)")
    parser.add_argument(
        "--write", action="store_true", help="write the record and the page in experiments/methods/style/comparison"
    )
    args, overrides = parser.parse_known_args(argv)
    recipe = find_recipe(args.recipe)
    from experiments.bench import style

    style.objective(recipe, args.ckpt, overrides, args.write)
    return 0


def _add_common(parser: Parser, output: str) -> None:
    parser.add_argument("--output", default=output, metavar="FILE", help=f"PNG file (default {output})")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="longer side of the result in pixels (default 512)")
    parser.add_argument("--network", choices=NETWORKS, default="vgg19-distilled", help="network (default vgg19-distilled)")
    parser.add_argument("--weights", metavar="FILE", help="its weights (default: torchvision's, or those in the repository)")


def _require(command: str, args: object, minima: dict[str, int]) -> None:
    for name, minimum in minima.items():
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if not minimum <= value < math.inf:  # also for NaN
            raise UserError(f"{command}: {option} {value}: must be at least {minimum}, and finite")
        if value > MAXIMA.get(name, math.inf):
            raise UserError(f"{command}: {option} {value}: must be at most {MAXIMA[name]}")
