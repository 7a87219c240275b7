"""`darkroom predict`: apply a method to a user's images."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from callbacks.writers.image_writer import ImageWriter
from callbacks.writers.mask_writer import MaskWriter
from datamodules.errors import UserError
from datamodules.io.loader import make_loader
from datamodules.io.user_images import LumaInputs, SegmentationInputs, TranslationInputs, list_user_images
from datamodules.sampler import RankSampler
from experiments.run.lightning_cli import DarkroomCLI, print_rank_zero
from experiments.run.weights import load_resolved_weights
from modules.tasks.segmentation import SegmentationMethod
from modules.tasks.superresolution import SuperResolutionMethod
from modules.tasks.translation import TranslationMethod


def predict(cli: DarkroomCLI) -> None:
    """Enlarge, segment or translate a user's images, and write the results to the output folder.

    Raises:
        UserError: the method takes no images, or a path cannot be read or written.
    """
    if not isinstance(cli.model, SuperResolutionMethod | SegmentationMethod | TranslationMethod):
        raise UserError(f"{cli.recipe.name} takes no images; use darkroom sample")

    if cli.config.direction and not isinstance(cli.model, TranslationMethod):
        raise UserError(f"--direction: {cli.recipe.name} is not a translation")
    path = load_resolved_weights(cli)
    output = Path(cli.config.output)
    files = list_user_images(cli.config.input, exclude=output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from None
    print_rank_zero(f"weights   {path or 'none needed'}")
    paths = output_paths(files, Path(cli.config.input), output)
    rank, world = cli.trainer.global_rank, cli.trainer.world_size
    if isinstance(cli.model, SegmentationMethod):
        dataset: Dataset[Any] = SegmentationInputs(files, cli.datamodule.channels, cli.datamodule.downscale)
        cli.trainer.callbacks.append(MaskWriter(paths, output))
    elif isinstance(cli.model, TranslationMethod):
        short_side = None if cli.datamodule.resize is None else cli.datamodule.crop
        dataset = TranslationInputs(files, short_side, cli.config.direction or "AtoB")
        cli.trainer.callbacks.append(ImageWriter(paths))
    else:
        dataset = LumaInputs(files)
        cli.trainer.callbacks.append(ImageWriter(paths))
    loader = make_loader(dataset, RankSampler(len(files), rank, world))
    cli.trainer.predict(cli.model, loader, return_predictions=False)


def output_paths(files: list[Path], source: Path, output: Path) -> dict[str, Path]:
    """Map each input file to its output path: a PNG in the same sub-folder as below `source`.

    Raises:
        UserError: an output would overwrite an input.
    """
    base = source if source.is_dir() else source.parent
    inputs = {file.resolve() for file in files}
    paths: dict[str, Path] = {}
    for file in files:
        path = output / file.relative_to(base).with_suffix(".png")
        if path in paths.values():  # photo.jpg and photo.png in one folder
            path = path.with_name(f"{file.name}.png")
        if path.resolve() in inputs:
            raise UserError(f"--output: {path} is one of the inputs and would be overwritten; choose another folder")
        paths[str(file)] = path
    return paths
