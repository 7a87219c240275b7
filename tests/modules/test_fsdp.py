"""FSDP2: training with sharded networks matches training with replicated networks."""

import json

import pytest
import torch

from callbacks.run.csv_logger import read_metrics_csv
from experiments.cli.main import main
from modules.autoencoder import Autoencoder
from modules.mask_rcnn import MaskRCNN
from modules.networks.weights import inference_state_dict, read_weights
from modules.progan import ProGAN
from modules.smp import SMPSegmenter
from modules.training.ema import EMA
from modules.training.fsdp import blocks, called_modules, count_weights
from modules.training.optimizers import soap
from modules.unet import UNet
from modules.vae import VAE
from tests.helpers.method_contract import assert_equal, checkpoint
from tests.helpers.subprocess_helpers import forked, refused, two_forked
from tests.tasks.generation import write_generative_recipe
from tests.tasks.reconstruction import write_reconstruction_recipe
from tests.tasks.segmentation import write_segmentation_recipe

DCGAN = {"channels": 1, "size": 28, "kernel": 4, "base_channels": 8, "total_images": 60}
MODELS = {
    "alternating": ("tests.helpers.deterministic_variants.DeterministicDCGAN", DCGAN, []),
    "EMA, clipping, gradient penalty, repeated updates": ("tests.helpers.wgan_gp.WGANGP", {"total_images": 60}, []),
    "gradient penalty in its own phase": ("tests.helpers.wgan_gp.LazyPenaltyGAN", {"total_images": 60}, []),
    "one loss, micro-batches": (
        "modules.vae.VAE",
        {"hidden_dims": [20], "latent_size": 3, "total_images": 60},
        ["--accumulate_grad_batches", "2"],
    ),
}


class SOAPVAE(VAE):
    """VAE with an optimizer that is not elementwise."""

    def configure_optimizers(self):
        return soap(self.parameters(), 1e-3)


class ScaledVAE(VAE):
    """VAE with a weight outside of its networks."""

    def __init__(self, total_images=60):
        super().__init__(hidden_dims=[20], latent_size=3, total_images=total_images)
        self.gain = torch.nn.Parameter(torch.ones(1))


class AveragedAutoencoder(Autoencoder):
    """Autoencoder that is validated with the average of its decoder."""

    def __init__(self, total_images: int = 60) -> None:
        super().__init__(1, 28, "fully-connected", (24,), 3, "relu", "noise", 0.2, total_images, learning_rate=1e-2)
        self.save_hyperparameters()
        self.average = EMA(self.decoder, half_life=16)

    def validation_step(self, batch, batch_idx):
        outputs = super().validation_step(batch, batch_idx)
        return {**outputs, "prediction": self.average(outputs["code"]).sigmoid()}

    test_step = validation_step


def fit_on_two_ranks(strategy, recipe, *overrides):
    """Train on two ranks, and return the exit status of rank 0 and the output."""
    argv = ["fit", str(recipe), "--trainer.devices", "2", "--trainer.strategy", strategy, *overrides]
    statuses, output = two_forked(main, argv)
    assert statuses[1] in (0, statuses[0]), output
    return statuses[0], output


@pytest.fixture
def write_tiny_recipe(workdir, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))

    def write(path, settings):
        writer = (
            write_reconstruction_recipe
            if path == "modules.vae.VAE" or path.startswith("tests.modules.test_fsdp")
            else write_generative_recipe
        )
        return writer(workdir / "tiny.yaml", {"class_path": path, "init_args": settings})

    return write


def assert_close(left, right, where):
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, msg=lambda text: f"{where}: {text}")
    else:
        assert left == right, where


