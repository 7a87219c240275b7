import json
import re
import shlex
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree
from scipy.stats import truncnorm
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_tv_chambolle
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from callbacks.metrics.anomaly import ReconstructionAUROC
from callbacks.metrics.denoising import DenoisingPSNR
from callbacks.metrics.reconstruction_sse import ReconstructionSSE
from callbacks.metrics.retrieval import PrecisionAtK
from datamodules.catalog.array_readers import read_split
from datamodules.errors import UserError
from datamodules.io.image_set import ImageSet
from experiments import METHODS
from experiments.cli.main import main
from modules.autoencoder import Autoencoder
from tests.helpers.subprocess_helpers import forked
from tests.tasks.reconstruction import ReconstructionContract, of_digits, write_reconstruction_recipe

QUALITY = [
    {"class_path": "callbacks.metrics.denoising.DenoisingPSNR", "init_args": {"tv_weights": [], "on_validation": True}},
    {"class_path": "callbacks.metrics.retrieval.PrecisionAtK", "init_args": {"k": 3, "on_validation": True}},
    {"class_path": "callbacks.metrics.anomaly.ReconstructionAUROC"},
]


class TestDenoisingAutoencoder(ReconstructionContract):
    model = {
        "class_path": "modules.autoencoder.Autoencoder",
        "init_args": {"hidden_dims": [60], "latent_size": 16, "corruption": "noise", "corruption_level": 0.4},
    }
    deterministic_model = "modules.autoencoder.Autoencoder"
    training_overrides = ["--model.total_images", "60000", "--val_every_images", "20000", "--data.batch_size", "50"]

    @pytest.fixture
    def recipe(self, workdir):
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_reconstruction_recipe(
            workdir / "tiny.yaml", model, QUALITY, binarization="real-valued", exclude_classes=[3]
        )

    def has_learned(self, log):
        """Require a gain of 2 dB by denoising. Observed for 8 seeds, AVX-512: 3.5 ... 3.8."""
        psnr = {row["name"].rpartition("/")[2]: float(row["value"]) for row in log if "/psnr/" in row["name"]}
        return psnr["output"] > psnr["input"] + 2


def digits():
    images, labels = read_split("digits/train")
    return images[:1000].double() / 255, labels[:1000]


def test_linear_autoencoder_spans_the_principal_components():
    """At the optimum on centered digits, the residual and the span of the decoder equal those of PCA."""
    images = digits()[0][:, :, 6:22, 6:22]
    images = images - images.mean(0)
    method = Autoencoder(size=16, hidden_dims=[], latent_size=4).double()
    optimizer = torch.optim.LBFGS(method.parameters(), max_iter=2000, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (method(images) - images).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    flat = images.flatten(1).numpy()
    pca = PCA(4).fit(flat)
    residual = np.square(flat - pca.inverse_transform(pca.transform(flat))).mean()
    assert closure().item() == pytest.approx(residual, rel=1e-4)
    span, _ = np.linalg.qr(method.decoder[0][0].weight.detach().numpy())
    cosines = np.linalg.svd(pca.components_ @ span)[1]  # of the principal angles between the subspaces
    assert cosines.min() > 0.999


@pytest.mark.parametrize(("corruption", "corruption_level"), [("noise", 0.3), ("masking", 0.25), ("block", 0.5)])
def test_corruption_has_the_requested_statistics(corruption, corruption_level):
    method = Autoencoder(corruption=corruption, corruption_level=corruption_level)
    image = torch.full((3000, 1, 28, 28), 0.5)
    batch = {"image": image, "sample_ids": range(3000), "repeat_index": 0}
    noise = method.batch_noise(batch, "corruption", method.noise_dim(image), method.noise_kind)
    corrupted = method.corrupt(image, noise)
    assert 0 <= corrupted.min() <= corrupted.max() <= 1
    if corruption == "noise":
        inside, truncated = (corrupted > 0) & (corrupted < 1), truncnorm(-5 / 3, 5 / 3, scale=0.3)
        assert (corrupted[:100] - 0.5)[inside[:100]].std().item() == pytest.approx(truncated.std(), abs=0.003)
        assert inside.double().mean().item() == pytest.approx(0.9044, abs=0.002)
    elif corruption == "masking":
        assert (corrupted == 0).double().mean().item() == pytest.approx(0.25, abs=0.001)
    else:
        holes = corrupted == 0
        assert (holes.flatten(1).sum(1) == 14 * 14).all()
        rows, columns = holes.any(3)[:, 0], holes.any(2)[:, 0]
        assert (rows.sum(1) == 14).all() and (columns.sum(1) == 14).all()
        first = rows.int().argmax(1)
        assert set(first.tolist()) == set(range(15))  # all positions occur
        assert abs(np.corrcoef(first, columns.int().argmax(1))[0, 1]) < 0.06


def test_loss_compares_with_the_clean_image():
    method = Autoencoder(hidden_dims=[20], latent_size=4, corruption="masking", corruption_level=0.5)
    image = torch.rand(6, 1, 28, 28)
    batch = {"image": image, "sample_ids": range(6), "repeat_index": 0}
    corrupted = image * (method.batch_noise(batch, "corruption", 784, "uniform").view(6, 1, 28, 28) >= 0.5)
    assert method.losses(batch)["mse"].item() == pytest.approx((method(corrupted) - image).square().mean().item(), rel=1e-6)


def test_convolutional_network_keeps_the_image_size():
    method = Autoencoder(3, 32, "convolutional", [4, 8, 16], 5)
    image = torch.rand(2, 3, 32, 32)
    assert method(image).shape == image.shape
    assert method.encoder(image).shape == (2, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruption": "noise"}, r"model\.corruption_level: 0\.0 .*model\.corruption noise"),
        ({"corruption": "none", "corruption_level": 0.5}, r"model\.corruption_level: 0\.5 .*model\.corruption none"),
        ({"corruption": "block", "corruption_level": 1.0}, r"model\.corruption_level: 1\.0"),
        ({"corruption": "block", "corruption_level": 0.01}, r"model\.corruption_level: a block of 0\.01 \* 28 pixels"),
        ({"network": "convolutional", "hidden_dims": []}, r"model\.hidden_dims: a convolutional network"),
    ],
)
def test_invalid_arguments_raise_user_error(settings, message):
    with pytest.raises(UserError, match=message):
        Autoencoder(**settings)


