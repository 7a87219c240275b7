"""`darkroom predict`: apply a method to a user's images."""

from pathlib import Path

from datamodules.errors import UserError
from datamodules.io.loader import make_loader
from datamodules.io.user_images import list_user_images
from datamodules.sampler import RankSampler
from experiments.run.lightning_cli import DarkroomCLI, print_rank_zero
from experiments.run.weights import load_resolved_weights
from experiments.tasks.registry import task_of


def predict(cli: DarkroomCLI) -> None:
    """Enlarge, segment, translate or stylize a user's images, and write the results to the output folder.

    Raises:
        UserError: the method takes no images, an option is invalid, or a path cannot be read or written.
    """
    task = task_of(cli.datamodule)
    if task.predict is None:
        raise UserError(f"predict: {cli.recipe.name} takes no images. Use darkroom sample")
    for name in ("direction", "style", "alpha"):
        if cli.config[name] is not None and name not in task.predict_options:
            raise UserError(f"--{name}: {cli.recipe.name} does not have this option. Remove it")
    path = load_resolved_weights(cli)
    output = Path(cli.config.output)
    files = list_user_images(cli.config.input, exclude=output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write to {output}: {error.strerror}. Choose another folder") from None
    print_rank_zero(f"weights   {path or 'none needed'}")
    paths = output_paths(files, Path(cli.config.input), output)
    inputs, writer = task.predict(cli, files, paths, output)
    cli.trainer.callbacks.append(writer)
    loader = make_loader(inputs, RankSampler(len(files), cli.trainer.global_rank, cli.trainer.world_size))
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
            raise UserError(f"--output: {path} is one of the inputs and would be overwritten. Choose another folder")
        paths[str(file)] = path
    return paths
