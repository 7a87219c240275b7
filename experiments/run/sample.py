"""`darkroom sample`, `interpolate`, `arithmetic` and `manifold`: images generated from latents."""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from datamodules.base import ResumableDataModule
from datamodules.errors import UserError
from datamodules.random.noise import uniform
from datamodules.toys import Points
from datamodules.transforms.draw import PADDING, image_grid, scatter_plot
from experiments.run.lightning_cli import build_cli, print_rank_zero
from experiments.run.recipes import Recipe
from experiments.run.weights import load_resolved_weights
from modules.tasks.generation import GenerativeMethod

BATCH_SIZE = 100
GRID_IMAGES = 64
MAX_IMAGES_PER_ROW = 200
NEIGHBOR_RADIUS = 0.25  # half width of the uniform noise around a sum of latents; DCGAN, Figure 7


def sample(recipe: Recipe, options: list[str], count: int, seed: int, output: str) -> Path:
    """Write samples 0 ... count - 1 as 8-bit PNG files, and a grid of the first 64 next to their folder.

    A network that generates points of the plane instead writes their coordinates as CSV, and a plot.

    Returns:
        Path of the grid or the plot.

    Raises:
        UserError: there are no weights, the recipe does not generate images from latents, or the folder cannot be written.
    """
    method, datamodule = load_generator(recipe, options, plane=True)
    if isinstance(datamodule, Points):
        return sample_points(method, datamodule, count, seed, Path(output))
    folder = require_writable(Path(output).resolve())
    grid_path = folder.with_name(f"{folder.name}.png")  # not in the folder, which other tools evaluate as a set of samples
    for first in range(0, count, BATCH_SIZE):
        indices = range(first, min(count, first + BATCH_SIZE))
        images = generate(method, method.sample_latents(indices, seed))
        for index, image in zip(indices, images, strict=True):
            save_image(image, folder / f"{index:06d}.png")
        if first == 0:
            save_png(image_grid(images[:GRID_IMAGES]), grid_path)
    print_rank_zero(f"samples   {folder}  ({count} files; the image has the first {min(count, GRID_IMAGES)})")
    return grid_path


def sample_points(method: GenerativeMethod, datamodule: Points, count: int, seed: int, output: Path) -> Path:
    """Write samples 0 ... count - 1 as rows x,y, and a plot of them over real points; see `sample`."""
    table, plot = output.with_name(f"{output.name}.csv"), output.with_name(f"{output.name}.png")
    check_output([plot, table], inputs=[])
    points = generate(method, method.sample_latents(range(count), seed))
    np.savetxt(table, points.numpy(), fmt="%.6g", delimiter=",", header="x,y", comments="")
    print_rank_zero(f"points    {table}  ({count} rows)")
    save_png(scatter_plot(points, datamodule.points[:1000])[0], plot)
    return plot


def interpolate(recipe: Recipe, options: list[str], indices: Sequence[int], steps: int, seed: int, output: str) -> None:
    """Write linear interpolations in latent space from each sample to the next, one row each (DCGAN, Figure 4).

    Raises:
        UserError: see `sample`; or there are fewer than two samples, or no step.
    """
    check_interpolation(indices, steps)
    method, _ = load_generator(recipe, options)
    path = interpolation_path(method.sample_latents(indices, seed), steps)
    save_png(grid(generate(method, path), columns=steps + 1), Path(output))


def arithmetic(
    recipe: Recipe, options: list[str], plus: Sequence[Sequence[int]], minus: Sequence[Sequence[int]], seed: int, output: str
) -> None:
    """Write a sum of concepts, each the mean latent of some samples (DCGAN, Section 6.3.2 and Figure 7).

    One row for each concept: its samples, then its mean. Last row: the sum, then eight neighbors of it.

    Raises:
        UserError: see `sample`; or there is no concept to add.
    """
    if not plus:
        raise UserError("arithmetic: --plus is required. Give sample indices of a concept, as in --plus 1 2 3 --minus 4 5 6")
    method, _ = load_generator(recipe, options)
    concepts = [method.sample_latents(indices, seed) for indices in (*plus, *minus)]
    means = [latents.mean(dim=0, keepdim=True) for latents in concepts]
    total = torch.cat(means[: len(plus)]).sum(0, keepdim=True) - sum(means[len(plus) :])
    noise = torch.from_numpy(NEIGHBOR_RADIUS * (2 * uniform(seed, "surroundings", range(8), total.shape[1]) - 1)).to(total)
    neighbors = torch.cat([total, total + noise])
    columns = max(len(neighbors), *(len(latents) + 1 for latents in concepts))
    rows = []
    for latents in (*(torch.cat(pair) for pair in zip(concepts, means, strict=True)), neighbors):
        images = generate(method, latents)
        rows.append(torch.cat([images, torch.ones(columns - len(images), *images.shape[1:])]))
    save_png(grid(torch.cat(rows), columns), Path(output))


