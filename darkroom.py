"""Darkroom from Python: `import darkroom`. NOTEBOOK.md shows an example."""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics import ms_ssim as _ms_ssim
from callbacks.metrics import psnr_ssim as _psnr_ssim
from callbacks.metrics.segmentation import confusion, metrics_from_confusion
from datamodules.errors import UserError
from experiments.run import recipes as _recipes
from experiments.run.network import find_network
from experiments.run.run_dir import Run
from modules.training.method import Method

__all__ = ["Method", "Run", "UserError", "fid", "fit", "load", "ms_ssim", "psnr_y", "recipes", "segmentation_metrics", "ssim_y"]


def recipes(method: str | None = None) -> list[str]:
    """Return the names of the recipes of a method, or of all methods.

    Raises:
        UserError: there is no such method.
    """
    names = [recipe.name for recipe in _recipes.recipes()]
    return names if method is None else [name for name in names if name.startswith(f"{_recipes.known_method(method)}/")]


def load(name: str, *words: str, run: str | None = None, modules: str | None = None) -> Method:
    """Return a method with its weights, on the CPU, in evaluation mode.

    Args:
        name: a recipe ("dcgan/mnist"), the folder of a run, or a .safetensors file that describes its network.
        words: other keys of the recipe, as on the command line: "--model.tta_views", "4".
        run: run of the recipe, or "latest"; None for the weights that `darkroom predict` uses.
        modules: Python file with the classes of a .safetensors file; its code is run.

    Raises:
        UserError: there is no such network, or it has no weights.
    """
    from experiments.run.lightning_cli import build_cli
    from experiments.run.weights import load_resolved_weights

    cli = build_cli("test", *find_network(name, run, list(words), modules))
    load_resolved_weights(cli)
    return cli.model.eval()


def fit(recipe: str, *words: str, run: str | None = None) -> Run:
    """Train a recipe as `darkroom fit` does, and return the run; its `record` is the file with the results.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        words: other keys of the recipe, as on the command line: "--model.total_images", "1000".
        run: name of the run; an existing run is resumed.

    Raises:
        UserError: the recipe, a key or a value is invalid.
    """
    from experiments.run.execute import execute

    if run and any(word.partition("=")[0] == "--run" for word in words):
        raise UserError(f"run: {run}, but words contain --run. Remove one of them")
    named = ["--run", run] if run else []
    return execute("fit", _recipes.find_recipe(recipe), [*map(str, words), *named]).run


# Metrics, see the definitions of the protocols in callbacks/metrics


def psnr_y(prediction: Tensor, target: Tensor, crop_border: int) -> Tensor:
    """Return the PSNR in dB of each image (N,), see `callbacks.metrics.psnr_ssim.psnr_y`.

    Args:
        prediction, target: luma (N, 1, H, W) or RGB (N, 3, H, W), floating-point in [0, 1].
        crop_border: width of the border that is not compared, by convention the scale.

    Raises:
        UserError: a shape, a type or a value is not one of these.
    """
    return _psnr_ssim.psnr_y(*_images(prediction, target, crop_border), crop_border)


