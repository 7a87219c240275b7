"""Settings of CUDA that can be tested without a GPU, and tests on a GPU that belong to no method."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.errors import UserError
from experiments import METHODS
from experiments.cli.main import main
from experiments.run import gpu
from experiments.run.gpu import check_gpu
from experiments.run.recipes import find_recipe
from modules.losses.precision import full_precision
from modules.training.optimizers import kernels, soap
from tests.helpers.gpu_contract import DEVICE, ON_DEVICE
from tests.helpers.subprocess_helpers import forked
from tests.tasks.superresolution import write_recipe


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def fit_and_compare_flags(argv, expected):
    assert main(argv) == 0
    assert flags() == expected
    with full_precision():
        assert flags() == (False, False)
    assert flags() == expected


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_tf32_only_on_request(workdir, photos, capfd, tf32):
    """The option is part of the run's configuration; another value on resuming is named."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = str(write_recipe(workdir / "tiny.yaml", photos, model))
    argv = ["fit", recipe, "--run", "one", "--data.test", "[]"]
    assert forked(fit_and_compare_flags, [*argv, *(["--tf32", "true"] if tf32 else [])], (tf32, tf32)) == 0
    assert forked(main, [*argv, "--model.total_images", "80", "--tf32", "true"]) == 0
    said = "tf32 True instead of False: not bit-identical to an uninterrupted run" in capfd.readouterr().out
    assert said == (not tf32)


def test_gpu_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(gpu, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpu()  # no driver
    (tmp_path / "gpus").mkdir()
    check_gpu()  # no GPU
    (tmp_path / "gpus/0000:01:00.0").mkdir()
    with pytest.raises(
        UserError, match=r"cannot use the GPU of this machine: The NVIDIA driver .* too old .*CUDA_VISIBLE_DEVICES=-1$"
    ):
        check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpu()  # hidden
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    check_gpu()  # a version of torch for CPUs


DEMOS = sorted(path.parent.parent.name for path in METHODS.glob("*/recipes/demo.yaml"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", DEMOS)
def test_demo_trains_and_is_used(workdir, photos, method, precision):
    """Twenty steps with a validation; in float32, also the test, and a prediction or samples."""
    if DEVICE == "cpu" and precision != "32-true":
        pytest.skip("16 bits are slow on CPUs; the small recipes of the contract are trained with them")
    recipe = find_recipe(f"{method}/demo")
    images = str(20 * recipe.content["data"]["init_args"].get("batch_size", 16))
    options = ["--run", "gpu", "--trainer.precision", precision, *ON_DEVICE]
    sizes = ["--model.total_images", images, "--val_every_images", images]
    if method == "perceptual_sr":
        sizes += ["--model.pixel_images", str(int(images) // 2)]
    if method == "progan":
        sizes += ["--model.stable_images", str(int(images) // 10), "--model.fade_images", str(int(images) // 10)]
    assert forked(main, ["fit", recipe.name, *sizes, *options]) == 0
    if precision != "32-true":
        return
    if method not in ("gan", "dcgan", "progan"):  # whose demos have no test data
        assert forked(main, ["test", recipe.name, *sizes, *options]) == 0
    if method in ("gan", "wgan", "dcgan", "progan"):
        use = ["sample", recipe.name, "--count", "4", "--output", "used.png"]
    elif method in ("autoencoder", "vae"):
        use = ["reconstruct", recipe.name, "--output", "used.png"]
    else:
        use = ["predict", recipe.name, "--input", str(photos), "--output", "used"]
    assert forked(main, [*use, "--run", "gpu", *ON_DEVICE]) == 0
    assert any(Path().glob("used*"))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["espcn", "unet", "dcgan", "vae", "gan", "autoencoder"])
def test_compiled_networks_have_the_same_losses(workdir, method):
    recipe = find_recipe(f"{method}/demo")
    images = str(4 * recipe.content["data"]["init_args"].get("batch_size", 16))
    sizes = [
        "--model.total_images",
        images,
        "--val_every_images",
        images,
        "--data.test",
        "[]",
        "--trainer.log_every_n_steps",
        "1",
    ]
    for run, compiled in (("eager", "false"), ("compiled", "true")):
        argv = ["fit", recipe.name, *sizes, "--run", run, "--compile", compiled, *ON_DEVICE]
        assert forked(fit_and_count_graphs, argv, compiled == "true") == 0
    losses = []
    for run in ("eager", "compiled"):
        rows = read_metrics_csv(workdir / "runs" / method / "demo" / run / "metrics.csv")
        losses.append([float(row["value"]) for row in rows if row["name"].startswith("train/")])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def fit_and_count_graphs(argv, compiled):
    from torch._dynamo.utils import counters

    assert main(argv) == 0
    assert bool(counters["stats"]["unique_graphs"]) == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["espcn", "mask_rcnn", "cyclegan"])
def test_inference_is_timed_on_the_gpu(workdir, capfd, method):
    """The inputs of the others are tested with the device "meta"."""
    words = ["--pairs", "6", "--steps", "1", "--json", *ON_DEVICE]
    assert forked(main, ["bench", f"{method}/demo", *words]) == 0
    assert json.loads(capfd.readouterr().out)["inference_device"] == DEVICE


OPTIMIZERS = {
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "fused Adam": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "fused AdamW": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "SGD of methods": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, **kernels(weights[0].device)),
    "AdamW of methods": lambda weights: torch.optim.AdamW(weights, lr=1e-2, **kernels(weights[0].device)),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-2),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "SOAP": partial(soap, learning_rate=1e-2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_match_the_cpu(name):
    """Three steps in float64 on a layer whose gradients differ; SOAP's first step has no update."""
    weights = []
    for device in ("cpu", DEVICE):
        weight = torch.linspace(-1, 1, 12, dtype=torch.float64).sin().view(3, 4).to(device).requires_grad_()
        optimizer = OPTIMIZERS[name]([weight])
        target = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4).to(device)
        for step in range(3):
            optimizer.zero_grad()
            ((weight - target * (step + 1)) ** 3).abs().sum().backward()
            optimizer.step()
        weights.append(weight.detach().cpu())
    assert torch.allclose(weights[0], weights[1], rtol=1e-7, atol=1e-9)
