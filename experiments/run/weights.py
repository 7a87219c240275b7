"""Select the weights of a command, in this order: --ckpt, the newest run of the recipe, the bundled file, those of the authors.

A run with other settings than the recipe is another network: it is named and passed over, and selected by --run or its folder.
"""

import json
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from experiments.run.config_checks import typed_keys
from experiments.run.lightning_cli import RESUMABLE_KEYS, DarkroomCLI, print_rank_zero
from experiments.run.run_dir import Run, finished_runs
from experiments.run.weights_file import date_of, read_description
from modules.networks.weights import HasAuthorsWeights, load_weights, read_checkpoint

# Settings of models that the training does not use: each network can be applied with other values.
INFERENCE_SETTINGS = {"tta_views", "tile_size", "temperature", "score_threshold", "nms_threshold", "max_detections"}
LIMITS = ("max_steps", "max_time", "limit_train_batches")  # settings of the Trainer that end a training early
LOADER_SETTINGS = {"num_workers", "skip_bad"}


def load_resolved_weights(cli: DarkroomCLI) -> Path | None:
    """Load the weights to use into the model, print their path, and return it; None if the model has no parameters."""
    path = resolve_weights(cli)
    if path is not None:
        check_settings(cli, path)
        load_weights(cli.model, path)
    print_rank_zero(f"weights   {origin(path) if path else 'none needed'}")
    return path


def origin(path: Path) -> str:
    """Return the path of a file of weights, with the day of the training and its images if they are known."""
    date: str | None
    if path.suffix == ".ckpt":
        date, images = date_of(path), read_checkpoint(path).get("images_seen")
    else:
        description = read_description(path) if path.suffix == ".safetensors" else None
        date, images = (description.date, description.images_seen) if description else (None, None)
    known = [*([f"of {date}"] if date else []), *([f"after {images:,} images"] if isinstance(images, int) else [])]
    return f"{path}  ({', '.join(known)})" if known else str(path)


def check_settings(cli: DarkroomCLI, path: Path) -> None:
    """Check that a checkpoint has the settings of the model: others could give wrong outputs with weights of the same shapes.

    Raises:
        UserError: a setting differs, apart from those of the training budget.
    """
    if path.suffix == ".ckpt":
        saved = read_checkpoint(path).get("hyper_parameters", {})
    else:
        description = read_description(path) if path.suffix == ".safetensors" else None
        saved = description.model.init_args if description else {}
    for key in sorted(saved.keys() & cli.model.hparams.keys() - RESUMABLE_KEYS - INFERENCE_SETTINGS - {"seed"}):
        theirs, ours = (json.dumps(values[key], default=str) for values in (saved, cli.model.hparams))
        if theirs != ours:
            raise UserError(
                f"{path} was trained with model.{key} {theirs}, but the model has {ours}. Add --model.{key} {theirs}"
            )


def differences(cli: DarkroomCLI, run: Run) -> list[tuple[str, Any, Any]]:
    """List the settings in which a run differs from the command, apart from those that do not matter for its weights.

    Settings of the data on the command line are not compared: they say what the command itself reads.
    """
    typed = typed_keys(cli.overrides)
    changed = [
        *cli.config_diff(run, "model", INFERENCE_SETTINGS),
        *cli.config_diff(run, "data", {*LOADER_SETTINGS, "test"}),
    ]
    limits, ours = run.read_config().get("trainer") or {}, cli.config.trainer
    changed += [
        (f"trainer.{key}", limits.get(key), ours[key]) for key in LIMITS if limits.get(key) not in (None, -1, ours[key])
    ]
    return [entry for entry in changed if not (entry[0].startswith("data.") and entry[0] in typed)]


def newest_run(cli: DarkroomCLI) -> Run | None:
    """Return the newest run with the settings of the command; a newer one with other settings is named."""
    runs = finished_runs(cli.recipe)
    for run in runs:
        try:
            changed = differences(cli, run)
        except UserError as error:
            print_rank_zero(f"not used  {run.folder}: {error}")
            continue
        if not changed:
            return run
        if run is runs[0]:
            key, theirs, ours = changed[0]
            print_rank_zero(
                f"not used  {run.folder}, which has {key} {theirs}, not {ours}. To use it, add --run {run.folder.name}"
            )
    return None


def resolve_weights(cli: DarkroomCLI) -> Path | None:
    """Return the path of the weights to use: --ckpt, the newest run with the settings of the recipe, or the bundled file.

    A method can have weights of its authors, which are downloaded if there are no others.

    None if the model has no parameters.

    Raises:
        UserError: there are no weights.
    """
    if cli.config.ckpt:
        if not Path(cli.config.ckpt).is_file():
            raise UserError(f"--ckpt: no file {cli.config.ckpt}. Check the path")
        return Path(cli.config.ckpt)
    if not list(cli.model.parameters()):
        return None
    if (run := newest_run(cli)) is not None:
        return run.best_checkpoint
    if cli.recipe.weights.exists():
        return cli.recipe.weights
    if isinstance(cli.model, HasAuthorsWeights) and (path := cli.model.authors_weights()) is not None:
        return path
    raise UserError(f"no weights for {cli.recipe.name}; train it with darkroom fit {cli.recipe.argument}, or use --ckpt FILE")
