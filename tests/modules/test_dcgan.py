import pytest
import torch

from datamodules.errors import UserError
from modules.dcgan import DCGAN
from modules.training.phases import ActivePhase, train_only
from tests.helpers.method_contract import GenerativeContract
from tests.helpers.subprocess_helpers import launched


class TestDCGAN(GenerativeContract):
    model = {"class_path": "modules.dcgan.DCGAN", "init_args": {"channels": 1, "size": 28, "kernel": 4, "base_channels": 8}}
    steady = "tests.helpers.deterministic_variants.SteadyDCGAN"
    learns = [
        "--model.total_images",
        "6400",
        "--val_every_images",
        "1600",
        "--data.batch_size",
        "16",
        "--model.learning_rate",
        "1e-3",
    ]
    nearer = 0.7

    def test_two_processes_with_statistics_of_their_own_have_the_same_weights(self, workplace, recipe):
        """And, in validations, the same statistics: `tests.helpers.probe_callbacks.RanksAgree` looks."""
        done = launched("fit", recipe, "--run", "two", "--trainer.devices", "2")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kernel", "width", "generator", "discriminator"),
    [(5, 128, 18_855_040, 17_232_768), (4, 64, 3_576_704, 2_765_568)],
    ids=["the paper's code", "dcgan.torch and pytorch/examples"],
)
def test_parameters_are_those_of_the_originals(kernel, width, generator, discriminator):
    method = DCGAN(3, 64, kernel, width)
    networks = (method.generator, method.discriminator)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [generator, discriminator]


@pytest.mark.parametrize("size", [28, 32, 64, 128])
@pytest.mark.parametrize("kernel", [4, 5])
def test_images_have_the_size_asked_for(size, kernel):
    method = DCGAN(1, size, kernel, 4).eval()
    images = method.sample(method.sample_latents(range(2)))
    assert images.shape == (2, 1, size, size)
    assert 0 <= images.min() <= images.max() <= 1
    assert method.discriminator(images).shape == (2, 1)


def test_another_size_is_refused():
    with pytest.raises(UserError, match=r"model\.size: 48; DCGAN makes images of 28, 32, 64, 128 pixels"):
        DCGAN(1, 48)


def test_beta1_is_that_of_both_optimizers_and_a_share():
    assert {o.param_groups[0]["betas"] for o in DCGAN(size=32, base_channels=8, beta1=0.9).configure_optimizers()} == {
        (0.9, 0.999)
    }
    assert {o.param_groups[0]["betas"] for o in DCGAN(size=32, base_channels=8).configure_optimizers()} == {
        (0.5, 0.999)
    }  # Section 4
    with pytest.raises(UserError, match=r"model\.beta1: 1\.0"):
        DCGAN(beta1=1.0)


def test_initial_weights_are_the_papers():
    method = DCGAN(3, 64, 4, 64)
    kernels = torch.cat([p.flatten() for name, p in method.named_parameters() if p.ndim > 1])
    gains = torch.cat([p for name, p in method.named_parameters() if p.ndim == 1 and name.endswith("weight")])
    assert (kernels.mean().item(), kernels.std().item()) == pytest.approx((0, 0.02), abs=1e-4)
    assert (gains.mean().item(), gains.std().item()) == pytest.approx((1, 0.02), abs=2e-3)


def test_the_discriminators_gradients_are_not_computed_for_the_generator():
    method = DCGAN(1, 28, 4, 4)
    active_phases = [ActivePhase(phase, phase.optimizer(phase.parameters)) for phase in method.phases()]
    fake = method.shared_forward({"positions": range(2), "repetition": 0})
    with train_only(active_phases[1:], active_phases):
        sum(active_phases[1].phase.losses(fake).values()).backward()
    assert all(p.grad is None for p in method.discriminator.parameters())
    assert all(p.grad is not None for p in method.generator.parameters())
