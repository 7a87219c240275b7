import pytest
import torch

from datamodules.errors import UserError
from modules.gan import GAN, Maxout
from tests.helpers.method_contract import GenerativeContract


class TestGAN(GenerativeContract):
    model = {"class_path": "modules.gan.GAN", "init_args": {"hidden_dim": 60}}
    steady = "tests.helpers.deterministic_variants.SteadyGAN"
    learns = ["--model.total_images", "24000", "--val_every_images", "6000", "--data.batch_size", "20"]
    nearer = 0.7


def test_networks_are_those_of_the_papers_code():
    """100-1200-1200-784, and 784-240-240-1 in maxout units of five pieces."""
    method = GAN()
    generator = 100 * 1200 + 1200 + 1200 * 1200 + 1200 + 1200 * 784 + 784
    discriminator = 784 * 1200 + 1200 + 240 * 1200 + 1200 + 240 + 1
    networks = (method.generator, method.discriminator)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [generator, discriminator]
    assert all(p.abs().max() <= 0.05 for p in method.generator.parameters())
    assert all(p.abs().max() <= 0.005 for p in method.discriminator.parameters())


def test_a_maxout_unit_is_the_largest_of_its_five_pieces():
    layer, inputs = Maxout(3, 2), torch.rand(4, 3)
    pieces = inputs @ layer.linear.weight.T + layer.linear.bias  # (4, 10)
    for unit in range(2):
        assert torch.equal(layer(inputs)[:, unit], pieces[:, 5 * unit : 5 * unit + 5].max(1).values)


def test_the_descent_is_that_of_the_papers_code():
    rate = 0.1
    for _ in range(1000):  # batches of 100
        rate /= 1.000004
    assert GAN().sgd_schedule(100_000) == pytest.approx({"lr": rate, "momentum": 0.5 + 0.2 * 2 / 250})
    assert GAN().sgd_schedule(10**12) == {"lr": 1e-6, "momentum": 0.7}


def test_where_the_discriminator_is_sure_only_the_non_saturating_loss_is_steep():
    slopes = {}
    for loss in ("saturating", "non-saturating"):
        method = GAN(hidden_dim=10, loss=loss)
        method.discriminator = torch.nn.Flatten()
        logits = torch.full((1, 1), -12.0, requires_grad=True)
        method.generator_losses({"fake": logits})["adversarial"].backward()
        slopes[loss] = logits.grad.item()
    assert slopes["non-saturating"] == pytest.approx(-1, abs=1e-4)  # -(1 - D)
    assert slopes["saturating"] == pytest.approx(-torch.sigmoid(torch.tensor(-12.0)).item())  # -D


def test_k_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"model\.discriminator_steps: 0; the discriminator needs 1 at least"):
        GAN(hidden_dim=10, discriminator_steps=0)
