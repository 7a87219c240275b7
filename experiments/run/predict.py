"""`darkroom predict`: what a method makes of a user's own pictures."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from callbacks.writers.image_writer import WritePhotos
from callbacks.writers.mask_writer import WriteMasks
from datamodules.errors import Refused
from datamodules.io.loader import load
from datamodules.io.user_images import Photos, PhotosToTranslate, WholePhotos, photo_files
from datamodules.sampler import Slice
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
        raise Refused(f"{cli.recipe.name} takes no pictures; darkroom sample shows what it makes")

    if cli.config.direction and not isinstance(cli.model, TranslationMethod):
        raise Refused(f"--direction: {cli.recipe.name} does not translate")
    path = fill(cli)
    output = Path(cli.config.output)
    files = photo_files(cli.config.input, leaving_out=output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot write to {output}: {error.strerror}") from None
    tell(f"weights   {path or 'none needed'}")
    targets = output_paths(files, Path(cli.config.input), output)
    rank, world = cli.trainer.global_rank, cli.trainer.world_size
    if isinstance(cli.model, SegmentationMethod):
        photos: Dataset[Any] = WholePhotos(files, cli.datamodule.channels, cli.datamodule.shrink)
        cli.trainer.callbacks.append(WriteMasks(targets, output))
    elif isinstance(cli.model, TranslationMethod):
        shorter = None if cli.datamodule.resize is None else cli.datamodule.crop
        photos = PhotosToTranslate(files, shorter, cli.config.direction or "AtoB")
        cli.trainer.callbacks.append(WritePhotos(targets))
    else:
        photos = Photos(files)
        cli.trainer.callbacks.append(WritePhotos(targets))
    loader = load(photos, Slice(len(files), rank, world))
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
            raise Refused(f"{target} is one of the inputs and would be overwritten; name another --output")
        targets[str(file)] = target
    return targets
