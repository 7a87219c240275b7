"""`darkroom neural-style` and `darkroom deepdream`: images made by optimization of their pixels."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from datamodules.errors import UserError
from datamodules.io.image_io import pixel_hash, read_image, to_channels
from experiments.run.cpu import configure_cpu
from experiments.run.sample import require_writable, save_png
from modules.losses.perceptual import PerceptualObjective
from modules.networks.vgg import FeatureNetwork, FeatureNetworkName, Pooling, find_feature_weights
from modules.networks.weights import read_weights_file
from modules.neural_style import LAYERS, OptimizerName, StyleOptimization, dream, resize
from modules.style_transfer import read_style
from modules.training.references import ReferenceNetwork

MIN_SIDE = 32  # pixels
OCTAVE_SCALE, MIN_OCTAVE_SIDE = 1.4, 16  # DeepDream; at least 2 pixels at relu4_1, for reflection padding


def neural_style(
    content: str,
    style: str,
    output: str,
    size: int,
    steps: int,
    optimizer: OptimizerName,
    init: str,
    network: FeatureNetworkName,
    weights: str | None,
    pooling: Pooling,
    style_weight: float,
    tv_weight: float,
    save_every: int,
    resume: bool,
    seed: int,
) -> None:
    """Transfer the style of an image to a photograph, and save intermediate images and the state.

    Args:
        content, style: image files.
        output: PNG file; the state is saved next to it.
        size: longer side of the result in pixels, and shorter side of the style image.
        steps: number of optimizer steps.
        optimizer: see `StyleOptimization`.
        init: "content" or "noise", the first image.
        network, weights, pooling: see `FeatureNetwork` and `find_feature_weights`.
        style_weight, tv_weight: weights of the losses; that of the content is 1.
        save_every: steps between two intermediate images; L-BFGS starts with an empty history after each.
        resume: continue from the state of an interrupted command.
        seed: seed of the noise.

    Raises:
        UserError: a file is unusable, or the state was saved with other settings.
    """
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output: {output} must end in .png")
    require_writable(path.parent)
    content_layer, style_layers = LAYERS[network]
    features = load_features(network, weights, [content_layer, *style_layers], pooling)
    photograph = read_content(Path(content), size)
    painting = read_style(Path(style), size)
    objective = PerceptualObjective(features, content_layer, style_layers, 1.0, style_weight, tv_weight, "sum")
    generator = torch.Generator().manual_seed(seed)
    start = photograph if init == "content" else torch.rand(photograph.shape, generator=generator)
    device = features.mean.device
    optimization = StyleOptimization(objective, photograph.to(device), painting.to(device), start.to(device), optimizer)
    settings = {
        "content": pixel_hash(photograph),
        "style": pixel_hash(painting),
        "--optimizer": optimizer,
        "--network": network,
        "--weights": weights or "",
        "--pooling": pooling,
        "--style-weight": style_weight,
        "--tv-weight": tv_weight,
        "--save-every": save_every,
    }
    state = path.with_suffix(".state")
    if resume:
        load_state(optimization, settings, state)
    with Progress(transient=True) as progress:
        task = progress.add_task("objective", total=steps, completed=optimization.steps)

        def report(step: int, value: float) -> None:
            progress.update(task, completed=step, description=f"objective {value:.5g}")

        complete = True
        while complete and optimization.steps < steps:
            complete = optimization.run(min(save_every - optimization.steps % save_every, steps - optimization.steps), report)
            save_state(optimization, settings, state)
            if complete and optimization.steps < steps:
                save_png(optimization.image[0].detach().cpu(), path.with_stem(f"{path.stem}-{optimization.steps:05d}"))
    if not complete:
        print(f"converged after {optimization.steps} steps")
    save_png(optimization.image[0].detach().cpu(), path)


def deepdream(
    image: str,
    output: str,
    size: int,
    layer: str | None,
    octaves: int,
    steps: int,
    network: FeatureNetworkName,
    weights: str | None,
) -> None:
    """Amplify the features of a layer in an image, and save the result of each octave.

    Args:
        image: image file.
        output: PNG file.
        size: longer side of the result in pixels.
        layer: layer to amplify; None for the deepest style layer of the network.
        octaves, steps: see `dream`.
        network, weights: see `FeatureNetwork` and `find_feature_weights`.

    Raises:
        UserError: a file is unusable, or the layer does not exist.
    """
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output: {output} must end in .png")
    require_writable(path.parent)
    layer = layer or LAYERS[network][1][-1]
    if path.resolve() == Path(image).resolve():
        raise UserError(f"--output: {path} is the input and would be overwritten. Choose another file")
    features = load_features(network, weights, [layer], "max")
    picture = read_content(Path(image), size).to(features.mean)
    smallest = min(picture.shape[-2:]) / OCTAVE_SCALE ** (octaves - 1)
    if smallest < MIN_OCTAVE_SIDE:
        raise UserError(
            f"--octaves: the smallest of {octaves} octaves has {smallest:.0f} pixels on a side, fewer than {MIN_OCTAVE_SIDE}. "
            "Use a larger --size or fewer octaves"
        )
    result: Tensor = picture
    with Progress(transient=True) as progress:
        task = progress.add_task(layer, total=octaves * steps)
        for octave, step, value, result in dream(features, layer, picture, octaves, OCTAVE_SCALE, steps):
            progress.update(task, advance=1, description=f"{layer}  octave {octave + 1}  {value:.4g}")
            if step == steps and octave + 1 < octaves:
                save_png(result[0].cpu(), path.with_stem(f"{path.stem}-octave{octave + 1}"))
    save_png(result[0].cpu(), path)


def load_features(name: FeatureNetworkName, weights: str | None, layers: list[str], pooling: Pooling) -> FeatureNetwork:
    """Return a feature network with its weights, frozen, on the GPU if there is one.

    Raises:
        UserError: the weights are missing, unusable or of another network, or a layer does not exist.
    """
    configure_cpu()
    network = FeatureNetwork(name, layers, pooling)
    ReferenceNetwork(network, partial(find_feature_weights, name, weights)).load()
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def read_content(path: Path, size: int) -> Tensor:
    """Read an image and resize its longer side: (1, 3, H, W) in [0, 1].

    Raises:
        InvalidImage: the file is not an image.
        UserError: a side would be smaller than 32 pixels.
    """
    pixels = to_channels(read_image(path), 3)[None].float() / 255
    factor = size / max(pixels.shape[-2:])
    sides = [round(side * factor) for side in pixels.shape[-2:]]
    if min(sides) < MIN_SIDE:
        raise UserError(f"--size: {size} is too small for {path}: {sides[1]}x{sides[0]} pixels. Use a larger size")
    return resize(pixels, sides).clamp(0, 1)


def save_state(optimization: StyleOptimization, settings: dict[str, Any], path: Path) -> None:
    """Write the state and the settings of the command to a temporary file, then move it to `path`."""
    part = path.with_suffix(".part")
    torch.save({**optimization.state_dict(), "settings": settings}, part)
    part.replace(path)


def load_state(optimization: StyleOptimization, settings: dict[str, Any], path: Path) -> None:
    """Read the state of an interrupted command.

    Raises:
        UserError: the state is missing, or was saved with other settings.
    """
    if not path.is_file():
        raise UserError(f"--resume: no file {path}. Remove the option to start a new image")
    state: dict[str, Any] = read_weights_file(path)
    saved = state.get("settings", {})
    if differing := [f"{name} {saved.get(name)}, now {value}" for name, value in settings.items() if saved.get(name) != value]:
        raise UserError(f"--resume: {path} was saved with {differing[0]}. Use the same images and options")
    optimization.load_state_dict(state)
