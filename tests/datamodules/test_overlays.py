"""Mask overlays, and masks written by `darkroom predict`."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from datamodules.transforms.overlays import BLUE, COLORS, RED, VIOLET, comparison_row, error_overlay, overlay
from experiments.cli.main import main
from modules.unet import UNet
from tests.helpers.subprocess_helpers import forked


def test_overlay_leaves_class_0_and_ignored_pixels_unchanged():
    image, mask = torch.rand(1, 2, 3), torch.tensor([[0, 1, 255], [0, 2, 13]])
    overlaid = overlay(image, mask, strength=1.0)
    for position in ((0, 0), (0, 2), (1, 0)):
        assert torch.equal(overlaid[:, *position], image[:, *position].expand(3))
    assert torch.equal(overlaid[:, 0, 1], COLORS[0])
    assert torch.equal(overlaid[:, 1, 1], COLORS[1])
    assert torch.equal(overlaid[:, 1, 2], COLORS[12 % len(COLORS)])


def test_error_overlay_colors_each_kind_of_error():
    prediction, mask = torch.tensor([[1, 0, 2, 1, 1]]), torch.tensor([[0, 1, 1, 1, 255]])
    overlaid = error_overlay(torch.zeros(3, 1, 5), prediction, mask)
    for position, color in enumerate((RED, BLUE, VIOLET)):
        assert torch.equal(overlaid[:, 0, position], color)
    assert torch.equal(overlaid[:, 0, 3:], torch.full((3, 2), 0.5))
    assert comparison_row(torch.zeros(1, 4, 5), mask.new_zeros(4, 5), mask.new_zeros(4, 5)).shape == (1, 3, 4, 32)


@pytest.fixture
def weights(workdir):
    torch.manual_seed(0)
    state_dict = UNet(base_channels=8, depth=3, tile_size=132).state_dict()
    save_file({name: value.contiguous() for name, value in state_dict.items()}, workdir / "unet.safetensors")
    return workdir / "unet.safetensors"


def test_predict_writes_masks_and_overlays_for_any_size_and_mode(workdir, weights, capfd):
    """The mask equals the network's prediction for the full image."""
    (workdir / "in/deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (150, 201, 3), np.uint8)).save(workdir / "in/color.jpg")
    Image.fromarray(generator.integers(0, 255, (7, 3), np.uint8)).save(workdir / "in/deep/tiny.png")
    Image.fromarray(generator.integers(0, 65535, (40, 40), np.uint16)).save(workdir / "in/sixteen.tif")
    arguments = ["predict", "unet/demo", "--input", "in", "--output", "out", "--ckpt", str(weights)]
    assert forked(main, arguments) == 0
    for name, size in {"color": (201, 150), "deep/tiny": (3, 7), "sixteen": (40, 40)}.items():
        mask, overlaid = Image.open(workdir / f"out/{name}.png"), Image.open(workdir / f"out/overlays/{name}.png")
        assert (mask.mode, mask.size, overlaid.mode, overlaid.size) == ("L", size, "RGB", size)
        assert set(np.unique(mask)) <= {0, 1}
    method = UNet(base_channels=8, depth=3, tile_size=132).eval()
    method.load_state_dict(load_file(weights))
    gray = torch.from_numpy(np.asarray(Image.open(workdir / "in/sixteen.tif")) / 257).add(0.5).floor().float()[None, None] / 255
    expected = method.probabilities(gray).argmax(1)[0].byte().numpy()
    assert (np.asarray(Image.open(workdir / "out/sixteen.png")) == expected).mean() > 0.999
    assert re.search(r"color\.jpg  201x150  ->  out/color\.png", capfd.readouterr().out)


def test_predict_with_a_generative_model_reports_an_error(workdir, capfd):
    Image.new("L", (9, 9)).save(workdir / "a.png")
    save_file({}, workdir / "none.safetensors")
    assert forked(main, ["predict", "gan/demo", "--input", "a.png", "--ckpt", "none.safetensors"]) == 2
    assert "gan/demo takes no images" in capfd.readouterr().err


@pytest.mark.slow
def test_4096_pixel_image_is_segmented_in_bounded_memory(workdir, weights, capfd):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4096, 4096), np.uint8)).save(workdir / "big.png")
    assert forked(predict_and_write_peak_memory, workdir, weights) == 0
    assert int((workdir / "peak.txt").read_text()) < 3000  # MiB


def predict_and_write_peak_memory(workdir, weights):
    import resource

    arguments = ["predict", "unet/demo", "--input", "big.png", "--output", "out", "--ckpt", str(weights)]
    status = main(arguments)
    (workdir / "peak.txt").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
    return status
