import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules.transforms.resize import imresize
from tests.conftest import as_tensor

SET14 = "baboon barbara bridge coastguard comic face flowers foreman lenna man monarch pepper ppt3 zebra"
SETS = {"Set5": ["baby", "bird", "butterfly", "head", "woman"], "Set14": SET14.split(" ")}


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_uint8_mode_reproduces_published_lr_images(real_data, dataset, scale):
    n_different = 0
    for index, name in enumerate(SETS[dataset], 1):
        hr = as_tensor(real_data / dataset / "HR" / f"{name}.png")
        lr = as_tensor(real_data / dataset / "LR_bicubic" / f"X{scale}" / f"img_{index:03d}_SRF_{scale}_LR.png")
        height, width = (length - length % scale for length in hr.shape[-2:])
        n_different += int((imresize(hr[:, :height, :width], (height // scale, width // scale)) != lr).sum())
    assert n_different == 0


def test_downscaling_matches_torch_antialiased_bicubic_in_the_interior():
    """At the border, torch renormalizes weights and MATLAB replicates pixels. Inside, both antialias with a = -0.5."""
    image = torch.rand(2, 1, 60, 90, dtype=torch.float64)
    expected = F.interpolate(image, (20, 30), mode="bicubic", antialias=True)
    assert torch.allclose(imresize(image, (20, 30))[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-12)


def test_upscaling_matches_pillow_bicubic_in_the_interior():
    image = torch.rand(20, 30)
    expected = np.array(Image.fromarray(image.numpy(), mode="F").resize((90, 60), Image.Resampling.BICUBIC))
    actual = imresize(image[None], (60, 90))[0]
    assert torch.allclose(actual[6:-6, 6:-6], torch.from_numpy(expected)[6:-6, 6:-6], atol=1e-5)


def test_constant_is_preserved_and_border_is_replicated():
    assert torch.allclose(imresize(torch.full((1, 9, 9), 0.3), (3, 3)), torch.tensor(0.3))
    image = torch.rand(1, 12, 12, dtype=torch.float64)
    padded = F.pad(image[None], (12,) * 4, mode="replicate")[0]
    assert torch.allclose(imresize(image, (4, 4)), imresize(padded, (12, 12))[:, 4:8, 4:8], atol=1e-12)


def test_autocast_does_not_change_the_result():
    image = torch.rand(1, 20, 24, generator=torch.Generator().manual_seed(0))
    expected = imresize(image, (30, 36))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(imresize(image, (30, 36)), expected)


def test_floating_point_images_are_neither_clipped_nor_rounded():
    edge = torch.zeros(1, 12, 12)
    edge[..., 6:] = 1
    lr = imresize(edge, (4, 4))
    assert lr.min() < 0
    assert lr.max() > 1