def manifold(recipe: Recipe, options: list[str], grid_size: int, output: str) -> None:
    """Write decoder outputs over a 2-D latent grid, whose axes are quantiles of the latent distribution.

    Kingma and Welling, arXiv:1312.6114, Figure 4.

    Raises:
        UserError: see `sample`; or the latent size is not 2, or the grid is smaller than 2 x 2.
    """
    if not 2 <= grid_size <= MAX_IMAGES_PER_ROW:
        raise UserError(f"manifold: --grid-size {grid_size}: must be from 2 to {MAX_IMAGES_PER_ROW}")
    method, _ = load_generator(recipe, options)
    if method.latent_dim != 2:
        raise UserError(f"manifold: {recipe.name} has {method.latent_dim} latents. Use a recipe with 2")
    quantiles = (torch.arange(grid_size, dtype=torch.float64) + 0.5) / grid_size
    values = torch.special.ndtri(quantiles) if method.latent_distribution == "normal" else 2 * quantiles - 1
    y, x = torch.meshgrid(values.flip(0), values, indexing="ij")
    latents = torch.stack([x, y], dim=2).flatten(0, 1).to(method.dtype)
    save_png(make_grid(generate(method, latents), nrow=grid_size, padding=0), Path(output))


def check_interpolation(indices: Sequence[int], steps: int) -> None:
    """Check the options of an interpolation.

    Raises:
        UserError: there are fewer than two endpoints, or no step.
    """
    if len(indices) < 2 or not 1 <= steps < MAX_IMAGES_PER_ROW:
        raise UserError(
            f"interpolate: --indices needs at least two values, and --steps must be from 1 to {MAX_IMAGES_PER_ROW - 1}"
        )


def interpolation_path(latents: Tensor, steps: int) -> Tensor:
    """Interpolate linearly between successive latents: (N, D) -> ((N - 1) * (steps + 1), D)."""
    fractions = torch.linspace(0, 1, steps + 1).to(latents)[:, None]
    return torch.cat([start + fractions * (end - start) for start, end in pairwise(latents)])


def load_generator(recipe: Recipe, options: list[str], plane: bool = False) -> tuple[GenerativeMethod, ResumableDataModule]:
    """Load a recipe's method with its weights, in evaluation mode, and create its datamodule.

    Args:
        recipe: recipe or run.
        options: options of the command line.
        plane: whether the method may generate points of the plane instead of images.

    Raises:
        UserError: there are no weights, or the recipe does not generate images from latents.
    """
    cli = build_cli("test", recipe, options)
    if not isinstance(cli.model, GenerativeMethod):
        raise UserError(f"{recipe.name} does not generate images from latents. Use a recipe of a generative method")
    load_resolved_weights(cli)
    method = cli.model.eval()
    if not plane and isinstance(cli.datamodule, Points):
        raise UserError(f"{recipe.name} generates points, not images. Use darkroom sample, which plots them")
    return method, cli.datamodule


def generate(method: GenerativeMethod, latents: Tensor) -> Tensor:
    """Generate images (N, C, H, W) in [0, 1] from latents (N, D)."""
    with torch.no_grad():
        return torch.cat([method.sample(batch) for batch in latents.split(BATCH_SIZE)])


def grid(images: Tensor, columns: int) -> Tensor:
    """Arrange images (N, C, H, W) in rows, with white gaps."""
    return make_grid(images, nrow=columns, padding=PADDING, pad_value=1.0)


def check_output(files: list[Path], inputs: list[Path]) -> None:
    """Check the files that a command writes, before it starts; the first is the value of --output.

    Raises:
        UserError: the first is not a PNG file, its folder is not writable, or a file is a folder or an input.
    """
    if files[0].suffix.lower() != ".png":
        raise UserError(f"--output: {files[0]} must end in .png")
    require_writable(files[0].parent)
    originals = {path.resolve() for path in inputs}
    for file in files:
        if file.is_dir():
            raise UserError(f"--output: {file} is a folder. Choose another file")
        if file.resolve() in originals:
            raise UserError(f"--output: {file} is the input and would be overwritten. Choose another file")


def require_writable(folder: Path) -> Path:
    """Create a folder and check that it can be written to.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder}: {error.strerror}. Choose another path") from None
    return folder


def save_png(image: Tensor, path: Path) -> None:
    """Save an image (C, H, W) in [0, 1] as PNG and print its path.

    Raises:
        UserError: the path does not end in .png or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: must end in .png")
    require_writable(path.parent)
    try:
        save_image(image, path)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror or error}. Choose another path") from None
    print_rank_zero(f"image     {path}")
