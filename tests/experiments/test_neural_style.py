"""Style transfer and DeepDream by optimization."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.catalog.catalog import resolve_images
from experiments import ROOT
from experiments.cli.main import main
from experiments.run.neural_style import load_features, read_content
from modules.losses.perceptual import PerceptualObjective
from modules.neural_style import LAYERS, StyleOptimization, dream
from modules.style_transfer import read_style
from tests.helpers.subprocess_helpers import forked

WAVE = str(ROOT / "experiments/methods/style/styles/wave.jpg")
NETWORK = "vgg19-distilled"


@pytest.fixture
def photo():
    return str(resolve_images("photographs/test")[0])


def optimization(optimizer, content, style):
    content_layer, style_layers = LAYERS[NETWORK]
    features = load_features(NETWORK, None, [content_layer, *style_layers], "max")
    objective = PerceptualObjective(features, content_layer, style_layers, 1.0, 0.05, 1e-4, "sum")
    return StyleOptimization(objective, content, style, content, optimizer)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_optimization_lowers_the_objective_and_resumes_exactly(optimizer, photo, tmp_path):
    content, style = read_content(Path(photo), 64), read_style(Path(WAVE), 64)
    full, broken = (optimization(optimizer, content, style) for _ in range(2))
    values, resumed_values = [], []
    for _ in range(3):
        assert full.run(4, lambda step, value: values.append((step, value)))
    assert [step for step, _ in values] == list(range(1, 13))
    assert values[-1][1] < full.value_and_gradient(content)[0]
    assert 0 <= full.image.min() <= full.image.max() <= 1
    broken.run(4, lambda step, value: None)
    torch.save(broken.state_dict(), tmp_path / "state")
    resumed = optimization(optimizer, content, style)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for _ in range(2):
        resumed.run(4, lambda step, value: resumed_values.append((step, value)))
    assert resumed_values == values[4:]
    assert torch.equal(resumed.image, full.image)


def test_lbfgs_stops_where_the_objective_is_minimal():
    """Without a style, the photograph is the minimum; the gradient is zero."""
    content, style = torch.rand(2, 1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    start = optimization("lbfgs", content, style)
    start.objective = replace(start.objective, style_weight=0.0, tv_weight=0.0)
    assert not start.run(5, lambda step, value: None)
    assert torch.equal(start.image, content)


def test_command_writes_intermediate_images_and_resumes(workdir, photo, capfd):
    argv = ["neural-style", photo, WAVE, "--size", "64", "--save-every", "2", "--output"]
    assert forked(main, [*argv, "full.png", "--steps", "4"]) == 0
    assert forked(main, [*argv, "broken.png", "--steps", "2"]) == 0
    assert forked(main, [*argv, "broken.png", "--steps", "4", "--resume"]) == 0
    assert {path.name for path in workdir.glob("full*")} == {"full.png", "full-00002.png", "full.state"}
    full, broken = (np.asarray(Image.open(workdir / name)) for name in ("full.png", "broken.png"))
    assert max(full.shape) == 64
    assert (full == broken).all()
    assert forked(main, [*argv, "broken.png", "--optimizer", "adam", "--resume"]) == 2
    assert "was saved with --optimizer lbfgs, now adam. Use the same" in capfd.readouterr().err
    assert forked(main, ["neural-style", photo, photo, *argv[3:], "broken.png", "--resume"]) == 2
    assert "was saved with style " in capfd.readouterr().err
    for options, reason in (
        (["--init", "noise", "--resume"], "was saved with --init content, now noise"),
        (["--steps", "3", "--resume"], "--steps: broken.state has 4 steps already"),
        ([], "--output: broken.state exists. Use --resume to continue it"),
    ):
        assert forked(main, [*argv, "broken.png", *options]) == 2
        assert reason in capfd.readouterr().err
    state = torch.load("broken.state", weights_only=True)
    for name, content in (("settings", 3), ("steps", "many"), ("image", "none")):
        torch.save({**state, name: content}, name)
    for content in (b"hello", b"", *(Path(name).read_bytes() for name in ("settings", "steps", "image"))):
        Path("broken.state").write_bytes(content)
        assert forked(main, [*argv, "broken.png", "--resume"]) == 2
        assert "--resume: broken.state is damaged" in capfd.readouterr().err


def test_dream_without_steps_is_the_image_and_steps_amplify_the_layer():
    features = load_features(NETWORK, None, ["relu3_1"], "max")
    image = torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    assert not list(dream(features, "relu3_1", image, octaves=2, steps=0))
    results = list(dream(features, "relu3_1", image, octaves=2, steps=5))
    assert [result[:2] for result in results] == [(octave, step) for octave in (0, 1) for step in range(1, 6)]
    values = [result[2] for result in results]
    assert values[4] > values[0]
    assert values[9] > values[5]
    assert results[-1][3].shape == image.shape


def test_deepdream_command_writes_each_octave(workdir, photo):
    assert forked(main, ["deepdream", photo, "--size", "96", "--octaves", "2", "--steps", "2", "--output", "d.png"]) == 0
    assert {path.name for path in workdir.glob("*.png")} == {"d.png", "d-octave1.png"}
    assert max(Image.open(workdir / "d.png").size) == 96


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["none.jpg", WAVE], "none.jpg: no such file"),
        ([WAVE, "none.jpg"], "none.jpg: no such file"),
        ([WAVE, WAVE, "--output", "a.jpg"], "--output: a.jpg must end in .png"),
        (
            [WAVE, WAVE, "--network", "vgg19", "--weights", "other.pth"],
            "other.pth does not contain the weights of FeatureNetwork",
        ),
        ([WAVE, WAVE, "--network", "vgg19", "--weights", "text.pth"], "text.pth cannot be read as weights"),
        ([WAVE, WAVE, "--resume"], "--resume: no file"),
        ([WAVE, WAVE, "--steps", "1000000000"], "--steps 1000000000: must be at most 1000000"),
        ([WAVE, WAVE, "--steps", "0"], "--steps 0: must be at least 1"),
        ([WAVE, WAVE, "--style-weight", "nan"], "--style-weight nan: must be at least 0"),
        ([WAVE, WAVE, "--tv-weight", "inf"], "--tv-weight inf: must be at least 0, and finite"),
        ([WAVE, WAVE, "--size", "40"], "--size: 40 is too small"),
        ([WAVE, WAVE, "--size", "1000000"], "--size 1000000: must be at most 16384"),
        ([WAVE, WAVE, "--seed", "-1"], "--seed -1: must be at least 0"),
        ([WAVE, WAVE, "--size", "64", "--style-weight", "1e39"], "the objective is not finite"),
        (["a.png", WAVE, "--output", "a.png"], "--output: a.png is the input"),
        (["a-00001.png", WAVE, "--output", "a.png", "--save-every", "1"], "--output: a-00001.png is the input"),
        ([WAVE, WAVE, "--output", "folder.png"], "--output: folder.png is a folder"),
        ([WAVE, "--style", WAVE], "unknown argument --style"),
    ],
)
def test_unusable_input_is_one_line(workdir, capfd, arguments, reason):
    torch.save({"features.0.weight": torch.zeros(3)}, workdir / "other.pth")
    Path("text.pth").write_text("hello")
    Path("folder.png").mkdir()
    assert forked(main, ["neural-style", *arguments]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert reason in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a.png", "--output", "a.png"], "--output: a.png is the input"),
        (["a.png", "--size", "64", "--octaves", "9"], "--octaves: the smallest of 9 octaves has 3 pixels on a side"),
        (["a-octave1.png", "--output", "a.png"], "--output: a-octave1.png is the input"),
        (["a.png", "--layer", "relu5_1"], "vgg19-distilled has no layer relu5_1. Use relu1_1 ... relu4_1"),
    ],
)
def test_unusable_input_of_deepdream_is_one_line(workdir, capfd, arguments, reason):
    Image.new("RGB", (64, 48)).save("a.png")
    assert forked(main, ["deepdream", *arguments]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert reason in error
