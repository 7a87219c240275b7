"""`darkroom predict`: what a method makes of a user's own pictures."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from callbacks.writers.image_writer import ImageWriter
from callbacks.writers.mask_writer import MaskWriter
from datamodules.errors import UserError
from datamodules.io.loader import make_loader
from datamodules.io.user_images import LumaInputs, SegmentationInputs, TranslationInputs, list_user_images
from datamodules.sampler import RankSampler
from experiments.run.lightning_cli import DarkroomCLI, tell
from experiments.run.weights import fill
from modules.tasks.segmentation import SegmentationMethod
from modules.tasks.superresolution import SuperResolutionMethod
from modules.tasks.translation import TranslationMethod


def predict(cli: DarkroomCLI) -> None:
    """Enlarge or translate a user's own pictures, or tell their pixels' classes, into the output folder.

    Raises:
        Refused: this method makes nothing of pictures.
    """
    if not isinstance(cli.model, SuperResolutionMethod | SegmentationMethod | TranslationMethod):
        raise UserError(f"{cli.recipe.name} takes no pictures; darkroom sample shows what it makes")

    if cli.config.direction and not isinstance(cli.model, TranslationMethod):
        raise UserError(f"--direction: {cli.recipe.name} does not translate")
    path = fill(cli)
    output = Path(cli.config.output)
    files = list_user_images(cli.config.input, exclude=output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from None
    tell(f"weights   {path or 'none needed'}")
    targets = output_paths(files, Path(cli.config.input), output)
    rank, world = cli.trainer.global_rank, cli.trainer.world_size
    if isinstance(cli.model, SegmentationMethod):
        photos: Dataset[Any] = SegmentationInputs(files, cli.datamodule.channels, cli.datamodule.downscale)
        cli.trainer.callbacks.append(MaskWriter(targets, output))
    elif isinstance(cli.model, TranslationMethod):
        short_side = None if cli.datamodule.resize is None else cli.datamodule.crop
        photos = TranslationInputs(files, short_side, cli.config.direction or "AtoB")
        cli.trainer.callbacks.append(ImageWriter(targets))
    else:
        photos = LumaInputs(files)
        cli.trainer.callbacks.append(ImageWriter(targets))
    loader = make_loader(photos, RankSampler(len(files), rank, world))
    cli.trainer.predict(cli.model, loader, return_predictions=False)


def output_paths(files: list[Path], source: Path, output: Path) -> dict[str, Path]:
    """Where each result goes: the folders below `source` are kept, everything is PNG."""
    base = source if source.is_dir() else source.parent
    inputs = {file.resolve() for file in files}
    targets: dict[str, Path] = {}
    for file in files:
        target = output / file.relative_to(base).with_suffix(".png")
        if target in targets.values():  # photo.jpg and photo.png side by side
            target = target.with_name(f"{file.name}.png")
        if target.resolve() in inputs:
            raise UserError(f"{target} is one of the inputs and would be overwritten; name another --output")
        targets[str(file)] = target
    return targets