def ssim_y(prediction: Tensor, target: Tensor, crop_border: int) -> Tensor:
    """Return the SSIM of each image (N,), see `callbacks.metrics.psnr_ssim.ssim_y`; arguments and errors of `psnr_y`."""
    return _psnr_ssim.ssim_y(*_images(prediction, target, crop_border), crop_border)


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the multi-scale SSIM of each pair of uint8 images (N, C, H, W), see `callbacks.metrics.ms_ssim.ms_ssim`.

    Raises:
        UserError: a shape or a type is not one of these.
    """
    _uint8_images("first", first)
    _uint8_images("second", second)
    if first.shape != second.shape:
        raise UserError(f"second: shape {_shape(second)} differs from that of first, {_shape(first)}")
    return _ms_ssim.ms_ssim(first, second)


def segmentation_metrics(prediction: Tensor, mask: Tensor, class_names: list[str]) -> dict[str, float]:
    """Return the metrics of `callbacks.metrics.segmentation.SegmentationMetrics` by name.

    Args:
        prediction: class ids (N, H, W), integers.
        mask: true class ids (N, H, W), integers; 255 is ignored.
        class_names: names of the classes in the order of their ids.

    Raises:
        UserError: a shape, a type or a value is not one of these.
    """
    classes = len(class_names)
    if len(set(class_names)) < classes:
        raise UserError(f"class_names: {', '.join(class_names)} are not different names")
    if not len(mask):
        raise UserError("mask: no images. Give at least one")
    for name, ids in (("prediction", prediction), ("mask", mask)):
        if ids.ndim != 3 or ids.is_floating_point() or ids.is_complex() or ids.shape != mask.shape:
            raise UserError(f"{name}: {ids.dtype} {_shape(ids)} are not class ids (N, H, W), integers of the same size")
        used = ids if name == "prediction" else ids[ids != 255]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < classes:
            raise UserError(
                f"{name}: ids {int(used.min())} to {int(used.max())} are not in 0 to {classes - 1}, see class_names"
            )
    pairs = zip(prediction, mask, strict=True)
    return metrics_from_confusion(torch.stack([confusion(*pair, classes) for pair in pairs]), class_names)


def fid(samples: Tensor, real: Tensor, weights: str | None = None) -> float:
    """Return the Frechet Inception distance of torch-fidelity, the one of papers.

    Args:
        samples, real: uint8 images (N, 1 or 3, H, W), at least two of each; papers use 10,000 or 50,000.
        weights: file of the Inception network; None for the file in torch's cache, which is downloaded if it is missing.

    Raises:
        UserError: a shape or a type is not one of these, or there are no weights.
    """
    from callbacks.metrics.fid_kid_is import BATCH_SIZE, extract, frechet_distance
    from modules.networks.feature_extractors import Inception
    from modules.networks.pretrained import find_or_download

    for name, images in (("samples", samples), ("real", real)):
        _uint8_images(name, images)
        if len(images) < 2:
            raise UserError(f"{name}: {len(images)} images. FID needs at least 2")
    network: Any = Inception(find_or_download(Inception.name, Inception.url, weights))
    features = [
        torch.cat([extract(network, batch)["features"] for batch in images.split(BATCH_SIZE)]) for images in (samples, real)
    ]
    return frechet_distance(*features)


TOLERANCE = 1e-4  # of rounding, at the bounds of images


def _images(prediction: Tensor, target: Tensor, crop_border: int) -> tuple[Tensor, Tensor]:
    for name, image in (("prediction", prediction), ("target", target)):
        if not isinstance(image, Tensor):
            raise UserError(f"{name}: {type(image).__name__} is not a tensor. Use torch.from_numpy or torch.tensor")
        if image.ndim != 4 or image.shape[1] not in (1, 3) or not image.is_floating_point():
            raise UserError(f"{name}: {image.dtype} {_shape(image)} is not floating-point (N, 1, H, W) or (N, 3, H, W)")
        if not image.numel() or not bool(((image >= -TOLERANCE) & (image <= 1 + TOLERANCE)).all()):  # also refuses NaN
            raise UserError(f"{name}: values are not in [0, 1]. Divide 8-bit values by 255; clamp the output of a network")
    if prediction.shape != target.shape:
        raise UserError(f"target: shape {_shape(target)} differs from that of prediction, {_shape(prediction)}")
    if not isinstance(crop_border, int) or not 0 <= crop_border < min(target.shape[-2:]) / 2:
        raise UserError(
            f"crop_border: {crop_border} leaves nothing of {target.shape[-1]}x{target.shape[-2]} pixels, or is no integer"
        )
    return prediction, target


def _uint8_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise UserError(f"{name}: {type(images).__name__} is not a tensor. Use torch.from_numpy or torch.tensor")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise UserError(f"{name}: {images.dtype} {_shape(images)} is not uint8 (N, 1, H, W) or (N, 3, H, W)")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
