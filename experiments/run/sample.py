"""`darkroom sample`, `interpolate`, `arithmetic` and `manifold`: pictures made from latents."""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from callbacks.visualization.previews import sheet
from datamodules.errors import UserError
from datamodules.random.noise import uniform
from experiments.run.lightning_cli import build, tell
from experiments.run.recipes import Recipe
from experiments.run.weights import fill
from modules.tasks.generation import GenerativeMethod

AT_ONCE = 100  # made together
REACH = 0.25  # of the noise around a sum of latents, DCGAN, Figure 7


def sample(recipe: Recipe, ckpt: str | None, count: int, seed: int, output: str) -> None:
    """Write samples 0 ... count - 1, a file of 8 bits each, and the first 64 of them as one sheet.

    Raises:
        Refused: there are no weights, the recipe makes no images from latents, or the folder cannot be written.
    """
    method = trained(recipe, ckpt)
    folder = writable(Path(output))
    for first in range(0, count, AT_ONCE):
        numbers = range(first, min(count, first + AT_ONCE))
        images = made(method, method.sample_latents(numbers, seed))
        for number, image in zip(numbers, images, strict=True):
            save_image(image, folder / f"{number:06d}.png")
        if first == 0:
            save_image(sheet(images[:64]), folder / "sheet.png")
    tell(f"samples   {folder}  ({count} files; sheet.png shows the first {min(count, 64)})")


def interpolate(recipe: Recipe, ckpt: str | None, numbers: Sequence[int], steps: int, seed: int, output: str) -> None:
    """Write the straight way through latent space from each of some samples to the next, a row each (DCGAN, Figure 4).

    Raises:
        Refused: see `sample`; or there is but one sample, or no step.
    """
    check_way(numbers, steps)
    method = trained(recipe, ckpt)
    write(grid(made(method, ways(method.sample_latents(numbers, seed), steps)), columns=steps + 1), Path(output))


def arithmetic(
    recipe: Recipe, ckpt: str | None, plus: Sequence[Sequence[int]], minus: Sequence[Sequence[int]], seed: int, output: str
) -> None:
    """Write a sum of concepts, each the mean latent of some samples (DCGAN, Section 6.3.2 and Figure 7).

    A row a concept: its samples, then its mean. The last row is the sum, then eight more from its surroundings.

    Raises:
        Refused: see `sample`; or there is nothing to add.
    """
    if not plus:
        raise UserError("arithmetic: --plus names the samples of a concept, as in --plus 1 2 3 --minus 4 5 6 --plus 7 8 9")
    method = trained(recipe, ckpt)
    concepts = [method.sample_latents(numbers, seed) for numbers in (*plus, *minus)]
    means = [latents.mean(dim=0, keepdim=True) for latents in concepts]
    total = torch.cat(means[: len(plus)]).sum(0, keepdim=True) - sum(means[len(plus) :])
    noise = torch.from_numpy(REACH * (2 * uniform(seed, "surroundings", range(8), total.shape[1]) - 1)).to(total)
    around = torch.cat([total, total + noise])
    columns = max(len(around), *(len(latents) + 1 for latents in concepts))
    rows = []
    for latents in (*(torch.cat(pair) for pair in zip(concepts, means, strict=True)), around):
        images = made(method, latents)
        rows.append(torch.cat([images, torch.ones(columns - len(images), *images.shape[1:])]))
    write(grid(torch.cat(rows), columns), Path(output))


def manifold(recipe: Recipe, ckpt: str | None, side: int, output: str) -> None:
    """Write what two latents mean: a grid of pictures, the quantiles of the latents' distribution along its axes.

    Kingma and Welling, arXiv:1312.6114, Figure 4.

    Raises:
        Refused: see `sample`; or there are not two latents, or no picture.
    """
    if side < 2:
        raise UserError(f"manifold: --side {side}: at least 2")
    method = trained(recipe, ckpt)
    if method.latent_size != 2:
        raise UserError(f"manifold: {recipe.name} has {method.latent_size} latents; a plane takes two")
    quantiles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    places = torch.special.ndtri(quantiles) if method.latent_distribution == "normal" else 2 * quantiles - 1
    down, across = torch.meshgrid(places.flip(0), places, indexing="ij")
    latents = torch.stack([across, down], dim=2).flatten(0, 1).to(method.dtype)
    write(make_grid(made(method, latents), nrow=side, padding=0), Path(output))


def check_way(numbers: Sequence[int], steps: int) -> None:
    """Refuse a way without an end, or without a step."""
    if len(numbers) < 2 or steps < 1:
        raise UserError("interpolate: --between takes at least two numbers, --steps at least 1")


def ways(ends: Tensor, steps: int) -> Tensor:
    """The straight way from each of some codes (N, latents) to the next: (N - 1) * (steps + 1) codes."""
    shares = torch.linspace(0, 1, steps + 1).to(ends)[:, None]
    return torch.cat([begin + shares * (end - begin) for begin, end in pairwise(ends)])


def trained(recipe: Recipe, ckpt: str | None) -> GenerativeMethod:
    """A recipe's method with its weights, ready to make images."""
    cli = build("test", recipe, ["--ckpt", ckpt] if ckpt else [])
    if not isinstance(cli.model, GenerativeMethod):
        raise UserError(f"{recipe.name} makes no images from latents")
    tell(f"weights   {fill(cli)}")
    method = cli.model.eval()
    if made(method, method.sample_latents([0])).ndim != 4:
        raise UserError(f"{recipe.name} makes points, not images; its runs leave a picture of them")
    return method


def made(method: GenerativeMethod, latents: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1]."""
    with torch.no_grad():
        return torch.cat([method.sample(part) for part in latents.split(AT_ONCE)])


def grid(images: Tensor, columns: int) -> Tensor:
    """Images as one picture, row by row."""
    return make_grid(images, nrow=columns, padding=2, pad_value=1.0)


def writable(folder: Path) -> Path:
    """A folder, made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def write(picture: Tensor, path: Path) -> None:
    """A picture as PNG, and where it is."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: the picture is a .png")
    writable(path.parent)
    save_image(picture, path)
    tell(f"look at   {path}")
