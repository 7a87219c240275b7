"""`darkroom reconstruct`, `retrieve`, and `interpolate --pictures`: what codes of pictures are good for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.metrics.retrieval import k_nearest
from callbacks.visualization.previews import stack_rows
from datamodules.errors import UserError
from datamodules.reconstruction import Reconstruction
from experiments.run.lightning_cli import build, tell
from experiments.run.recipes import Recipe
from experiments.run.sample import check_way, grid, ways, write
from experiments.run.weights import fill
from modules.autoencoder import Autoencoder
from modules.vae import VAE

FRAME = {True: (0.1, 0.6, 0.2), False: (0.8, 0.1, 0.1)}  # around an answer of the query's class, or of another


def reconstruct(recipe: Recipe, ckpt: str | None, numbers: Sequence[int], output: str) -> None:
    """Write pictures of the test set in a row, and below them what comes back; between them what the network saw instead.

    Raises:
        Refused: there are no weights or no such pictures, the recipe has no codes, or the file cannot be written.
    """
    _, outputs = coded(recipe, ckpt)
    chosen = picked(outputs, numbers)
    write(stack_rows(*(outputs[name][chosen] for name in ("image", "input", "prediction") if name in outputs)), Path(output))


def retrieve(recipe: Recipe, ckpt: str | None, numbers: Sequence[int], k: int, output: str) -> None:
    """Write pictures of the test set, each with the k whose codes are nearest to its own, a row each.

    An answer's frame is green if it has the query's class, else red.

    Raises:
        Refused: see `reconstruct`; or there are no k others.
    """
    _, outputs = coded(recipe, ckpt)
    queries = picked(outputs, numbers)
    if not 0 < k < len(outputs["code"]):
        raise UserError(f"retrieve: --k {k} of {len(outputs['code']) - 1} other pictures")
    answers = k_nearest(outputs["code"].flatten(1).float(), k)[queries]
    right = outputs["label"][answers] == outputs["label"][queries][:, None]
    rows = []
    for query, found, same in zip(queries, answers, right, strict=True):
        rows.append(framed(outputs["image"][query], (1.0, 1.0, 1.0)))
        rows += [framed(outputs["image"][one], FRAME[bool(of)]) for one, of in zip(found, same, strict=True)]
    tell(f"answers   {int(right.sum())} of {right.numel()} have their query's class")
    write(grid(torch.stack(rows), columns=k + 1), Path(output))


def interpolate(recipe: Recipe, ckpt: str | None, numbers: Sequence[int], steps: int, output: str) -> None:
    """Write the straight way between the codes of pictures of the test set, from each to the next, a row each.

    Raises:
        Refused: see `reconstruct`; or there is but one picture, or no step.
    """
    check_way(numbers, steps)
    method, outputs = coded(recipe, ckpt)
    with torch.no_grad():
        shown = method.decode(ways(outputs["code"][picked(outputs, numbers)], steps))
    write(grid(shown, columns=steps + 1), Path(output))


def coded(recipe: Recipe, ckpt: str | None) -> tuple[VAE | Autoencoder, dict[str, Any]]:
    """A recipe's method with its weights, and what it makes of the first of its test sets that is here, on the CPU."""
    cli = build("test", recipe, ["--ckpt", ckpt] if ckpt else [])
    if not isinstance(cli.model, VAE | Autoencoder) or not isinstance(cli.datamodule, Reconstruction):
        raise UserError(f"{recipe.name} makes no codes of pictures")
    tell(f"weights   {fill(cli)}")
    method, data = cli.model.eval(), cli.datamodule
    data.setup("test")
    first = next(iter(data.reference_sets))
    with torch.no_grad():
        outputs = [method.test_step(batch, i) for i, batch in enumerate(data.test_dataloader()) if batch["dataset"][0] == first]
    tell(f"pictures  {first}")
    return method, {
        name: torch.cat([one[name] for one in outputs]) for name, value in outputs[0].items() if isinstance(value, Tensor)
    }


def picked(outputs: dict[str, Any], numbers: Sequence[int]) -> list[int]:
    """Numbers of pictures, refused if there are no such pictures."""
    count = len(outputs["image"])
    if bad := [number for number in numbers if not 0 <= number < count]:
        raise UserError(f"no picture {bad[0]}: the {count} of the test set count from 0")
    return list(numbers)


def framed(image: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """A picture (C, H, W) in colour, with a frame of two pixels: (3, H + 4, W + 4)."""
    inside = F.pad(torch.ones_like(image[:1]), (2, 2, 2, 2))
    around = torch.tensor(colour)[:, None, None] * (1 - inside)
    return around + F.pad(image.float().clamp(0, 1).expand(3, -1, -1), (2, 2, 2, 2))
