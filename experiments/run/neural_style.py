"""`darkroom neural-style` and `darkroom deepdream`: images made by optimization of their pixels."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from datamodules.errors import UserError
from datamodules.io.image_io import pixel_hash, read_image, to_channels
from experiments.run.cpu import configure_cpu
from experiments.run.gpu import check_gpu, configure_tf32
from experiments.run.sample import check_output, save_png
from modules.losses.perceptual import PerceptualObjective
from modules.networks.vgg import FeatureNetwork, FeatureNetworkName, Pooling, find_feature_weights
from modules.networks.weights import LOAD_ERRORS
from modules.neural_style import DREAM_LAYERS, LAYERS, OptimizerName, StyleOptimization, dream, resize
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
        resume: continue after the last intermediate image of an interrupted command.
        seed: seed of the noise.

    Raises:
        UserError: a file is unusable or would be overwritten, the state was saved with other settings, or the objective is not
            finite.
    """
    path = Path(output)
    state = path.with_suffix(".state")
    images = [intermediate_path(path, step) for step in range(save_every, steps, save_every)]
    check_output([path, state, state.with_suffix(".part"), *images], [Path(content), Path(style)])
    if state.exists() and not resume:
        raise UserError(f"--output: {state} exists. Use --resume to continue it, another --output, or delete the file")
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
        "--init": init,
        "--seed": seed,
    }
    if resume:
        load_state(optimization, settings, state)
        if optimization.steps > steps:
            raise UserError(f"--steps: {state} has {optimization.steps} steps already. Use at least as many")
    require_finite(optimization.value_and_gradient(optimization.image)[0])
    with Progress(transient=True) as progress:
        task = progress.add_task("objective", total=steps, completed=optimization.steps)

        def report(step: int, value: float) -> None:
            require_finite(value)
            progress.update(task, completed=step, description=f"objective {value:.5g}")

        complete, saved_steps = True, optimization.steps
        try:
            while complete and optimization.steps < steps:
                until_saved = min(save_every - optimization.steps % save_every, steps - optimization.steps)
                complete = optimization.run(until_saved, report)
                save_state(optimization, settings, state)
                saved_steps = optimization.steps
                if complete and optimization.steps < steps:
                    save_png(optimization.image[0].detach().cpu(), intermediate_path(path, optimization.steps))
        except KeyboardInterrupt:
            hint = f"continue after {saved_steps} steps with --resume" if saved_steps else "no step is saved"
            print(f"interrupted: {hint}; --save-every {save_every} sets how often the state is saved")
            raise
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
        layer: layer to amplify; None for that of `DREAM_LAYERS`.
        octaves, steps: see `dream`.
        network, weights: see `FeatureNetwork` and `find_feature_weights`.

    Raises:
        UserError: a file is unusable or would be overwritten, or the layer does not exist.
    """
    path = Path(output)
    check_output([path, *(octave_path(path, octave) for octave in range(octaves - 1))], [Path(image)])
    layer = layer or DREAM_LAYERS[network]
    features = load_features(network, weights, [layer], "max")
    picture = read_content(Path(image), size).to(features.mean)
    smallest = min(picture.shape[-2:]) * OCTAVE_SCALE ** (1 - octaves)
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
                save_png(result[0].cpu(), octave_path(path, octave))
    save_png(result[0].cpu(), path)


def intermediate_path(path: Path, step: int) -> Path:
    """Return the path of the image after a step."""
    return path.with_stem(f"{path.stem}-{step:05d}")


def octave_path(path: Path, octave: int) -> Path:
    """Return the path of the result of an octave."""
    return path.with_stem(f"{path.stem}-octave{octave + 1}")


def require_finite(objective: float) -> None:
    """Raise a UserError if the objective is not finite."""
    if not math.isfinite(objective):
        raise UserError("the objective is not finite. Use a smaller --style-weight or --tv-weight")


def load_features(name: FeatureNetworkName, weights: str | None, layers: list[str], pooling: Pooling) -> FeatureNetwork:
    """Return a feature network with its weights, frozen, on the GPU if there is one.

    Raises:
        UserError: the weights are missing, unusable or of another network, a layer does not exist, or torch cannot use the GPU.
    """
    configure_cpu()
    configure_tf32(enabled=False)
    check_gpu()
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
    """Write the state and the settings of the command to a temporary file, then move it to `path`.

    Raises:
        UserError: the file cannot be written.
    """
    part = path.with_suffix(".part")
    try:
        torch.save({**optimization.state_dict(), "settings": settings}, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch cannot write
        raise UserError(f"--output: cannot write {path}: {' '.join(str(error).split())}. Is the disk full?") from None


def load_state(optimization: StyleOptimization, settings: dict[str, Any], path: Path) -> None:
    """Read the state of an interrupted command.

    Raises:
        UserError: the state is missing or damaged, or was saved with other settings.
    """
    if not path.is_file():
        raise UserError(f"--resume: no file {path}. Remove the option to start a new image")
    damaged = UserError(f"--resume: {path} is damaged. Delete it and remove the option to start a new image")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, state["steps"] = dict(state["settings"]), int(state["steps"])
    except (OSError, *LOAD_ERRORS):
        raise damaged from None
    if differing := [f"{name} {saved.get(name)}, now {value}" for name, value in settings.items() if saved.get(name) != value]:
        raise UserError(f"--resume: {path} was saved with {differing[0]}. Use the same images and options")
    try:
        optimization.load_state_dict(state)
    except LOAD_ERRORS:
        raise damaged from None
