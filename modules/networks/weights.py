"""Weights of networks: files, checkpoints, names and hashes."""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from datamodules.errors import UserError

# Raised by torch.load and safetensors for a damaged file, or one of another format.
LOAD_ERRORS = (
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    UnpicklingError,
    struct.error,
    SafetensorError,
)

SHARDED_PARTS = ("state_dict", "optimizer_states")  # parts of a checkpoint that contain sharded tensors


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of another file by torch; no other objects are unpickled.

    Raises:
        UserError: the file is damaged, or contains objects other than tensors.
    """
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *LOAD_ERRORS) as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())}. Replace the file") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain data; tensors are memory-mapped.

    The weights of a checkpoint in shards are assembled, but not its optimizer states.

    Raises:
        UserError: the file cannot be read, is damaged, or is not a checkpoint, or a file of its shards is missing or damaged.
    """
    return join_shards(path, read_own_file(path), ["state_dict"])


def read_own_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint without its shards, if it has any: their tensors are "meta" tensors, see `join_shards`.

    Raises:
        UserError: the file cannot be read, is damaged, or is not a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except LOAD_ERRORS:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} cannot be read as weights: it is damaged, or not a checkpoint (.ckpt, .safetensors)")
    return content


def shard_files(path: Path, content: Mapping[str, Any]) -> list[Path]:
    """List the files of the shards of a checkpoint, one of each process that saved it; empty without shards."""
    if "shards" not in content:
        return []
    return [path.parent / str(content["shards"]) / f"{rank}.pt" for rank in range(content["world_size"])]


def join_shards(path: Path, content: dict[str, Any], parts: Sequence[str] = SHARDED_PARTS) -> dict[str, Any]:
    """Return a checkpoint with full tensors in place of "meta" tensors, if it was saved in shards (`FSDP2Strategy`).

    The folder `content["shards"]`, next to the checkpoint, has a file of each process that saved it, with a list of shards for
    each part. Shards are in the order of the "meta" tensors, and a tensor is the concatenation of its shards. Files are read
    without unpickling of objects, which the format of torch.distributed.checkpoint requires.

    Args:
        path: path of the checkpoint.
        content: content of its file.
        parts: parts of the checkpoint to assemble.

    Raises:
        UserError: files of shards are missing or damaged; the message names them.
    """
    if "shards" not in content:
        return content
    remedy = "Copy the folder with the checkpoint, or restore it"
    folder = f"{content['shards']}, the folder of its shards,"
    try:
        files = shard_files(path, content)
        if missing := [file.name for file in files if not file.exists()]:
            lacks = "is missing" if not files[0].parent.exists() else f"has no {', '.join(missing)}"
            raise UserError(f"{path}: {folder} {lacks}. {remedy}")
        shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        full = {part: _fill(content[part], [iter(shard[part]) for shard in shards]) for part in parts}
    except (OSError, StopIteration, *LOAD_ERRORS):
        raise UserError(f"{path}: {folder} is damaged. {remedy}") from None
    return {**content, **full}


def _fill(value: Any, shards: Sequence[Iterator[Tensor]]) -> Any:
    """Replace the "meta" tensors in nested containers with concatenated shards."""
    if isinstance(value, Tensor) and value.is_meta:
        return torch.cat([next(values) for values in shards])
    if isinstance(value, dict):
        return {key: _fill(item, shards) for key, item in value.items()}
    return [_fill(item, shards) for item in value] if isinstance(value, list) else value


@runtime_checkable
class HasAuthorsWeights(Protocol):
    """A method that can use weights of its authors."""

    def authors_weights(self) -> Path | None:
        """Return the file of the weights, downloaded if it is missing; None if there is none."""

    def rename_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with the names of this method; others unchanged."""
        ...


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint (.ckpt), of committed weights (.safetensors) or of a file of torch (.pth), by name.

    Raises:
        UserError: see `read_checkpoint` and `read_weights_file`.
    """
    return read_weights_file(path) if path.suffix in (".safetensors", ".pth") else read_checkpoint(path)["state_dict"]


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of the sha256 of names and values.

    The hash of a checkpoint equals that of the committed weights exported from it.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of a file into a module, see `read_weights`; a method can rename those of its authors' code.

    Raises:
        UserError: the file does not contain the weights of this module; the message names the file and the first difference.
    """
    weights = read_weights(path)
    if isinstance(module, HasAuthorsWeights):
        weights = module.rename_weights(weights)
    check_tensors(path, weights)
    weights = inference_state_dict(module, weights)
    expected = inference_state_dict(module, module.state_dict())
    check_weights(path, weights, expected)
    module.load_state_dict(weights, strict=False)


def check_tensors(path: Path, weights: Any) -> None:
    """Check that the content of a file is a map of names to ordinary tensors.

    Raises:
        UserError: it is not; the message names the file and the first entry.
    """
    if not isinstance(weights, dict):
        raise UserError(f"{path} contains a {type(weights).__name__}, not weights by name. Use another file")
    for name, value in weights.items():
        ordinary = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        if not isinstance(name, str) or not ordinary:
            raise UserError(f"{path}: '{name}' is not a weight: an ordinary tensor with a name. Use another file")


def check_weights(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check names, shapes, types and values of the weights of a file.

    Raises:
        UserError: they are not those of a model, or a value is not finite; the message names the file and the weight.
    """
    check_tensors(path, weights)
    check_shapes(path, weights, expected)
    for name, value in weights.items():
        if value.is_floating_point() != expected[name].is_floating_point() or value.is_complex():
            raise UserError(f"{path}: '{name}' has the type {value.dtype}, not {expected[name].dtype}. Use another file")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: '{name}' has values that are not finite. Use another file")


def check_shapes(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of the weights of a file with those of a model.

    Raises:
        UserError: they differ; the message names the file and the first difference.
    """
    for name in sorted(expected.keys() | weights.keys()):
        shape, expected_shape = (
            tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (weights, expected)
        )
        if shape != expected_shape:
            raise UserError(
                f"{path} does not fit this model: for '{name}', the file has {shape}, but the model needs {expected_shape}. "
                "Use weights of the same recipe"
            )


def inference_state_dict(method: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that are used after training, as they are committed.

    They exclude those of the method's `training_only_modules`, and are rounded to its `inference_dtype` if it has one.

    Args:
        method: a method, or its class.
        weights: state dict of the method.
    """
    prefixes = tuple(f"{prefix}." for prefix in getattr(method, "training_only_modules", ()))
    used = {name: tensor for name, tensor in weights.items() if not (prefixes and name.startswith(prefixes))}
    dtype = getattr(method, "inference_dtype", None)
    return {name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in used.items()}
