import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules.transforms.resize import imresize
from tests.conftest import as_tensor

SET14 = "baboon barbara bridge coastguard comic face flowers foreman lenna man monarch pepper ppt3 zebra"
SETS = {"Set5": ["baby", "bird", "butterfly", "head", "woman"], "Set14": SET14.split(" ")}


@pytest.mark.parametrize("data_set", SETS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_uint8_mode_reproduces_every_published_value(real_data, data_set, scale):
    differing = 0
    for number, name in enumerate(SETS[data_set], 1):
        high = as_tensor(real_data / data_set / "HR" / f"{name}.png")
        low = as_tensor(real_data / data_set / "LR_bicubic" / f"X{scale}" / f"img_{number:03d}_SRF_{scale}_LR.png")
        height, width = (length - length % scale for length in high.shape[-2:])
        differing += int((imresize(high[:, :height, :width], (height // scale, width // scale)) != low).sum())
    assert differing == 0


def test_floating_point_mode_is_torchs_antialiased_bicubic_away_from_the_border():
    """torch renormalises at the border where MATLAB replicates it; inside, both use a = -0.5 when they antialias."""
    image = torch.rand(2, 1, 60, 90, dtype=torch.float64)
    theirs = F.interpolate(image, (20, 30), mode="bicubic", antialias=True)
    assert torch.allclose(imresize(image, (20, 30))[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-12)


def test_enlarging_is_pils_bicubic_away_from_the_border():
    image = torch.rand(20, 30)
    theirs = np.array(Image.fromarray(image.numpy(), mode="F").resize((90, 60), Image.Resampling.BICUBIC))
    ours = imresize(image[None], (60, 90))[0]
    assert torch.allclose(ours[6:-6, 6:-6], torch.from_numpy(theirs)[6:-6, 6:-6], atol=1e-5)


def test_a_constant_stays_and_a_border_is_replicated():
    assert torch.allclose(imresize(torch.full((1, 9, 9), 0.3), (3, 3)), torch.tensor(0.3))
    image = torch.rand(1, 12, 12, dtype=torch.float64)
    padded = F.pad(image[None], (12,) * 4, mode="replicate")[0]
    assert torch.allclose(imresize(image, (4, 4)), imresize(padded, (12, 12))[:, 4:8, 4:8], atol=1e-12)


def test_floating_point_is_neither_clipped_nor_rounded():
    edge = torch.zeros(1, 12, 12)
    edge[..., 6:] = 1
    low = imresize(edge, (4, 4))
    assert low.min() < 0
    assert low.max() > 1
