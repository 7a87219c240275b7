"""`darkroom growth`: samples of the same latents at the end of each stage of a training."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from datamodules.errors import UserError
from datamodules.io.image_io import read_image
from datamodules.transforms.draw import split_grid
from experiments.run.recipes import Recipe
from experiments.run.run_dir import Run
from experiments.run.sample import check_output, grid, save_png
from modules.training.stages import StagePlan

MIN_SIDE = 64  # of an image in the picture, in pixels


def growth(recipe: Recipe, count: int, output: str) -> None:
    """Write a picture of samples: one row for each latent, and one column for each stage, at its last validation.

    Args:
        recipe: configuration of a run of a method with stages, such as ProGAN; see `find_network`.
        count: number of latents.
        output: PNG file.

    Raises:
        UserError: the training has one stage, or the run has fewer samples.
    """
    path = Path(output)
    check_output([path], [])
    run = Run(recipe.path.parent)
    print(f"run       {run.folder}")
    config = run.read_config()
    plan, size, end = stage_plan(recipe, config)
    if len(plan.starts) < 2:
        raise UserError(f"growth: the training of {run.folder} has one stage. Use a run that grows, such as one of progan/demo")
    previews = {int(file.stem): file for file in run.samples.glob("*.png") if file.stem.isdigit()}
    columns = []
    for (start, stop), stage in zip(pairwise([*plan.starts, end]), plan.stages, strict=True):
        side = stage.image_size or size
        if within := [images for images in previews if start < images <= stop or (stop == end and images > start)]:
            images = split_grid(read_image(previews[max(within)]).expand(3, -1, -1).float() / 255, size)
            if count > len(images):
                raise UserError(f"growth: --count {count}: the run has {len(images)} samples")
            columns.append(images[:count])
            print(f"column {len(columns)}  {side} x {side} pixels, after {max(within):,} images")
        else:
            print(f"no column: {side} x {side} pixels, no validation between {start:,} and {stop:,} images")
    if not columns:
        raise UserError(f"growth: {run.folder} has no samples of a stage. Train with a smaller --val_every_images")
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (count * columns, 3, size, size)
    factor = -(-MIN_SIDE // size)
    rows = rows.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    save_png(grid(rows, len(columns)), path)


def stage_plan(recipe: Recipe, config: dict[str, Any]) -> tuple[StagePlan, int, int]:
    """Return the stages of a run, the side of its samples, and the images seen at its end.

    Raises:
        UserError: the run does not generate images of one size.
    """
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    if not isinstance(data.get("size"), int) or "val_samples" not in data:
        raise UserError(f"growth: {recipe.name} does not generate images. Use a recipe that grows, such as progan/demo")
    with torch.device("meta"):
        method = recipe.load_class("model")(**model)
    return StagePlan(method.stages(), data["batch_size"]), data["size"], model["total_images"]
