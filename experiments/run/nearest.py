"""`darkroom nearest`: samples next to the training images that are nearest to them, to see whether images are memorized."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.generation import Generation
from experiments.run.lightning_cli import print_rank_zero
from experiments.run.recipes import Recipe
from experiments.run.sample import check_output, generate, grid, load_generator, save_png

CHUNK = 1024  # training images that are compared at a time


def nearest(recipe: Recipe, options: list[str], count: int, k: int, seed: int, output: str) -> None:
    """Write samples, each followed by the k training images with the smallest Euclidean distance of pixels, one row each.

    If the network is trained with random flips, flipped images are compared too.

    Raises:
        UserError: see `sample`; the training images are not installed, there are fewer than k of them, or the file cannot be
            written.
    """
    path = Path(output)
    check_output([path], [])
    method, data = load_generator(recipe, options)
    if not isinstance(data, Generation):
        raise UserError(f"nearest: {recipe.name} is not trained on images of one size. Use another recipe")
    data.setup("fit")
    if not 0 < k <= len(data.items):
        raise UserError(f"nearest: --k {k}: must be from 1 to {len(data.items)}, the number of training images")
    samples = generate(method, method.sample_latents(range(count), seed)).float()
    distances, images, ids = find_nearest(samples, data, k)
    for i, (distance, image_id) in enumerate(zip(distances[:, 0].tolist(), ids[:, 0].tolist(), strict=True)):
        print_rank_zero(f"sample {i}: training image {image_id}, root mean squared difference of pixels {distance:.3f}")
    save_png(grid(torch.cat([samples[:, None], images], dim=1).flatten(0, 1), columns=k + 1), path)


def find_nearest(samples: Tensor, data: Generation, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k nearest training images of each sample, nearest first.

    Args:
        samples: (N, C, H, W) in [0, 1].
        data: datamodule, after `setup("fit")`.
        k: number of neighbors.

    Returns:
        Root mean squared differences (N, k), the images (N, k, C, H, W), flipped if that is nearer, and their indices (N, k).
    """
    flips = (False, True) if data.hflip else (False,)
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # distance, image, index: (N, k, ...) of each chunk
    for start in range(0, len(data.items), CHUNK):
        items = np.arange(start, min(start + CHUNK, len(data.items)))
        real = data.items.read(items, data.items.size).float() / 255
        variants = torch.stack([real.flip(3) if flip else real for flip in flips])  # (flips, M, C, H, W)
        exact = "donot_use_mm_for_euclid_dist"  # 0 for equal images
        distance = torch.stack([torch.cdist(samples.flatten(1), v.flatten(1), compute_mode=exact) for v in variants])
        distance, flip = distance.min(0)  # (N, M)
        smallest, columns = distance.topk(min(k, len(items)), largest=False)
        found.append((smallest, variants[flip.gather(1, columns), columns], columns + start))
    distance, images, ids = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    smallest, columns = distance.topk(k, largest=False)
    rows = torch.arange(len(samples))[:, None]
    return smallest / samples[0].numel() ** 0.5, images[rows, columns], ids[rows, columns]
