"""Command lines of the commands that show the images of a latent space, from `darkroom sample` to `retrieve`."""

from argparse import Namespace
from pathlib import Path

from datamodules.errors import UserError
from experiments.cli.parser import Parser
from experiments.run.network import LATEST, find_network
from experiments.run.recipes import Recipe

MAX_SAMPLES = 2_000_000  # each is a file; the training set of ImageNet has 1.3 million
OVERRIDES = "--KEY VALUE overrides a key of the recipe, such as --model.stable_images 1000."


def sample(argv: list[str]) -> int:
    """Run `darkroom sample` and return the exit status."""
    parser = _seeded_parser("sample", "Generate images from noise, one file each.", "samples")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="number of images (default 64)")
    args, recipe, options = _parse(parser, argv)
    if not 1 <= args.count <= MAX_SAMPLES:
        raise UserError(f"sample: --count {args.count}: must be from 1 to {MAX_SAMPLES:,}")
    from experiments.run import sample

    grid = sample.sample(recipe, options, args.count, args.seed, args.output)
    _enlarge(grid, args.zoom)
    return 0


def interpolate(argv: list[str]) -> int:
    """Run `darkroom interpolate` and return the exit status."""
    parser = _seeded_parser("interpolate", "Interpolate linearly in latent space between samples.", "interpolation.png")
    parser.add_argument("--indices", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="sample indices, from 0")
    parser.add_argument("--images", action="store_true", help="interpolate between the test images with these --indices")
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="steps between neighbors in --indices (default 9)")
    args, recipe, options = _parse(parser, argv)
    _require_non_negative("interpolate: --indices", args.indices)
    if args.images:
        from experiments.run import reconstruct

        reconstruct.interpolate(recipe, options, args.indices, args.steps, args.output)
        _enlarge(args.output, args.zoom)
        return 0
    from experiments.run import sample

    sample.interpolate(recipe, options, args.indices, args.steps, args.seed, args.output)
    _enlarge(args.output, args.zoom)
    return 0


def arithmetic(argv: list[str]) -> int:
    """Run `darkroom arithmetic` and return the exit status."""
    parser = _seeded_parser("arithmetic", "Add and subtract concepts, which are means of latents of samples.", "arithmetic.png")
    for sign in ("plus", "minus"):
        parser.add_argument(
            f"--{sign}", type=int, nargs="+", action="append", default=[], metavar="N", help="sample indices of a concept"
        )
    args, recipe, options = _parse(parser, argv)
    _require_non_negative("arithmetic", [index for indices in (*args.plus, *args.minus) for index in indices])
    from experiments.run import sample

    sample.arithmetic(recipe, options, args.plus, args.minus, args.seed, args.output)
    _enlarge(args.output, args.zoom)
    return 0


def manifold(argv: list[str]) -> int:
    """Run `darkroom manifold` and return the exit status."""
    parser = Parser(prog="darkroom manifold", description="Plot decoder outputs over a 2-D latent grid.", epilog=OVERRIDES)
    _add_common_arguments(parser, "manifold.png")
    parser.add_argument("--grid-size", type=int, default=20, metavar="N", help="images per row and column (default 20)")
    args, recipe, options = _parse(parser, argv)
    from experiments.run import sample

    sample.manifold(recipe, options, args.grid_size, args.output)
    _enlarge(args.output, args.zoom)
    return 0


def growth(argv: list[str]) -> int:
    """Run `darkroom growth` and return the exit status."""
    parser = Parser(prog="darkroom growth", description="Show samples of the same latents at the end of each training stage.")
    parser.add_argument("recipe", help="recipe of a method with stages, such as progan/demo, or the folder of a run")
    parser.add_argument("--run", metavar="NAME", help="run (default: the latest one)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="number of latents (default 8)")
    parser.add_argument("--output", default="growth.png", metavar="FILE", help="PNG file (default growth.png)")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"growth: --count {args.count}: must be at least 1")
    recipe, _ = find_network(args.recipe, args.run or (None if Path(args.recipe).is_dir() else LATEST), [])
    from experiments.run import growth

    growth.growth(recipe, args.count, args.output)
    return 0


