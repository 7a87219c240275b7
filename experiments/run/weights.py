"""Select the weights of a command, in this order: --ckpt, the newest finished run, the bundled file, those of the authors."""

import json
from pathlib import Path

from datamodules.errors import UserError
from experiments.run.lightning_cli import RESUMABLE_KEYS, DarkroomCLI, print_rank_zero
from experiments.run.run_dir import finished_runs
from experiments.run.weights_file import date_of, read_description
from modules.networks.weights import HasAuthorsWeights, load_weights, read_checkpoint


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
    saved = read_checkpoint(path).get("hyper_parameters", {}) if path.suffix == ".ckpt" else {}
    for key in sorted(saved.keys() & cli.model.hparams.keys() - RESUMABLE_KEYS - {"seed"}):
        if saved[key] != cli.model.hparams[key]:
            theirs, ours = (json.dumps(values[key], default=str) for values in (saved, cli.model.hparams))
            raise UserError(
                f"{path} was trained with model.{key} {theirs}, but the model has {ours}. Add --model.{key} {theirs}"
            )


def resolve_weights(cli: DarkroomCLI) -> Path | None:
    """Return the path of the weights to use: --ckpt, the newest finished run of the same model, or the bundled file.

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
    for run in finished_runs(cli.recipe):
        changed = cli.config_diff(run, "model")
        if not changed:
            return run.best_checkpoint
        key, theirs, ours = changed[0]
        print_rank_zero(f"not used  {run.folder}, which was trained with {key} {theirs}; the model has {ours}")
    if cli.recipe.weights.exists():
        return cli.recipe.weights
    if isinstance(cli.model, HasAuthorsWeights) and (path := cli.model.authors_weights()) is not None:
        return path
    raise UserError(f"no weights for {cli.recipe.name}; train it with darkroom fit {cli.recipe.argument}, or use --ckpt FILE")
