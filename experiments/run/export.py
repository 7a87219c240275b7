"""`darkroom export`: write the weights of a network with a description of it."""

from pathlib import Path

import yaml

from datamodules.catalog.catalog import HELD_OUT, catalog
from datamodules.errors import UserError
from experiments.run.lightning_cli import DarkroomCLI, build_cli, print_rank_zero
from experiments.run.recipes import Recipe
from experiments.run.sample import require_writable
from experiments.run.weights import load_resolved_weights
from experiments.run.weights_file import Description, Entry, date_of, read_description, write_weights_file
from modules.networks.weights import read_checkpoint


def export(recipe: Recipe, options: list[str], output: Path) -> None:
    """Write the weights of a recipe or a run to a .safetensors file that describes its network.

    Raises:
        UserError: the method has no weights, or the file cannot be written.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output: {output} must end in .safetensors")
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder. Choose another file")
    cli = build_cli("test", recipe, options)
    weights = load_resolved_weights(cli)
    if weights is None:
        raise UserError(f"export: {recipe.name} has no weights. Choose another recipe")
    require_writable(output.parent)
    images_seen, date = None, date_of(weights)
    if weights.suffix == ".ckpt":
        images_seen = read_checkpoint(weights).get("images_seen")
    elif weights.suffix == ".safetensors" and (description := read_description(weights)):
        images_seen, date = description.images_seen, description.date
    write_weights_file(output, cli.model, describe_cli(cli, images_seen, date))
    print_rank_zero(f"file      {output}  ({output.stat().st_size / 1e6:.2f} MB)")


def describe_cli(cli: DarkroomCLI, images_seen: int | None, date: str) -> Description:
    """Return the description of the network of a command."""
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=True, skip_none=False))
    names = list(getattr(cli.datamodule, "class_names", ()))
    if isinstance(config["data"]["init_args"].get("class_names"), str):  # a file, which the reader of the weights does not have
        config["data"]["init_args"]["class_names"] = names
    for key in ("train", "val", "test", "images", "masks"):  # not used by the reader, and no folders of this machine
        if key in config["data"]["init_args"]:
            config["data"]["init_args"][key] = without_folders(config["data"]["init_args"][key])
    model, data = (Entry(**config[section]) for section in ("model", "data"))
    return Description(recipe=cli.recipe.name, model=model, data=data, class_names=names, images_seen=images_seen, date=date)


def without_folders(spec: str | list[str] | None) -> str | list[str] | None:
    """Return the names of datasets, with the last part of a path in its place."""
    if isinstance(spec, list):
        return [str(without_folders(name)) for name in spec]
    return Path(spec).name if spec and spec.partition("/")[0] not in (*catalog(), HELD_OUT) else spec
