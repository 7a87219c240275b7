"""Figures of generated images, beside torch-fidelity's own command on the same saved files and other independent values."""

import functools
import hashlib
import http.server
import json
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.metrics import feature_metrics
from callbacks.metrics.base import to_uint8
from callbacks.metrics.feature_extractors import VGG16, Inception, MnistLeNet, find_weights
from callbacks.metrics.feature_metrics import FeatureMetrics, compute_metric, frechet_distance
from callbacks.metrics.parzen import best_sigma, log_likelihood
from datamodules.catalog.array_readers import read_split
from datamodules.errors import UserError
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import load_image_set
from tests.helpers.tiny_recipes import Projection, inception_weights, random_weights


@pytest.fixture(scope="module")
def weights_of_inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photos):
    """Twelve pictures of 24 x 24 a folder: cuttings of photographs, and the same ones brighter and mirrored."""
    root = tmp_path_factory.mktemp("images")
    sets = {}
    for name in ("made", "real"):
        (root / name).mkdir()
        pictures = []
        for i, path in enumerate([path for path in sorted(photos.iterdir()) for _ in range(2)][:12]):
            pixels = np.asarray(Image.open(path).convert("RGB"))[3 * i : 3 * i + 24, 20:44]
            pixels = pixels if name == "real" else np.clip(pixels[:, ::-1].astype(int) * 2 - 90, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
            pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        sets[name] = torch.stack(pictures)
    return root, sets


def quality_of(callback, sets, batch=7):
    """What the callback says of samples that come in batches of that size."""
    real = SimpleNamespace(pixels=sets["real"])
    trainer = SimpleNamespace(
        is_global_zero=True,
        global_rank=0,
        world_size=1,
        sanity_checking=False,
        state=SimpleNamespace(fn="test"),
        datamodule=SimpleNamespace(reference_sets={"real": real}),
        strategy=SimpleNamespace(root_device=torch.device("cpu"), barrier=lambda name: None),
    )
    logged = {}
    module = SimpleNamespace(log_dict=lambda figures, sync_dist: logged.update(figures), images_seen=0)
    callback.setup(trainer, module, "test")
    callback.on_test_epoch_start(trainer, module)
    order = torch.arange(len(sets["made"])).split(batch)
    for i in reversed(range(len(order))):  # as another process might have made the first ones
        outputs = {"prediction": sets["made"][order[i]].float() / 255, "index": order[i]}
        callback.on_test_batch_end(trainer, module, outputs, None, i)
    callback.on_test_epoch_end(trainer, module)
    assert logged == {f"real/{name}": value for name, value in callback.results["real"]["all"].items()}
    return callback.results["real"]["all"]


def test_figures_are_those_of_torch_fidelitys_command(folders, weights_of_inception, tmp_path, monkeypatch):
    root, sets = folders
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_metrics, "KID_SUBSET_SIZE", 10)
    words = ["--input1", root / "made", "--input2", root / "real", "--fid", "--kid", "--isc", "--kid-subset-size", "10"]
    words += [
        "--feature-extractor-weights-path",
        weights_of_inception,
        "--cpu",
        "--json",
        "--silent",
        "--no-cache",
        "--batch-size",
        "7",
    ]
    program = [sys.executable, "-m", "torch_fidelity.fidelity", *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert theirs["frechet_inception_distance"] > 1
    measures = ["fid", "kid", "inception-score"]
    expected = {
        "fid/inception-tf-12": theirs["frechet_inception_distance"],
        "kid/inception-tf-12": theirs["kernel_inception_distance_mean"],
        "inception-score/inception-tf-12": theirs["inception_score_mean"],
        "inception-score-std/inception-tf-12": theirs["inception_score_std"],
    }
    first = quality_of(FeatureMetrics(measures, weights=str(weights_of_inception)), sets)
    assert first == pytest.approx(expected, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = quality_of(FeatureMetrics(measures, weights=str(weights_of_inception)), sets, batch=12)
    assert again == pytest.approx(expected, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_precision_and_recall_are_those_of_torch_fidelitys_command(folders, tmp_path, monkeypatch):
    import torchvision

    root, sets = folders
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "vgg16.pth"
    torch.save(random_weights(torchvision.models.vgg16()), weights)  # 528 MiB
    words = [
        "--input1",
        root / "made",
        "--input2",
        root / "real",
        "--prc",
        "--prc-neighborhood",
        "3",
        "--feature-extractor",
        "vgg16",
    ]
    words += ["--feature-extractor-weights-path", weights, "--cpu", "--json", "--silent", "--no-cache", "--batch-size", "7"]
    program = [sys.executable, "-m", "torch_fidelity.fidelity", *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    quality = FeatureMetrics(["precision-recall"], "callbacks.metrics.feature_extractors.VGG16", str(weights))
    assert quality_of(quality, sets) == {"precision/vgg16-12": theirs["precision"], "recall/vgg16-12": theirs["recall"]}
    assert 0 < theirs["precision"] < 1


def test_without_weights_a_run_is_refused_or_goes_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(Inception, "url", "http://127.0.0.1:9/inception-6726825d.pth")
    with pytest.raises(
        UserError, match=r"inception-tf could not be fetched from http://127.0.0.1:9/.*set `on_missing_weights: skip`"
    ):
        FeatureMetrics(["fid"]).setup(SimpleNamespace(is_global_zero=True), None, "test")
    FeatureMetrics(["fid"], on_missing_weights="skip").setup(SimpleNamespace(is_global_zero=True), None, "test")
    assert "without   fid: weights of inception-tf could not be fetched" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no file nowhere\.pth, neither here nor below"):
        FeatureMetrics(["fid"], weights="nowhere.pth").setup(None, None, "test")
    with pytest.raises(UserError, match=r"no class callbacks\.metrics\.feature_extractors\.Incepton"):
        FeatureMetrics(["fid"], extractor="callbacks.metrics.feature_extractors.Incepton").setup(None, None, "test")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"bad.pth cannot be read as weights"):
        FeatureMetrics(["fid"], weights=str(tmp_path / "bad.pth")).setup(None, None, "test")
    nothing = SimpleNamespace(datamodule=SimpleNamespace(test=[]))
    FeatureMetrics(["fid"], weights="nowhere.pth").setup(nothing, None, "fit")  # there will be nothing to measure


def test_downloaded_weights_must_have_the_checksum_of_their_name(tmp_path, monkeypatch):
    (tmp_path / "host").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "host/whole.pth")
    content = (tmp_path / "host/whole.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name in (f"right-{digest}.pth", "wrong-00000000.pth"):
        (tmp_path / "host" / name).write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "host"))
    monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(VGG16, "url", f"http://127.0.0.1:{server.server_port}/wrong-00000000.pth")
    with pytest.raises(UserError, match="invalid hash value"):
        find_weights(VGG16, None)
    monkeypatch.setattr(VGG16, "url", f"http://127.0.0.1:{server.server_port}/right-{digest}.pth")
    assert find_weights(VGG16, None).read_bytes() == content
    server.shutdown()


def test_eight_bits_are_those_of_a_saved_file(tmp_path):
    from torchvision.utils import save_image

    image = torch.rand(3, 9, 9) * 1.2 - 0.1
    save_image(image, tmp_path / "image.png")
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "image.png"))).permute(2, 0, 1), to_uint8(image))


