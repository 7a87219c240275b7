import pytest
import torch

from datamodules.errors import UserError
from modules.gan import GAN, Maxout
from tests.tasks.generation import GenerativeContract


class TestGAN(GenerativeContract):
    learns_slowly = True
    model = {"class_path": "modules.gan.GAN", "init_args": {"hidden_dim": 60}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicGAN"
    # FID of the last validation; 8 seeds, AVX-512: 0.47 ... 0.79; 4 seeds, AVX2: 0.45 ... 0.73
    training_overrides = [
        "--model.hidden_dim",
        "400",
        "--model.total_images",
        "32000",
        "--val_every_images",
        "8000",
        "--data.batch_size",
        "20",
        "--model.learning_rate",
        "0.2",
        "--trainer.log_every_n_steps",
        "100",
    ]


def test_networks_match_the_code_of_the_paper():
    """Layer sizes: 100-1200-1200-784, and 784-240-240-1 with maxout units of five pieces."""
    method = GAN()
    generator = 100 * 1200 + 1200 + 1200 * 1200 + 1200 + 1200 * 784 + 784
    discriminator = 784 * 1200 + 1200 + 240 * 1200 + 1200 + 240 + 1
    networks = (method.generator, method.discriminator)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [generator, discriminator]
    assert all(p.abs().max() <= 0.05 for p in method.generator.parameters())
    assert all(p.abs().max() <= 0.005 for p in method.discriminator.parameters())


def test_maxout_is_the_maximum_of_five_pieces():
    layer, inputs = Maxout(3, 2), torch.rand(4, 3)
    pieces = inputs @ layer.linear.weight.T + layer.linear.bias  # (4, 10)
    for unit in range(2):
        assert torch.equal(layer(inputs)[:, unit], pieces[:, 5 * unit : 5 * unit + 5].max(1).values)


def test_sgd_schedule_matches_the_code_of_the_paper():
    lr = 0.1
    for _ in range(1000):  # batches of 100
        lr /= 1.000004
    assert GAN().sgd_schedule(100_000) == pytest.approx({"lr": lr, "momentum": 0.5 + 0.2 * 2 / 250})
    assert GAN().sgd_schedule(10**12) == {"lr": 1e-6, "momentum": 0.7}


def test_generator_losses_have_the_expected_gradients():
    grads = {}
    for loss in ("saturating", "non-saturating"):
        method = GAN(hidden_dim=10, loss=loss)
        method.discriminator = torch.nn.Flatten()
        logits = torch.full((1, 1), -12.0, requires_grad=True)
        method.generator_losses({"fake": logits})["adversarial"].backward()
        grads[loss] = logits.grad.item()
    assert grads["non-saturating"] == pytest.approx(-1, abs=1e-4)  # -(1 - D)
    assert grads["saturating"] == pytest.approx(-torch.sigmoid(torch.tensor(-12.0)).item())  # -D


def test_invalid_discriminator_steps_raises_user_error():
    with pytest.raises(UserError, match=r"model\.discriminator_steps: 0"):
        GAN(hidden_dim=10, discriminator_steps=0)