@pytest.mark.parametrize(("recipe", "use"), [("vae/demo", "samples"), ("autoencoder/demo", "reconstructions")])
def test_bench_reports_metrics(recipe, use, workdir, capfd):
    assert forked(main, ["bench", recipe, "--pairs", "6", "--steps", "1", "--json"]) == 0
    metrics = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", f"{use}_per_second"):
        assert metrics[name] > 0


# Metrics


def test_auroc_matches_sklearn():
    generator = torch.Generator().manual_seed(0)
    image, reconstruction = torch.rand(2, 300, 1, 8, 8, generator=generator).unbind(0)
    label = torch.arange(300) % 10
    reconstruction[label == 3] = 0.5 * reconstruction[label == 3] + 0.2
    callback = ReconstructionAUROC()
    outputs = {"image": image, "prediction": reconstruction, "label": label}

    def trainer_with(**reference_sets):
        data = SimpleNamespace(
            binarization="real-valued",
            exclude_classes=["3", "7"],
            image_hw=None,
            is_unseen=partial(torch.isin, test_elements=torch.tensor([3, 7])),
            reference_sets=reference_sets,
        )
        return SimpleNamespace(datamodule=data)

    trainer = trainer_with(some=ImageSet(image, label))
    callback.setup(trainer, None, "test")
    metrics = callback.compute([callback.update(outputs, i) for i in range(300)], trainer)
    errors = np.square((reconstruction - image).numpy()).reshape(300, -1).mean(1)
    assert metrics["auroc/image-l2"] == pytest.approx(roc_auc_score(np.isin(label.numpy(), [3, 7]), errors), abs=1e-6)
    reconstruction[0] = torch.nan
    with pytest.raises(UserError, match=r"ReconstructionAUROC: .* not finite"):
        callback.compute([callback.update(outputs, i) for i in range(2)], trainer)
    with pytest.raises(UserError, match=r"ReconstructionAUROC: SimpleNamespace"):
        callback.setup(SimpleNamespace(datamodule=SimpleNamespace()), None, "test")
    with pytest.raises(UserError, match=r"ReconstructionAUROC: threes .*data\.exclude_classes"):
        callback.setup(trainer_with(threes=ImageSet(image, 0 * label + 3)), None, "test")


def test_precision_at_k_matches_kd_tree():
    images, labels = digits()
    codes = torch.randn(784, 12, generator=torch.Generator().manual_seed(0)).double()
    outputs = {"image": images, "code": images.flatten(1) @ codes, "label": labels}
    callback = PrecisionAtK(k=5)
    metrics = callback.compute([callback.update(outputs, i) for i in range(1000)], None)
    for name in ("code", "pixels"):
        vectors = outputs["code" if name == "code" else "image"].flatten(1).float().numpy()
        _, neighbors = cKDTree(vectors).query(vectors, 6)
        assert (neighbors[:, 0] == np.arange(1000)).all()
        expected = (labels.numpy()[neighbors[:, 1:]] == labels.numpy()[:, None]).mean()
        assert metrics[f"precision-at-5/{name}"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("k", "method", "message"),
    [
        (5, Autoencoder(), r"PrecisionAtK\.k: 5, .*some"),
        (0, Autoencoder(), r"PrecisionAtK\.k: 0"),
        (1, torch.nn.Identity(), r"PrecisionAtK: Identity"),
    ],
)
def test_invalid_precision_at_k_raises_in_setup(k, method, message):
    sets = {"some": ImageSet(torch.zeros(5, 1, 2, 2), torch.zeros(5))}
    with pytest.raises(UserError, match=message):
        PrecisionAtK(k=k).setup(SimpleNamespace(datamodule=SimpleNamespace(reference_sets=sets)), method, "fit")