def nearest(argv: list[str]) -> int:
    """Run `darkroom nearest` and return the exit status."""
    parser = _seeded_parser("nearest", "Show samples and the training images nearest to them, by pixels.", "nearest.png")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="number of samples (default 8)")
    parser.add_argument("--k", type=int, default=5, metavar="N", help="training images for each sample (default 5)")
    args, recipe, options = _parse(parser, argv)
    if args.count < 1:
        raise UserError(f"nearest: --count {args.count}: must be at least 1")
    from experiments.run import nearest

    nearest.nearest(recipe, options, args.count, args.k, args.seed, args.output)
    _enlarge(args.output, args.zoom)
    return 0


def reconstruct(argv: list[str]) -> int:
    """Run `darkroom reconstruct` and return the exit status."""
    parser = Parser(prog="darkroom reconstruct", description="Show test images and their reconstructions.", epilog=OVERRIDES)
    _add_common_arguments(parser, "reconstructions.png")
    parser.add_argument("--indices", type=int, nargs="+", default=[*range(16)], metavar="N", help="image indices, from 0")
    args, recipe, options = _parse(parser, argv)
    from experiments.run import reconstruct

    reconstruct.reconstruct(recipe, options, args.indices, args.output)
    _enlarge(args.output, args.zoom)
    return 0


def retrieve(argv: list[str]) -> int:
    """Run `darkroom retrieve` and return the exit status."""
    description = "Find the test images whose codes are nearest to an image's code."
    parser = Parser(prog="darkroom retrieve", description=description, epilog=OVERRIDES)
    _add_common_arguments(parser, "retrieval.png")
    parser.add_argument("--indices", type=int, nargs="+", default=[*range(8)], metavar="N", help="query indices, from 0")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="images retrieved for each query (default 10)")
    args, recipe, options = _parse(parser, argv)
    from experiments.run import reconstruct

    reconstruct.retrieve(recipe, options, args.indices, args.k, args.output)
    _enlarge(args.output, args.zoom)
    return 0


def _parse(parser: Parser, argv: list[str]) -> tuple[Namespace, Recipe, list[str]]:
    """Return the arguments, the recipe, and the words that select the weights and override keys of the recipe."""
    args, overrides = parser.parse_with_overrides(argv)
    if not 1 <= getattr(args, "zoom", 1) <= 16:
        raise UserError(f"--zoom {args.zoom}: must be from 1 to 16")
    words = [*(["--ckpt", args.ckpt] if args.ckpt else []), *overrides]
    return args, *find_network(args.recipe, args.run, words, args.modules)


def add_network_arguments(parser: Parser) -> None:
    """Add the arguments that select a network, see `find_network`."""
    parser.add_argument(
        "recipe", help="recipe of the network (darkroom list shows all), folder of a run, or a .safetensors file of its weights"
    )
    parser.add_argument("--run", metavar="NAME", help="run whose network is used, or latest")
    parser.add_argument("--ckpt", metavar="FILE", help="weights to use: a .ckpt or .safetensors file")
    parser.add_argument("--modules", metavar="FILE", help="Python file with the classes that a file of weights names")


def export(argv: list[str]) -> int:
    """Run `darkroom export` and return the exit status."""
    parser = Parser(
        prog="darkroom export",
        description="Write weights with the description of their network, one file for predict.",
        epilog=OVERRIDES,
    )
    add_network_arguments(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="the .safetensors file to write")
    args, recipe, options = _parse(parser, argv)
    from experiments.run import export

    export.export(recipe, options, Path(args.output))
    return 0


def _enlarge(path: str | Path, factor: int) -> None:
    """Enlarge a picture that a command has written by a whole factor, for slides; each pixel becomes a square."""
    if factor == 1:
        return
    from PIL import Image

    with Image.open(path) as image:
        enlarged = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    enlarged.save(path)


def _require_non_negative(option: str, indices: list[int]) -> None:
    if negative := [index for index in indices if index < 0]:
        raise UserError(f"{option}: {negative[0]} is not a sample index. Use indices from 0")


def _seeded_parser(command: str, description: str, output: str) -> Parser:
    parser = Parser(prog=f"darkroom {command}", description=description, epilog=OVERRIDES)
    _add_common_arguments(parser, output)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default 0)")
    return parser


def _add_common_arguments(parser: Parser, output: str) -> None:
    add_network_arguments(parser)
    parser.add_argument("--output", default=output, metavar="PATH", help=f"output path (default {output})")
    parser.add_argument("--zoom", type=int, default=1, metavar="N", help="enlarge the written picture N times (default 1)")
