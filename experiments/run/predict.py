"""`darkroom predict`: apply a method to a user's images or video."""

import tempfile
from pathlib import Path

from PIL import Image

from callbacks.writers.image_writer import ImageWriter
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage, count_pages, note_on_losses
from datamodules.io.loader import make_loader
from datamodules.io.user_images import list_user_images
from datamodules.io.value_range import ValueRange
from datamodules.sampler import RankSampler
from experiments.run.lightning_cli import DarkroomCLI, print_rank_zero
from experiments.run.sample import require_writable
from experiments.run.video import is_video, read_frames, write_video
from experiments.run.weights import load_resolved_weights
from experiments.tasks.registry import task_of
from modules.tasks.stylization import StylizationMethod


def predict(cli: DarkroomCLI) -> None:
    """Apply the method of a task to a user's images or video, and write the results to the output folder.

    Raises:
        UserError: the method takes no images, an option is invalid, a path cannot be read or written, or files of the folder
            were not processed, after all others.
    """
    task = task_of(cli.datamodule)
    if task.predict is None:
        raise UserError(f"predict: {cli.recipe.name} takes no images. Use darkroom sample")
    for name in ("direction", "style", "alpha", "temperature", "score"):
        if cli.config[name] is not None and name not in task.predict_options:
            raise UserError(f"--{name}: {cli.recipe.name} does not have this option. Remove it")
    if sum(word.partition("=")[0] == "--input" for word in cli.overrides) > 1:
        raise UserError("--input: given twice. Write all inputs after one --input")
    for name, words in (("input", cli.config.input), ("output", [cli.config.output])):
        if "" in words:
            raise UserError(f"--{name} is empty. Give a path")
    load_resolved_weights(cli)
    sources, output = [Path(word) for word in cli.config.input], Path(cli.config.output)
    if output.suffix.lower() in Image.registered_extensions():
        raise UserError(f"--output: {output} looks like a file. Give a folder; images are written to it as PNG files")
    if len(sources) == 1 and is_video(sources[0]):
        require_writable(output)
        predict_video(cli, sources[0], output)
        return
    value_range: ValueRange = getattr(cli.datamodule, "value_range", "dtype")
    folders: dict[Path, Path] = {}
    reasons: list[str] = []
    known: set[Path] = set()
    for source in sources:
        if is_video(source):
            raise UserError(f"--input: {source} is one of {len(sources)} inputs. Give a video alone")
        found, unusable = list_user_images(source, output, task.reads_stacks, value_range)
        new = [file for file in found if file.resolve() not in known]  # the others are given twice
        folders |= {file: source if source.is_dir() else source.parent for file in new}
        known |= {file.resolve() for file in new}
        reasons += unusable
    if not folders:
        raise InvalidImage("; ".join(reasons))
    files = list(folders)
    require_writable(output)
    if note := note_on_losses(files):
        print_rank_zero(f"note      {note}")
    for source in sources:
        report_videos(source, output)
    predict_images(cli, files, output_paths(folders, output), output)
    if reasons:
        raise InvalidImage(f"{len(reasons)} of {len(files) + len(reasons)} files were not processed: {'; '.join(reasons)}")


def report_videos(source: Path, output: Path) -> None:
    """Print the videos of an input folder, which are not processed."""
    videos = [file for file in source.rglob("*") if is_video(file)] if source.is_dir() else []
    for video in sorted(videos):
        if output not in video.parents:
            print_rank_zero(f"{video}  skipped: give a video as --input")


