import pytest
import torch

from modules.espcn import ESPCN
from modules.tasks.superresolution import predict_in_strips
from tests.helpers.method_contract import SuperResolutionContract


class TestESPCN(SuperResolutionContract):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3}}
    steady = "tests.helpers.deterministic_variants.SteadyESPCN"
    learns = ["--model.total_images", "1600", "--val_every_images", "400", "--model.warmup", "160"]
    gain = 0.5


@pytest.mark.parametrize(("scale", "parameters"), [(2, 21_284), (3, 22_729), (4, 24_752)])
def test_parameters_are_the_papers(scale, parameters):
    assert sum(p.numel() for p in ESPCN(scale).parameters()) == parameters


def test_periodic_shuffling_is_equation_4():
    """PS(T)[x, y, c] = T[x // r, y // r, C r mod(y, r) + C mod(x, r) + c], up to torch's order of channels (c, y, x)."""
    r = 3
    maps = torch.rand(1, r * r, 4, 5)
    shuffled = ESPCN(r).network[-1](maps)
    for y in range(4 * r):
        for x in range(5 * r):
            assert shuffled[0, 0, y, x] == maps[0, r * (y % r) + x % r, y // r, x // r]


def test_tanh_and_relu_differ_only_in_the_activation():
    kinds = [[type(layer).__name__ for layer in ESPCN(3, activation).network] for activation in ("tanh", "relu")]
    assert kinds[0] == ["Conv2d", "Tanh", "Conv2d", "Tanh", "Conv2d", "PixelShuffle"]
    assert kinds[1] == [name.replace("Tanh", "ReLU") for name in kinds[0]]


def test_unpadded_network_is_the_inside_of_the_padded_one():
    network, low = ESPCN(3), torch.rand(2, 1, 20, 21)
    assert torch.allclose(network.forward_valid(low), network(low)[..., 12:-12, 12:-12], atol=1e-6)


def test_bands_equal_the_whole():
    network, low = ESPCN(3), torch.rand(1, 1, 70, 31)
    with torch.no_grad():
        assert torch.allclose(predict_in_strips(network, low, 3, pixels=31 * 13), network(low), atol=1e-6)


def test_schedule_counts_images():
    network = ESPCN(total_images=1000, learning_rate=2e-3, warmup=100)
    assert network.schedule(0) == pytest.approx(2e-5)
    assert network.schedule(100) == pytest.approx(2e-3)
    assert network.schedule(550) == pytest.approx(1e-3)
    assert network.schedule(1000) == pytest.approx(0)
