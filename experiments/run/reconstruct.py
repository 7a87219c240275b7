"""`darkroom reconstruct`, `retrieve` and `interpolate --images`: encode test images, and decode or compare the codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.metrics.retrieval import k_nearest
from datamodules.errors import UserError
from datamodules.reconstruction import Reconstruction
from datamodules.transforms.draw import stack_rows
from experiments.run.lightning_cli import build_cli, print_rank_zero
from experiments.run.recipes import Recipe
from experiments.run.sample import check_interpolation, grid, interpolation_path, save_png
from experiments.run.weights import load_resolved_weights
from modules.autoencoder import Autoencoder
from modules.vae import VAE

FRAME_COLORS = {True: (0.1, 0.6, 0.2), False: (0.8, 0.1, 0.1)}  # RGB; True: the retrieved image has the query's class


def reconstruct(recipe: Recipe, options: list[str], indices: Sequence[int], output: str) -> None:
    """Write a row of test images and a row of reconstructions, with a row of network inputs between them if these differ.

    Raises:
        UserError: there are no weights or no such images, the recipe has no encoder, or the file cannot be written.
    """
    _, outputs = encode_test_set(recipe, options)
    selected = select_images(outputs, indices)
    rows = [outputs[name][selected] for name in ("image", "input", "prediction") if name in outputs]
    save_png(stack_rows(*rows), Path(output))


def retrieve(recipe: Recipe, options: list[str], indices: Sequence[int], k: int, output: str) -> None:
    """Write test images as queries, each followed by the k test images with the nearest codes, one row each.

    The frame of a retrieved image is green if it has the query's class, else red.

    Raises:
        UserError: see `reconstruct`; or there are fewer than k other images.
    """
    _, outputs = encode_test_set(recipe, options)
    queries = select_images(outputs, indices)
    if not 0 < k < len(outputs["code"]):
        raise UserError(f"retrieve: --k {k}: must be from 1 to {len(outputs['code']) - 1}, the number of other images")
    neighbors = k_nearest(outputs["code"].flatten(1).float(), k)[queries]
    same_class = outputs["label"][neighbors] == outputs["label"][queries][:, None]
    images = []
    for query, row, matches in zip(queries, neighbors, same_class, strict=True):
        images.append(with_frame(outputs["image"][query], (1.0, 1.0, 1.0)))
        images += [with_frame(outputs["image"][i], FRAME_COLORS[bool(match)]) for i, match in zip(row, matches, strict=True)]
    print_rank_zero(f"retrieved {int(same_class.sum())} of {same_class.numel()} have the query's class")
    save_png(grid(torch.stack(images), columns=k + 1), Path(output))


def interpolate(recipe: Recipe, options: list[str], indices: Sequence[int], steps: int, output: str) -> None:
    """Write linear interpolations between the codes of test images, from each to the next, one row each.

    Raises:
        UserError: see `reconstruct`; or there are fewer than two images, or no step.
    """
    check_interpolation(indices, steps)
    method, outputs = encode_test_set(recipe, options)
    with torch.no_grad():
        images = method.decode(interpolation_path(outputs["code"][select_images(outputs, indices)], steps))
    save_png(grid(images, columns=steps + 1), Path(output))


def encode_test_set(recipe: Recipe, options: list[str]) -> tuple[VAE | Autoencoder, dict[str, Any]]:
    """Load a recipe's method with its weights, and apply it to the first available test set, on the CPU.

    Returns:
        The method, and the tensors of its test step, concatenated over the set.

    Raises:
        UserError: there are no weights or no test set, or the recipe has no encoder.
    """
    cli = build_cli("test", recipe, options)
    if not isinstance(cli.model, VAE | Autoencoder) or not isinstance(cli.datamodule, Reconstruction):
        raise UserError(f"{recipe.name} does not encode images. Use a recipe of vae or autoencoder")
    load_resolved_weights(cli)
    method, data = cli.model.eval(), cli.datamodule
    data.setup("test")
    first = next(iter(data.reference_sets))
    with torch.no_grad():
        outputs = [
            cast(dict[str, Any], method.test_step(batch, i))
            for i, batch in enumerate(data.test_dataloader())
            if batch["dataset"][0] == first
        ]
    print_rank_zero(f"images    {first}")
    return method, {
        name: torch.cat([output[name] for output in outputs]) for name, value in outputs[0].items() if isinstance(value, Tensor)
    }


def select_images(outputs: dict[str, Any], indices: Sequence[int]) -> list[int]:
    """Return the indices as a list.

    Raises:
        UserError: an index is out of range.
    """
    count = len(outputs["image"])
    if invalid := [index for index in indices if not 0 <= index < count]:
        raise UserError(f"--indices {invalid[0]}: the test set has {count} images. Use indices from 0 to {count - 1}")
    return list(indices)


def with_frame(image: Tensor, color: tuple[float, float, float]) -> Tensor:
    """Add a colored frame of two pixels: (C, H, W) with C 1 or 3 -> (3, H + 4, W + 4)."""
    inside = F.pad(torch.ones_like(image[:1]), (2, 2, 2, 2))
    frame = torch.tensor(color)[:, None, None] * (1 - inside)
    return frame + F.pad(image.float().clamp(0, 1).expand(3, -1, -1), (2, 2, 2, 2))