def test_reconstruction_sse_matches_svd(workdir):
    """The principal components are those of the training images."""
    data = of_digits()
    trainer = SimpleNamespace(datamodule=data, state=SimpleNamespace(fn="test"))
    images = digits()[0][:20].float()
    outputs = {"image": images, "prediction": 0.9 * images, "code": torch.zeros(20, 6)}
    outputs |= {"name": [f"{i:02d}" for i in range(20)], "dataset": ["some"] * 20}
    callback = ReconstructionSSE()
    callback.setup(trainer, Autoencoder(), "test")
    callback.on_test_batch_end(trainer, None, outputs, None, 0)
    metrics = callback.compute(list(callback.state["some"].values()), trainer)
    assert metrics["sse/network"] == pytest.approx(0.01 * images.square().sum().item() / 20, rel=1e-6)
    train_images = read_split("digits/train")[0].flatten(1).double() / 255
    mean = train_images.mean(0)
    components = torch.linalg.svd(train_images - mean, full_matrices=False)[2][:6]
    centered = images.flatten(1).double() - mean
    expected = (centered - centered @ components.T @ components).square().sum(1).mean().item()
    assert metrics["sse/pca"] == pytest.approx(expected, rel=1e-4)
    data.exclude_classes = ["3"]
    with pytest.raises(UserError, match=r"ReconstructionSSE: .*data\.exclude_classes"):
        callback.setup(trainer, Autoencoder(), "fit")
    with pytest.raises(UserError, match=r"ReconstructionSSE: Identity on Reconstruction has no codes"):
        callback.setup(trainer, torch.nn.Identity(), "fit")


def test_denoising_psnr_matches_skimage():
    generator = torch.Generator().manual_seed(0)
    image = digits()[0][:4].float()
    outputs = {"image": image, "input": (image + 0.3 * torch.randn(image.shape, generator=generator)).clamp(0, 1)}
    outputs["prediction"] = 0.8 * image
    callback = DenoisingPSNR([0.1, 0.4])
    metrics = callback.compute([callback.update(outputs, i) for i in range(4)], None)
    clean, noisy, restored = (outputs[name].double().numpy()[:, 0] for name in ("image", "input", "prediction"))

    def mean_psnr(candidates):
        return np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(clean, candidates, strict=True)])

    assert metrics["psnr/output"] == pytest.approx(mean_psnr(restored), abs=1e-6)
    assert metrics["psnr/input"] == pytest.approx(mean_psnr(noisy), abs=1e-6)
    tv_psnr = [mean_psnr([denoise_tv_chambolle(candidate, weight=weight) for candidate in noisy]) for weight in (0.1, 0.4)]
    assert metrics["psnr/tv-chambolle"] == pytest.approx(max(tv_psnr), abs=1e-6)


def test_preview_stacks_images_inputs_and_reconstructions():
    generator = torch.Generator().manual_seed(0)
    image, corrupted, reconstruction = torch.rand(3, 20, 1, 6, 8, generator=generator).unbind(0)
    outputs = {"image": image, "input": corrupted, "prediction": reconstruction}
    grid = Autoencoder().preview(outputs)[0, 0].numpy()
    assert grid.shape == (3 * 8 + 2, 16 * 10 + 2)
    for row, row_images in enumerate(outputs.values()):
        for column in range(16):
            cell = grid[2 + 8 * row : 8 + 8 * row, 2 + 10 * column : 10 + 10 * column]
            assert np.array_equal(cell, row_images[column, 0].numpy())


def test_defect_detection_command_of_the_page_runs(workdir, photos):
    """The images are in folders in the layout of MVTec."""
    page = (METHODS / "autoencoder/README.md").read_text()
    command = re.search(r"```text\ndarkroom (.*?)```", page, re.DOTALL)[1]
    generator = np.random.default_rng(0)
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/broken_large", 4)):
        (workdir / "bottle" / folder).mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(workdir / f"bottle/{folder}/{i:03d}.png")
    assert (
        forked(
            main, [*shlex.split(command), "--model.total_images", "64", "--val_every_images", "64", "--data.batch_size", "4"]
        )
        == 0
    )
    record = json.loads((workdir / "runs/autoencoder/exclude_0/bottle/record.json").read_text())
    assert 0 <= record["metrics"]["bottle-test"]["auroc/image-l2"]["mean"] <= 1