def flatten(value, path):
    """Return the leaves of nested containers, by path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in items for name, leaf in flatten(item, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize(
    "name",
    [
        "EMA, clipping, gradient penalty, repeated updates",
        pytest.param("alternating", marks=pytest.mark.slow),
        pytest.param("gradient penalty in its own phase", marks=pytest.mark.slow),
        pytest.param("one loss, micro-batches", marks=pytest.mark.slow),
    ],
)
def test_fsdp2_matches_ddp_and_resumes_exactly(workdir, write_tiny_recipe, monkeypatch, name):
    path, settings, overrides = MODELS[name]
    recipe = write_tiny_recipe(path, settings)
    for strategy in ("ddp", "fsdp2"):
        status, output = fit_on_two_ranks(strategy, recipe, "--run", strategy, *overrides)
        assert status == 0, output
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@1")
    assert fit_on_two_ranks("fsdp2", recipe, "--run", "broken", *overrides)[0] == 85
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    status, output = fit_on_two_ranks("fsdp2", recipe, "--run", "broken", *overrides)
    assert status == 0, output

    ddp, fsdp2, resumed = (checkpoint(workdir, recipe, run) for run in ("ddp", "fsdp2", "broken"))
    for key in ("state_dict", "optimizer_states", "pending_losses"):
        assert_equal(fsdp2[key], resumed[key], key)
        ddp_leaves, fsdp2_leaves = flatten(dict(ddp[key]) if key == "state_dict" else ddp[key], key), flatten(fsdp2[key], key)
        assert ddp_leaves.keys() == fsdp2_leaves.keys()
        for leaf in ddp_leaves:
            assert_close(ddp_leaves[leaf], fsdp2_leaves[leaf], leaf)
    logs = [read_metrics_csv(workdir / "runs/tiny" / run / "metrics.csv") for run in ("fsdp2", "broken")]
    assert logs[0] == logs[1]
    records = [json.loads((workdir / f"runs/tiny/{run}/record.json").read_text()) for run in ("ddp", "fsdp2")]
    assert records[0]["metrics"].keys() == records[1]["metrics"].keys()
    for ddp_metrics, fsdp2_metrics in zip(records[0]["metrics"].values(), records[1]["metrics"].values(), strict=True):
        for protocol, value in ddp_metrics.items():
            assert value["mean"] == pytest.approx(fsdp2_metrics[protocol]["mean"], rel=1e-3), protocol


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (UNet, ["enc.3", "enc.4.0", "enc.4.2", "upsample.0", "dec.0", "head"]),
        (ProGAN, ["generator.blocks.0.0", "generator.blocks.1.3", "generator.blocks.4", "discriminator.blocks.5", "generator"]),
        (MaskRCNN, ["backbone.body.layer3", "backbone.body.layer4.1", "backbone.fpn", "rpn", "roi_heads.mask_head"]),
        (lambda: SMPSegmenter("unet", "resnet34", None), ["network.encoder.layer1", "network.decoder.blocks.1", "network"]),
    ],
    ids=["U-Net", "ProGAN", "Mask R-CNN", "smp"],
)
def test_networks_are_split_into_blocks_of_at_most_the_largest_layer(build, names):
    with torch.device("meta"):
        method = build()
    largest = max(count_weights(module.parameters(recurse=False)) for module in method.modules())
    name_of = {module: name for name, module in method.named_modules()}
    units = []
    for network in (network for child in method.children() for network in called_modules(child)):
        parts = list(blocks(network, largest))
        weights = [weight for part in parts for weight in part.parameters()]
        assert len(weights) == len(set(weights))
        assert all(count_weights(part.parameters()) <= largest for part in parts)
        total = count_weights(network.parameters())
        assert total <= largest or total - count_weights(weights) < 0.01 * total
        units += [*parts, network]
    assert {weight for unit in units for weight in unit.parameters()} == set(method.parameters())
    assert set(names) <= {name_of[unit] for unit in units}


def test_a_process_holds_half_of_the_state_and_gathers_two_blocks(workdir):
    """Of a U-Net, in bytes: 2 (9 c**2 + c) floats for the current and the next block, where c is its largest width."""
    settings = {"base_channels": 8, "depth": 2, "tile_size": 44}
    model = {"class_path": "modules.unet.UNet", "init_args": {**settings, "total_images": 8}}
    recipe = write_segmentation_recipe(workdir / "tiny.yaml", model, crop=28, margin=40, test=[])
    measured = {}
    for name, strategy, micro_batches in (("ddp", "ddp", "1"), ("fsdp2", "fsdp2", "1"), ("accumulated", "fsdp2", "2")):
        options = [
            "--trainer.callbacks+=tests.helpers.probe_callbacks.ReportsMemory",
            "--accumulate_grad_batches",
            micro_batches,
        ]
        status, output = fit_on_two_ranks(strategy, recipe, "--run", name, *options)
        assert status == 0, output
        lines = [line.removeprefix("memory ") for line in output.splitlines() if line.startswith("memory")]
        measured[name] = json.loads(lines[-1])
    weights, largest = 4 * count_weights(UNet(**settings).parameters()), 4 * (9 * 32**2 + 32)
    # Weights, gradients and momentum; nine blocks: three pairs of convolutions on the way down, the deepest of which is two
    # blocks, two transposed convolutions, two pairs on the way up, and the last layer.
    assert measured["ddp"] == {"held": 3 * weights, "full": 3 * weights, "peak": weights, "reductions": 0}
    assert measured["fsdp2"] == {
        **measured["ddp"],
        "held": 3 * weights // 2,
        "peak": measured["fsdp2"]["peak"],
        "reductions": 9,
    }
    assert measured["accumulated"] == measured["fsdp2"]
    assert largest < measured["fsdp2"]["peak"] <= 2 * largest < weights


@pytest.mark.slow
def test_commands_read_a_run_in_shards(workdir, write_tiny_recipe, capfd):
    recipe = write_tiny_recipe("modules.vae.VAE", {"hidden_dims": [20], "latent_size": 3, "total_images": 40})
    status, output = fit_on_two_ranks("fsdp2", recipe, "--run", "sharded")
    assert status == 0, output
    folder = workdir / "runs/tiny/sharded/checkpoints"
    (shards,) = folder.glob("best-*.shards")
    assert len(list(folder.glob("last-*.shards"))) == 1
    content = torch.load(folder / "best.ckpt", weights_only=True)
    parts = [torch.load(shards / f"{rank}.pt", weights_only=True)["state_dict"] for rank in range(2)]
    assert all(value.is_meta for value in content["state_dict"].values())
    for i, value in enumerate(content["state_dict"].values()):
        assert sum(part[i].numel() for part in parts) == value.numel()

    weights = checkpoint(workdir, recipe, "sharded", "best")["state_dict"]
    assert forked(main, ["export", str(recipe), "--run", "sharded", "--output", str(workdir / "w.safetensors")]) == 0
    assert_equal(read_weights(workdir / "w.safetensors"), dict(inference_state_dict(VAE, weights)))
    statuses, output = two_forked(main, ["test", str(recipe), "--run", "sharded"])  # with the strategy of the run
    assert statuses == [0, 0], output
    shards.rename(folder / "elsewhere")
    options = ["--run", "sharded", "--trainer.devices", "1"]
    assert f"{shards.name}, the folder of its shards, is missing" in refused(capfd, "test", str(recipe), *options)
    (folder / "elsewhere").rename(shards)
    (shards / "1.pt").rename(folder / "1.pt")
    assert f"{shards.name}, the folder of its shards, has no 1.pt" in refused(capfd, "test", str(recipe), *options)
    (folder / "1.pt").rename(shards / "1.pt")

    budget = ["--model.total_images", "60"]
    assert forked(main, ["fit", str(recipe), "--run", "sharded", *budget]) == 0  # on one process
    assert not list(folder.glob("*.shards"))
    assert forked(main, ["fit", str(recipe), "--run", "one", *budget]) == 0
    resumed, one = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("sharded", "one"))
    for key in one:
        assert_close(one[key], resumed[key], key)


def test_validation_with_averaged_weights_matches_ddp(workdir):
    """The passes of a validation precede the next step, which must not gather the average ahead and keep its old value."""
    model = {"class_path": "tests.modules.test_fsdp.AveragedAutoencoder", "init_args": {"total_images": 60}}
    metrics = [
        {"class_path": "callbacks.metrics.denoising.DenoisingPSNR", "init_args": {"tv_weights": [], "on_validation": True}}
    ]
    recipe = write_reconstruction_recipe(workdir / "tiny.yaml", model, metrics, binarization="real-valued", test=[])
    logs = []
    for strategy in ("ddp", "fsdp2"):
        status, output = fit_on_two_ranks(strategy, recipe, "--run", strategy)
        assert status == 0, output
        logs.append([float(row["value"]) for row in read_metrics_csv(workdir / "runs/tiny" / strategy / "metrics.csv")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_gradient_that_no_output_leads_to_raises_user_error(workdir, write_tiny_recipe):
    recipe = write_tiny_recipe("tests.helpers.wgan_gp.LazyPenaltyGAN", {"total_images": 60, "hidden_size": 0})
    status, output = fit_on_two_ranks("fsdp2", recipe, "--run", "refused")
    assert status == 2
    assert "darkroom: trainer.strategy: fsdp2 cannot average the gradient of '1.weight'" in output
    assert "Traceback" not in output


def test_initial_bias_is_set_in_the_shards(workdir, write_tiny_recipe):
    recipe = write_tiny_recipe("modules.vae.VAE", {"hidden_dims": [20], "latent_size": 3, "total_images": 20})
    bias = "--trainer.callbacks+=callbacks.run.init_output_bias.InitOutputBias"
    for strategy in ("ddp", "fsdp2"):
        status, output = fit_on_two_ranks(strategy, recipe, "--run", strategy, "--data.test", "[]", bias)
        assert status == 0, output
    ddp, fsdp2 = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("ddp", "fsdp2"))
    for key in ddp:
        assert_close(ddp[key], fsdp2[key], key)
    assert min(value.min() for key, value in fsdp2.items() if key.endswith("bias")) < -6  # the logit of black is -6.9


@pytest.mark.slow
def test_run_resumes_with_another_strategy(workdir, write_tiny_recipe):
    recipe = write_tiny_recipe("tests.helpers.deterministic_variants.DeterministicDCGAN", DCGAN)
    for first, second in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        assert fit_on_two_ranks(first, recipe, "--run", first, "--model.total_images", "40")[0] == 0
        status, output = fit_on_two_ranks(second, recipe, "--run", first)
        assert status == 0, output
    left, right = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("ddp", "fsdp2"))
    for key in left:
        assert_close(left[key], right[key], key)


@pytest.mark.slow
def test_each_rank_holds_a_shard(workdir, write_tiny_recipe):
    recipe = write_tiny_recipe("tests.helpers.deterministic_variants.DeterministicDCGAN", DCGAN)
    probe = "--trainer.callbacks+=tests.helpers.probe_callbacks.HoldsHalf"
    assert fit_on_two_ranks("fsdp2", recipe, "--run", "sharded", probe)[0] == 0
    status, output = fit_on_two_ranks("ddp", recipe, "--run", "full", probe)
    assert status == 1
    assert "of the weights and states are on this rank" in output


def test_fsdp1_raises_user_error(workdir, write_tiny_recipe, capfd):
    recipe = write_tiny_recipe("modules.gan.GAN", {"hidden_dim": 60})
    assert forked(main, ["fit", str(recipe), "--trainer.devices", "2", "--trainer.strategy", "fsdp"]) == 2
    assert "darkroom: trainer.strategy: fsdp cannot train" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("SOAPVAE", "cannot shard SOAP"), ("ScaledVAE", "ScaledVAE also has weights of its own")]
)
@pytest.mark.slow
def test_method_that_cannot_be_sharded_raises_user_error(workdir, write_tiny_recipe, name, message):
    recipe = write_tiny_recipe(f"tests.modules.test_fsdp.{name}", {"total_images": 60})
    status, output = fit_on_two_ranks("fsdp2", recipe, "--run", "refused")
    assert status == 2
    assert "darkroom: trainer.strategy: fsdp2" in output
    assert message in output
    assert "Traceback" not in output
