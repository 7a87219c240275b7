"""Masks made visible, and written for users."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from callbacks.visualization.overlays import BLUE, COLORS, RED, VIOLET, comparison_row, error_overlay, overlay
from experiments.cli.main import main
from modules.unet import UNet
from tests.helpers.subprocess_helpers import forked


def test_class_0_and_ignored_pixels_keep_the_picture():
    image, mask = torch.rand(1, 2, 3), torch.tensor([[0, 1, 255], [0, 2, 13]])
    shown = overlay(image, mask, strength=1.0)
    for place in ((0, 0), (0, 2), (1, 0)):
        assert torch.equal(shown[:, *place], image[:, *place].expand(3))
    assert torch.equal(shown[:, 0, 1], COLORS[0])
    assert torch.equal(shown[:, 1, 1], COLORS[1])
    assert torch.equal(shown[:, 1, 2], COLORS[12 % len(COLORS)])


def test_mistakes_have_the_colour_of_their_kind():
    prediction, mask = torch.tensor([[1, 0, 2, 1, 1]]), torch.tensor([[0, 1, 1, 1, 255]])
    shown = error_overlay(torch.zeros(3, 1, 5), prediction, mask)
    for place, colour in enumerate((RED, BLUE, VIOLET)):
        assert torch.equal(shown[:, 0, place], colour)
    assert torch.equal(shown[:, 0, 3:], torch.full((3, 2), 0.5))
    assert comparison_row(torch.zeros(1, 4, 5), mask.new_zeros(4, 5), mask.new_zeros(4, 5)).shape == (1, 3, 4, 32)


@pytest.fixture
def weights(workplace):
    torch.manual_seed(0)
    values = UNet(base_channels=8, depth=3, tile_size=132).state_dict()
    save_file({name: value.contiguous() for name, value in values.items()}, workplace / "unet.safetensors")
    return workplace / "unet.safetensors"


def test_predict_writes_masks_and_overlays_of_whatever_users_bring(workplace, weights, capfd):
    """Any size and mode; the mask is that of the network on the whole picture."""
    (workplace / "in/deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (150, 201, 3), np.uint8)).save(workplace / "in/colour.jpg")
    Image.fromarray(generator.integers(0, 255, (7, 3), np.uint8)).save(workplace / "in/deep/tiny.png")
    Image.fromarray(generator.integers(0, 65535, (40, 40), np.uint16)).save(workplace / "in/sixteen.tif")
    words = ["predict", "unet/demo", "--input", "in", "--output", "out", "--ckpt", str(weights)]
    assert forked(main, words) == 0
    for name, size in {"colour": (201, 150), "deep/tiny": (3, 7), "sixteen": (40, 40)}.items():
        mask, shown = Image.open(workplace / f"out/{name}.png"), Image.open(workplace / f"out/overlays/{name}.png")
        assert (mask.mode, mask.size, shown.mode, shown.size) == ("L", size, "RGB", size)
        assert set(np.unique(mask)) <= {0, 1}
    method = UNet(base_channels=8, depth=3, tile_size=132).eval()
    method.load_state_dict(load_file(weights))
    grey = (
        torch.from_numpy(np.asarray(Image.open(workplace / "in/sixteen.tif")) / 257).add(0.5).floor().float()[None, None] / 255
    )
    expected = method.probabilities(grey).argmax(1)[0].byte().numpy()
    assert (np.asarray(Image.open(workplace / "out/sixteen.png")) == expected).mean() > 0.999
    assert re.search(r"colour\.jpg  201x150  ->  out/colour\.png", capfd.readouterr().out)


def test_what_takes_no_pictures_says_so(workplace, capfd):
    Image.new("L", (9, 9)).save(workplace / "a.png")
    save_file({}, workplace / "none.safetensors")
    assert forked(main, ["predict", "gan/demo", "--input", "a.png", "--ckpt", "none.safetensors"]) == 2
    assert "gan/demo takes no pictures; darkroom sample shows what it makes" in capfd.readouterr().err


@pytest.mark.slow
def test_a_picture_of_4096_pixels_is_segmented_in_bounded_memory(workplace, weights, capfd):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4096, 4096), np.uint8)).save(workplace / "big.png")
    assert forked(peak, workplace, weights) == 0
    assert int((workplace / "peak.txt").read_text()) < 3000  # MiB


def peak(workplace, weights):
    import resource

    words = ["predict", "unet/demo", "--input", "big.png", "--output", "out", "--ckpt", str(weights)]
    status = main(words)
    (workplace / "peak.txt").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
    return status
