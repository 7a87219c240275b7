import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr

from datamodules.transforms.color import luma, rgb_to_ycbcr, ycbcr_to_rgb


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 17, 19), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_studio_swing_as_skimage_has_it(image):
    theirs = rgb2ycbcr(image.permute(1, 2, 0).numpy())
    ours = rgb_to_ycbcr(image.double() / 255).permute(1, 2, 0) * 255
    assert np.allclose(ours, theirs, atol=1e-3)
    assert np.array_equal(luma(image)[0], np.floor(theirs[..., 0] + 0.5))


def test_there_and_back(image):
    rgb = image.double() / 255
    assert torch.allclose(ycbcr_to_rgb(rgb_to_ycbcr(rgb)), rgb, atol=1e-12)


def test_grey_pictures(image):
    grey = image[:1]
    equal = grey.expand(3, -1, -1)
    assert torch.equal(luma(grey), grey)
    assert torch.equal(luma(equal, treat_equal_rgb_as_grey=True), grey)
    assert luma(equal).min() >= 16
    assert luma(equal).max() <= 235
