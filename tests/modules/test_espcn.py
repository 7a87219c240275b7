import importlib

import pytest
import torch

from datamodules.errors import UserError
from modules.espcn import ESPCN
from modules.tasks.superresolution import predict_in_strips
from tests.tasks.superresolution import SuperResolutionContract


class TestESPCN(SuperResolutionContract):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicESPCN"
    training_overrides = ["--model.total_images", "1600", "--val_every_images", "400", "--model.warmup", "160"]
    min_psnr_gain_db = 2  # 8 seeds, AVX-512: 6.0 ... 9.7; untrained: 0


@pytest.mark.parametrize(("scale", "parameters"), [(2, 21_284), (3, 22_729), (4, 24_752)])
def test_parameter_counts_match_the_paper(scale, parameters):
    assert sum(p.numel() for p in ESPCN(scale).parameters()) == parameters


def test_pixel_shuffle_matches_equation_4():
    """PS(T)[x, y, c] = T[x // r, y // r, C r mod(y, r) + C mod(x, r) + c], up to torch's order of channels (c, y, x)."""
    r = 3
    maps = torch.rand(1, r * r, 4, 5)
    shuffled = ESPCN(r).network[-1](maps)
    for y in range(4 * r):
        for x in range(5 * r):
            assert shuffled[0, 0, y, x] == maps[0, r * (y % r) + x % r, y // r, x // r]


def test_tanh_and_relu_differ_only_in_the_activation():
    layer_types = [[type(layer).__name__ for layer in ESPCN(3, activation).network] for activation in ("tanh", "relu")]
    assert layer_types[0] == ["Conv2d", "Tanh", "Conv2d", "Tanh", "Conv2d", "PixelShuffle"]
    assert layer_types[1] == [name.replace("Tanh", "ReLU") for name in layer_types[0]]


def test_forward_valid_equals_the_interior_of_forward():
    network, lr_image = ESPCN(3), torch.rand(2, 1, 20, 21)
    assert torch.allclose(network.forward_valid(lr_image), network(lr_image)[..., 12:-12, 12:-12], atol=1e-6)


def test_predict_in_strips_equals_forward():
    network, lr_image = ESPCN(3), torch.rand(1, 1, 70, 31)
    with torch.no_grad():
        assert torch.allclose(predict_in_strips(network, lr_image, 3, pixels=9 * 31 * 13), network(lr_image), atol=1e-6)


def test_schedule_is_a_function_of_images_seen():
    network = ESPCN(total_images=1000, learning_rate=2e-3, warmup=100)
    assert network.schedule(0) == pytest.approx(2e-5)
    assert network.schedule(100) == pytest.approx(2e-3)
    assert network.schedule(550) == pytest.approx(1e-3)
    assert network.schedule(1000) == pytest.approx(0)


@pytest.mark.parametrize(("model", "smallest"), [("espcn.ESPCN", 9), ("srcnn.SRCNN", 9)], ids=["espcn", "srcnn"])
def test_patches_smaller_than_the_receptive_field_are_refused(model, smallest):
    module, name = model.split(".")
    method = getattr(importlib.import_module(f"modules.{module}"), name)(scale=3)
    batch = {"input": torch.rand(1, 1, smallest, smallest), "target": torch.rand(1, 1, 3 * smallest, 3 * smallest)}
    assert method.losses(batch)["mse"].isfinite()
    smaller = {"input": batch["input"][..., 1:], "target": batch["target"][..., 3:]}
    with pytest.raises(UserError, match=rf"data\.patch_size: {smallest - 1}.*at least {smallest}"):
        method.losses(smaller)
