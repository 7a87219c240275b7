import pytest
import torch

from datamodules.errors import UserError
from modules.dcgan import DCGAN
from modules.training.phases import bind_phases, train_only
from tests.helpers.gpu_contract import DEVICE, ON_DEVICE, ON_TWO_DEVICES, losses
from tests.helpers.method_contract import fit
from tests.helpers.subprocess_helpers import forked, refused, two_forked
from tests.tasks.generation import GenerativeContract


class TestDCGAN(GenerativeContract):
    learns_slowly = True
    model = {"class_path": "modules.dcgan.DCGAN", "init_args": {"channels": 1, "size": 28, "kernel": 4, "base_channels": 8}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicDCGAN"
    # FID of the last validation; 8 seeds, AVX2: 0.17 ... 0.21
    training_overrides = [
        "--model.total_images",
        "12800",
        "--val_every_images",
        "3200",
        "--data.batch_size",
        "16",
        "--model.learning_rate",
        "2e-3",
    ]

    @pytest.mark.gpus2
    def test_synchronized_batch_normalization_equals_one_gpu(self, workdir, recipe):
        if DEVICE == "cpu":
            pytest.skip("torch synchronizes batch normalization on GPUs only")
        options = ["--trainer.precision", "64-true"]
        assert forked(fit, recipe, "--run", "one", *options, *ON_DEVICE) == 0
        parts = ["--trainer.sync_batchnorm", "true", *ON_TWO_DEVICES]
        statuses, output = two_forked(fit, recipe, "--run", "two", *options, *parts)
        assert statuses == [0, 0], output
        assert losses(workdir, recipe, "one") == pytest.approx(losses(workdir, recipe, "two"), rel=1e-5, abs=1e-7)

    def test_synchronized_batch_normalization_needs_gpus(self, workdir, recipe, capfd):
        error = refused(capfd, "fit", str(recipe), "--trainer.sync_batchnorm", "true")
        assert "trainer.sync_batchnorm: torch synchronizes batch normalization on GPUs only" in error

    def test_ranks_keep_equal_weights_with_local_batch_statistics(self, workdir, recipe):
        """During validation, the statistics are also equal. `tests.helpers.probe_callbacks.RanksAgree` checks both."""
        statuses, output = two_forked(fit, recipe, "--run", "two", "--trainer.devices", "2")
        assert statuses == [0, 0], output


@pytest.mark.parametrize(
    ("kernel", "width", "generator", "discriminator"),
    [(5, 128, 18_855_040, 17_232_768), (4, 64, 3_576_704, 2_765_568)],
    ids=["the paper's code", "dcgan.torch and pytorch/examples"],
)
def test_parameter_counts_match_the_original_code(kernel, width, generator, discriminator):
    method = DCGAN(3, 64, kernel, width)
    networks = (method.generator, method.discriminator)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [generator, discriminator]


@pytest.mark.parametrize("size", [28, 32, 64, 128])
@pytest.mark.parametrize("kernel", [4, 5])
def test_sample_and_discriminator_have_expected_shapes(size, kernel):
    method = DCGAN(1, size, kernel, 4).eval()
    images = method.sample(method.sample_latents(range(2)))
    assert images.shape == (2, 1, size, size)
    assert 0 <= images.min() <= images.max() <= 1
    assert method.discriminator(images).shape == (2, 1)


def test_invalid_size_raises_user_error():
    with pytest.raises(UserError, match=r"model\.size: 48"):
        DCGAN(1, 48)


def test_beta1_sets_both_optimizers_and_is_checked():
    assert {o.param_groups[0]["betas"] for o in DCGAN(size=32, base_channels=8, beta1=0.9).configure_optimizers()} == {
        (0.9, 0.999)
    }
    assert {o.param_groups[0]["betas"] for o in DCGAN(size=32, base_channels=8).configure_optimizers()} == {
        (0.5, 0.999)
    }  # Section 4
    with pytest.raises(UserError, match=r"model\.beta1: 1\.0"):
        DCGAN(beta1=1.0)


def test_initial_weights_match_the_paper():
    method = DCGAN(3, 64, 4, 64)
    kernels = torch.cat([p.flatten() for name, p in method.named_parameters() if p.ndim > 1])
    gains = torch.cat([p for name, p in method.named_parameters() if p.ndim == 1 and name.endswith("weight")])
    assert (kernels.mean().item(), kernels.std().item()) == pytest.approx((0, 0.02), abs=1e-4)
    assert (gains.mean().item(), gains.std().item()) == pytest.approx((1, 0.02), abs=2e-3)


def test_generator_phase_computes_no_discriminator_gradients():
    method = DCGAN(1, 28, 4, 4)
    phases = bind_phases(method.phases(), method.make_optimizers())
    fake = method.shared_forward({"sample_ids": range(2), "repeat_index": 0})
    with train_only(phases[1:], phases):
        sum(phases[1].phase.losses(fake).values()).backward()
    assert all(p.grad is None for p in method.discriminator.parameters())
    assert all(p.grad is not None for p in method.generator.parameters())
