"""Networks as arguments of a method: a class and its arguments in a recipe, in place of the network of the paper."""

from importlib import import_module
from typing import Any

from torch import nn

from datamodules.errors import UserError

# {"class_path": "mynetworks.Discriminator", "init_args": {...}}; None for the network of the method.
NetworkSpec = dict[str, Any] | None


def build_network(key: str, spec: NetworkSpec, default: nn.Module) -> nn.Module:
    """Create the network that a recipe names.

    Args:
        key: key of the recipe, for messages.
        spec: class and arguments; None for the default.
        default: network of the method.

    Raises:
        UserError: the class does not exist, is no module of torch, or does not accept the arguments.
    """
    if spec is None:
        return default
    class_path, arguments = spec.get("class_path"), spec.get("init_args", {})
    if not isinstance(class_path, str) or not isinstance(arguments, dict) or spec.keys() - {"class_path", "init_args"}:
        raise UserError(f"model.{key}: {spec} is not a network. Give class_path and init_args")
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"model.{key}: no class {class_path} exists. Save it in a file next to the recipe") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"model.{key}: {class_path} is not a torch.nn.Module. Use a class that is")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"model.{key}: {class_path}: {error}. Correct init_args") from None