def test_a_frechet_distance_is_the_closed_form_of_its_gaussians():
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4000, 3, generator=generator).double()
    made = (made - made.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(made.T))).T  # covariance 1, mean 0
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert frechet_distance(made, made * scale + 2) == pytest.approx(3 * 4 + 0 + 1 + 4, rel=1e-6)


def test_balance_and_confidence_have_their_extremes():
    even = {"logits": 50 * torch.eye(10).repeat(3, 1)}
    assert compute_metric("effective-classes", even, {})["effective-classes"] == pytest.approx(10)
    assert compute_metric("confidence", even, {})["confidence"] == pytest.approx(1)
    one = {"logits": torch.zeros(30, 10)}
    assert compute_metric("effective-classes", one, {})["effective-classes"] == pytest.approx(1)
    assert compute_metric("confidence", one, {})["confidence"] == pytest.approx(0.1)
    with pytest.raises(UserError, match="confidence needs a classifier's logits"):
        compute_metric("confidence", {"features": torch.zeros(3, 2)}, {})


def test_a_parzen_window_is_scipys_density():
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    samples, images = torch.rand(7, 5).double(), torch.rand(4, 5).double()
    densities = np.array([[multivariate_normal(s, 0.2**2).logpdf(x) for s in samples.numpy()] for x in images.numpy()])
    expected = logsumexp(densities, axis=1) - math.log(7)
    assert log_likelihood(samples, images, 0.2, at_once=3).numpy() == pytest.approx(expected)


def test_parzens_reference_points(with_real_data):
    """Fact sheet: 10,000 training digits give 243.6 +/- 2.1 on the 10,000 test digits; here are two thirds of those."""
    digits = read_split("mnist/train")[0][:10_000].double().flatten(1) / 255
    val_images, test = (read_split(f"mnist/{part}")[0].double().flatten(1) / 255 for part in ("val", "test"))
    sigma = best_sigma(digits, val_images[:1000])
    assert sigma == pytest.approx(0.1668, abs=1e-4)
    parzen_metrics = log_likelihood(digits, test, sigma)
    assert parzen_metrics.mean().item() == pytest.approx(243.6, abs=6)


def test_the_digits_classifier_is_as_good_as_it_says(with_real_data):
    weights = "weights/mnist-lenet/lenet_epoch12_acc0.991.pth"
    images = load_image_set("mnist/test", 28, 1, None, DataReport())
    network = MnistLeNet(find_weights(MnistLeNet, weights))
    right = feature_metrics.extract(network, images.pixels)["logits"].argmax(1) == images.labels
    assert right.double().mean().item() == pytest.approx(0.991, abs=0.001)


def test_a_projection_is_an_extractor(tmp_path):
    torch.save(torch.ones(784, 2), tmp_path / "p.pth")
    looked = feature_metrics.extract(
        Projection(find_weights(Projection, str(tmp_path / "p.pth"))), torch.full((3, 1, 28, 28), 255, dtype=torch.uint8)
    )
    assert looked["features"].tolist() == [[784.0] * 2] * 3
