"""The command lines of the commands that make pictures with a trained network; what they do stands in sampling and coding."""

from datamodules.errors import UserError
from experiments.cli.parser import Parser
from experiments.run.recipes import find_recipe


def sample(rest: list[str]) -> int:
    """`darkroom sample`."""
    parser = _of_latents("sample", "Make images from noise, one file each.", "samples")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="how many (default 64)")
    chosen = parser.parse_args(rest)
    if chosen.count < 1:
        raise UserError(f"sample: --count {chosen.count}: at least 1")
    recipe = find_recipe(chosen.recipe)
    from experiments.run import sample as sampling

    sampling.sample(recipe, chosen.ckpt, chosen.count, chosen.seed, chosen.output)
    return 0


def interpolate(rest: list[str]) -> int:
    """`darkroom interpolate`."""
    parser = _of_latents("interpolate", "The straight way through latent space between samples.", "interpolation.png")
    parser.add_argument("--between", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers of samples")
    parser.add_argument("--pictures", action="store_true", help="the numbers are those of pictures of the test set")
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="from one to the next (default 9)")
    chosen = parser.parse_args(rest)
    _no_negative("interpolate: --between", chosen.between)
    recipe = find_recipe(chosen.recipe)
    if chosen.pictures:
        from experiments.run import reconstruct as coding

        coding.interpolate(recipe, chosen.ckpt, chosen.between, chosen.steps, chosen.output)
        return 0
    from experiments.run import sample as sampling

    sampling.interpolate(recipe, chosen.ckpt, chosen.between, chosen.steps, chosen.seed, chosen.output)
    return 0


def arithmetic(rest: list[str]) -> int:
    """`darkroom arithmetic`."""
    parser = _of_latents("arithmetic", "Sums of concepts, each the mean latent of some samples.", "arithmetic.png")
    for sign in ("plus", "minus"):
        parser.add_argument(
            f"--{sign}", type=int, nargs="+", action="append", default=[], metavar="N", help="samples of a concept"
        )
    chosen = parser.parse_args(rest)
    _no_negative("arithmetic", [number for numbers in (*chosen.plus, *chosen.minus) for number in numbers])
    recipe = find_recipe(chosen.recipe)
    from experiments.run import sample as sampling

    sampling.arithmetic(recipe, chosen.ckpt, chosen.plus, chosen.minus, chosen.seed, chosen.output)
    return 0


def manifold(rest: list[str]) -> int:
    """`darkroom manifold`."""
    parser = Parser(prog="darkroom manifold", description="What two latents mean: a grid of pictures over their plane.")
    _of_network(parser, "manifold.png")
    parser.add_argument("--side", type=int, default=20, metavar="N", help="pictures in a row (default 20)")
    chosen = parser.parse_args(rest)
    recipe = find_recipe(chosen.recipe)
    from experiments.run import sample as sampling

    sampling.manifold(recipe, chosen.ckpt, chosen.side, chosen.output)
    return 0


def reconstruct(rest: list[str]) -> int:
    """`darkroom reconstruct`."""
    parser = Parser(prog="darkroom reconstruct", description="What comes back of pictures of the test set.")
    _of_network(parser, "reconstructions.png")
    parser.add_argument("--numbers", type=int, nargs="+", default=[*range(16)], metavar="N", help="of the pictures")
    chosen = parser.parse_args(rest)
    recipe = find_recipe(chosen.recipe)
    from experiments.run import reconstruct as coding

    coding.reconstruct(recipe, chosen.ckpt, chosen.numbers, chosen.output)
    return 0


def retrieve(rest: list[str]) -> int:
    """`darkroom retrieve`."""
    parser = Parser(
        prog="darkroom retrieve", description="The pictures of the test set whose codes are nearest to a picture's."
    )
    _of_network(parser, "retrieval.png")
    parser.add_argument("--numbers", type=int, nargs="+", default=[*range(8)], metavar="N", help="of the pictures that ask")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="answers to each (default 10)")
    chosen = parser.parse_args(rest)
    recipe = find_recipe(chosen.recipe)
    from experiments.run import reconstruct as coding

    coding.retrieve(recipe, chosen.ckpt, chosen.numbers, chosen.k, chosen.output)
    return 0


def _no_negative(where: str, numbers: list[int]) -> None:
    if bad := [number for number in numbers if number < 0]:
        raise UserError(f"{where}: {bad[0]} is not the number of a sample; they count from 0")


def _of_latents(command: str, description: str, output: str) -> Parser:
    parser = Parser(prog=f"darkroom {command}", description=description)
    _of_network(parser, output)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the numbered samples (default 0)")
    return parser


def _of_network(parser: Parser, output: str) -> None:
    parser.add_argument("recipe", help="whose network: darkroom list shows them")
    parser.add_argument("--ckpt", metavar="FILE", help="weights to use: a .ckpt or .safetensors file")
    parser.add_argument("--output", default=output, metavar="PATH", help=f"where the result goes (default {output})")
