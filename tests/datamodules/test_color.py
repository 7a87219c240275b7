import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr

from datamodules.transforms.color import luma, rgb_to_ycbcr, ycbcr_to_rgb


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 17, 19), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_rgb_to_ycbcr_and_luma_match_skimage(image):
    expected = rgb2ycbcr(image.permute(1, 2, 0).numpy())
    actual = rgb_to_ycbcr(image.double() / 255).permute(1, 2, 0) * 255
    assert np.allclose(actual, expected, atol=1e-3)
    assert np.array_equal(luma(image)[0], np.floor(expected[..., 0] + 0.5))


def test_ycbcr_to_rgb_inverts_rgb_to_ycbcr(image):
    rgb = image.double() / 255
    assert torch.allclose(ycbcr_to_rgb(rgb_to_ycbcr(rgb)), rgb, atol=1e-12)


def test_luma_keeps_gray_images_and_limits_rgb_images_to_16_to_235(image):
    gray = image[:1]
    equal = gray.expand(3, -1, -1)
    assert torch.equal(luma(gray), gray)
    assert torch.equal(luma(equal, treat_equal_rgb_as_gray=True), gray)
    assert luma(equal).min() >= 16
    assert luma(equal).max() <= 235
