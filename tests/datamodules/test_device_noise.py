"""Noise that a device computes: the words of numpy, and the values of the CPU up to rounding errors."""

import numpy as np
import pytest
import torch

from datamodules.random import device_noise
from datamodules.random.noise import NOISE_SAMPLERS
from datamodules.random.philox import random_words
from tests.helpers.gpu_contract import DEVICE

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu, id="gpu")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**40 + 7])
def test_words_are_those_of_numpy(start, device):
    words = device_noise.device_words(3, "crop", start, 1000, torch.device(device))
    assert (words.cpu().numpy().view(np.uint64) == random_words(3, "crop", start, 1000)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 7, 8, 33])
@pytest.mark.parametrize("kind", NOISE_SAMPLERS)
def test_noise_differs_by_rounding_errors(kind, size, device):
    expected = NOISE_SAMPLERS[kind](1, "latent", range(7, 507), size)
    found = device_noise.DEVICE_SAMPLERS[kind](1, "latent", range(7, 507), size, torch.device(device)).cpu()
    assert found.numpy().dtype == expected.dtype
    tolerance = {"normal": 1e-12, "fast-normal": 1e-4, "uniform": 0}[kind]  # of float32: the angle is up to 2 pi
    assert np.abs(found.numpy() - expected).max() <= tolerance


@pytest.mark.parametrize("kind", NOISE_SAMPLERS)
def test_large_noise_is_computed_on_the_device(kind, monkeypatch):
    """Tensors of the device meta have no values: a copy of the noise from the CPU, or reading a value, raises an error."""
    monkeypatch.setattr(device_noise, "NOISE_SAMPLERS", {})
    size = device_noise.MIN_SIZE
    noise = device_noise.noise_on_device(kind, 0, "latent", range(4), size, torch.device("meta"), torch.float32)
    assert (noise.shape, noise.dtype, noise.device.type) == ((4, size), torch.float32, "meta")
    with pytest.raises(KeyError):  # small noise comes from the CPU
        device_noise.noise_on_device(kind, 0, "latent", range(4), size - 1, torch.device("meta"), torch.float32)