def predict_images(cli: DarkroomCLI, files: list[Path], paths: dict[str, Path], output: Path, verbose: bool = True) -> None:
    """Apply the method to image files.

    Args:
        cli: model and Trainer.
        files: image files.
        paths: output path of each file.
        output: output folder.
        verbose: print the name of each image; with False, the method must write one image for each.

    Raises:
        UserError: `verbose` is False, and the method writes something other than images.
    """
    task = task_of(cli.datamodule)
    assert task.predict is not None
    inputs, writer = task.predict(cli, files, paths, output)
    if not verbose:
        if not isinstance(writer, ImageWriter):
            raise UserError(
                f"--input: {cli.recipe.name} does not write images, so it takes no video. Give an image or a folder"
            )
        writer.verbose = False
    cli.trainer.callbacks.append(writer)
    loader = make_loader(inputs, RankSampler(len(files), cli.trainer.global_rank, cli.trainer.world_size))
    cli.trainer.predict(cli.model, loader, return_predictions=False)


def predict_video(cli: DarkroomCLI, source: Path, output: Path) -> None:
    """Apply the method to each frame of a video, and write an MP4 file without sound.

    If the command is interrupted, the frames so far are written to another file.

    Raises:
        UserError: the video cannot be read, would be overwritten, or there are several processes.
    """
    target = output / f"{source.stem}.mp4"
    if target.resolve() == source.resolve():
        raise UserError(f"--output: {target} is the input and would be overwritten. Choose another folder")
    partial = target.with_stem(f"{target.stem}-partial")
    for path in (target, partial):
        check_target(path, {source.parent.resolve()})
    if cli.trainer.world_size > 1:
        raise UserError("--input: a video is processed by one process. Use --trainer.devices 1")
    if isinstance(cli.model, StylizationMethod):
        cli.model.select(cli.config.style, 1.0)  # refuses an unknown style before the frames are read
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        before.mkdir()
        files, rate = read_frames(source, before)
        try:
            predict_images(cli, files, {str(file): after / file.name for file in files}, output, verbose=False)
        except InvalidImage as error:  # names a temporary file
            raise UserError(f"--input: frames of {source}: {str(error).partition(': ')[2]}") from None
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
            if written := sorted(after.glob("*.png"))[:-1]:  # the last frame may be incomplete
                write_video(written, rate, partial)
                print_rank_zero(f"{source}  interrupted after {len(written)} of {len(files)} frames  ->  {partial}")
            raise
        write_video([after / file.name for file in files], rate, target)
    print_rank_zero(f"{source}  {len(files)} frames  ->  {target}")


def output_paths(folders: dict[Path, Path], output: Path) -> dict[str, Path]:
    """Map each input file to its output path: a PNG, or a TIFF for a stack.

    Args:
        folders: folder of each input file, below which its sub-folders are kept.
        output: output folder.

    Raises:
        UserError: an output would overwrite an input, another output, or another file in the folder of an input.
    """
    inputs = {file.resolve() for file in folders}
    input_folders = {folder.resolve() for file, base in folders.items() for folder in (file.parent, base)}
    taken: dict[Path, Path] = {}
    paths: dict[str, Path] = {}
    for file, base in folders.items():
        suffix = ".tif" if count_pages(file) > 1 else ".png"
        path = output / file.relative_to(base).with_suffix(suffix)
        if path in taken and taken[path].parent == file.parent:  # photo.jpg and photo.png
            path = path.with_name(f"{file.name}{suffix}")
        if path in taken:
            raise UserError(f"--input: {taken[path]} and {file} would both be written to {path}. Process them one by one")
        if path.relative_to(output).parts[0] in ("overlays", "classes.csv"):  # written next to the masks
            raise UserError(f"--input: the output of {file} would be in {path}, which is used for other files. Rename it")
        if path.resolve() in inputs:
            raise UserError(f"--output: {path} is one of the inputs and would be overwritten. Choose another folder")
        check_target(path, input_folders)
        taken[path] = file
        paths[str(file)] = path
    return paths


def check_target(path: Path, input_folders: set[Path]) -> None:
    """Check that an output path is not a folder, and no existing file in the folder of an input.

    Raises:
        UserError: it is.
    """
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder. Choose another one, or move it")
    if path.exists() and path.parent.resolve() in input_folders:
        raise UserError(f"--output: {path} exists, and may be one of your files. Choose another folder, or move it")
