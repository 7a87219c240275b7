"""Compare metrics of generated images with torch-fidelity on the same files, and with other independent values."""

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
import torch_fidelity
from PIL import Image

from callbacks.metrics import fid_kid_is
from callbacks.metrics.base import to_uint8
from callbacks.metrics.fid_kid_is import FeatureMetrics, compute_metric, frechet_distance
from callbacks.metrics.parzen import best_sigma, log_likelihood
from datamodules.catalog.array_readers import read_split
from datamodules.errors import UserError
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import Square, load_image_set
from modules.networks.feature_extractors import VGG16, Inception, MnistLeNet
from modules.networks.pretrained import find_or_download
from tests.helpers.tiny_recipes import Projection, inception_weights, random_weights


@pytest.fixture(scope="module")
def inception_weights_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photos):
    """Write two folders of twelve 24 x 24 images: crops of photographs, and mirrored copies with higher contrast."""
    root = tmp_path_factory.mktemp("images")
    sets = {}
    for name in ("generated", "real"):
        (root / name).mkdir()
        images = []
        for i, path in enumerate([path for path in sorted(photos.iterdir()) for _ in range(2)][:12]):
            pixels = np.asarray(Image.open(path).convert("RGB"))[3 * i : 3 * i + 24, 20:44]
            pixels = pixels if name == "real" else np.clip(pixels[:, ::-1].astype(int) * 2 - 90, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        sets[name] = torch.stack(images)
    return root, sets


def evaluate(callback, sets, batch_size=7):
    """Return the results of the callback for samples in batches of the given size."""
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
    module = SimpleNamespace(log_dict=lambda values, sync_dist: logged.update(values), images_seen=0)
    callback.setup(trainer, module, "test")
    callback.on_test_epoch_start(trainer, module)
    batches = torch.arange(len(sets["generated"])).split(batch_size)
    for i in reversed(range(len(batches))):  # the order of the batches must not affect the result
        outputs = {"prediction": sets["generated"][batches[i]].float() / 255, "index": batches[i]}
        callback.on_test_batch_end(trainer, module, outputs, None, i)
    callback.on_test_epoch_end(trainer, module)
    assert logged == {f"real/{name}": value for name, value in callback.results["real"]["all"].items()}
    return callback.results["real"]["all"]


def test_fid_kid_and_inception_score_match_torch_fidelity(folders, inception_weights_path, tmp_path, monkeypatch):
    root, sets = folders
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fid_kid_is, "KID_SUBSET_SIZE", 10)
    reference = torch_fidelity.calculate_metrics(
        input1=str(root / "generated"),
        input2=str(root / "real"),
        fid=True,
        kid=True,
        isc=True,
        kid_subset_size=10,
        feature_extractor_weights_path=str(inception_weights_path),
        cuda=False,
        verbose=False,
        cache=False,
        batch_size=7,
    )
    assert reference["frechet_inception_distance"] > 1
    names = ["fid", "kid", "inception-score"]
    expected = {
        "fid/inception-tf-12": reference["frechet_inception_distance"],
        "kid/inception-tf-12": reference["kernel_inception_distance_mean"],
        "inception-score/inception-tf-12": reference["inception_score_mean"],
        "inception-score-std/inception-tf-12": reference["inception_score_std"],
    }
    metric = FeatureMetrics(names, weights=str(inception_weights_path))
    results = evaluate(metric, sets)
    assert metric.evaluator_hash == hashlib.sha256(inception_weights_path.read_bytes()).hexdigest()
    assert results == pytest.approx(expected, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    fid = {"fid/inception-tf-12": expected["fid/inception-tf-12"]}
    assert evaluate(FeatureMetrics(["fid"], weights=str(inception_weights_path)), sets) == pytest.approx(fid, rel=1e-6)
    results_from_cache = evaluate(FeatureMetrics(["kid"], weights=str(inception_weights_path)), sets, batch_size=12)
    assert results_from_cache["kid/inception-tf-12"] == pytest.approx(expected["kid/inception-tf-12"], rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # features, and statistics of the FID alone


@pytest.mark.slow
def test_precision_and_recall_match_torch_fidelity_command(folders, tmp_path, monkeypatch):
    import torchvision

    root, sets = folders
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "vgg16.pth"
    torch.save(random_weights(torchvision.models.vgg16()), weights)  # 528 MiB
    arguments = [
        "--input1",
        root / "generated",
        "--input2",
        root / "real",
        "--prc",
        "--prc-neighborhood",
        "3",
        "--feature-extractor",
        "vgg16",
    ]
    arguments += ["--feature-extractor-weights-path", weights, "--cpu", "--json", "--silent", "--no-cache", "--batch-size", "7"]
    program = [sys.executable, "-m", "torch_fidelity.fidelity", *map(str, arguments)]
    completed = subprocess.run(program, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    reference = json.loads(completed.stdout)
    metrics = FeatureMetrics(["precision-recall"], "modules.networks.feature_extractors.VGG16", str(weights))
    assert evaluate(metrics, sets) == {"precision/vgg16-12": reference["precision"], "recall/vgg16-12": reference["recall"]}
    assert 0 < reference["precision"] < 1


def test_missing_weights_raise_or_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(Inception, "url", "http://127.0.0.1:9/inception-6726825d.pth")
    with pytest.raises(
        UserError, match=r"inception-tf: download from http://127\.0\.0\.1:9/.*set --trainer.callbacks.on_missing_weights skip"
    ):
        FeatureMetrics(["fid"]).setup(SimpleNamespace(is_global_zero=True), None, "test")
    FeatureMetrics(["fid"], on_missing_weights="skip").setup(SimpleNamespace(is_global_zero=True), None, "test")
    assert "skipped   fid: weights of inception-tf: download from " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no file nowhere\.pth in "):
        FeatureMetrics(["fid"], weights="nowhere.pth").setup(None, None, "test")
    with pytest.raises(UserError, match=r"no class modules\.networks\.feature_extractors\.Incepton"):
        FeatureMetrics(["fid"], extractor="modules.networks.feature_extractors.Incepton").setup(None, None, "test")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"bad.pth cannot be read as weights"):
        FeatureMetrics(["fid"], weights=str(tmp_path / "bad.pth")).setup(None, None, "test")
    no_tests = SimpleNamespace(datamodule=SimpleNamespace(test=[]))
    FeatureMetrics(["fid"], weights="nowhere.pth").setup(no_tests, None, "fit")  # without test sets, no weights are required


def test_downloaded_weights_are_verified_by_the_checksum_in_their_name(tmp_path, monkeypatch):
    (tmp_path / "host").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "host/original.pth")
    content = (tmp_path / "host/original.pth").read_bytes()
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
        find_or_download(VGG16.name, VGG16.url, None)
    monkeypatch.setattr(VGG16, "url", f"http://127.0.0.1:{server.server_port}/right-{digest}.pth")
    assert find_or_download(VGG16.name, VGG16.url, None).read_bytes() == content
    server.shutdown()


def test_to_uint8_rounds_like_save_image(tmp_path):
    from torchvision.utils import save_image

    image = torch.rand(3, 9, 9) * 1.2 - 0.1
    save_image(image, tmp_path / "image.png")
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "image.png"))).permute(2, 0, 1), to_uint8(image))


def test_frechet_distance_of_gaussians_matches_closed_form():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 3, generator=generator).double()
    samples = (samples - samples.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(samples.T))
    ).T  # covariance 1, mean 0
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert frechet_distance(samples, samples * scale + 2) == pytest.approx(3 * 4 + 0 + 1 + 4, rel=1e-6)


def test_effective_classes_and_confidence_reach_their_extremes():
    uniform = {"logits": 50 * torch.eye(10).repeat(3, 1)}
    assert compute_metric("effective-classes", uniform, {})["effective-classes"] == pytest.approx(10)
    assert compute_metric("confidence", uniform, {})["confidence"] == pytest.approx(1)
    constant = {"logits": torch.zeros(30, 10)}
    assert compute_metric("effective-classes", constant, {})["effective-classes"] == pytest.approx(1)
    assert compute_metric("confidence", constant, {})["confidence"] == pytest.approx(0.1)
    with pytest.raises(UserError, match="confidence needs a classifier's logits"):
        compute_metric("confidence", {"features": torch.zeros(3, 2)}, {})


def test_parzen_log_likelihood_matches_scipy():
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    samples, images = torch.rand(7, 5).double(), torch.rand(4, 5).double()
    densities = np.array([[multivariate_normal(s, 0.2**2).logpdf(x) for s in samples.numpy()] for x in images.numpy()])
    expected = logsumexp(densities, axis=1) - math.log(7)
    assert log_likelihood(samples, images, 0.2, batch_size=3).numpy() == pytest.approx(expected)


@pytest.mark.slow
def test_parzen_log_likelihood_of_mnist_training_images(with_real_data):
    """Reference value for 10,000 training digits and 10,000 test digits: 243.6 +/- 2.1 nats."""
    digits = read_split("mnist/train")[0][:10_000].double().flatten(1) / 255
    val_images, test = (read_split(f"mnist/{part}")[0].double().flatten(1) / 255 for part in ("val", "test"))
    sigma = best_sigma(digits, val_images[:1000])
    assert sigma == pytest.approx(0.1668, abs=1e-4)
    values = log_likelihood(digits, test, sigma)
    assert values.mean().item() == pytest.approx(243.6, abs=6)


def test_mnist_lenet_has_the_accuracy_in_its_file_name(with_real_data):
    weights = "weights/mnist-lenet/lenet_epoch12_acc0.991.pth"
    images = load_image_set("mnist/test", 28, 1, Square(), DataReport())
    network = MnistLeNet(find_or_download(MnistLeNet.name, None, weights))
    correct = fid_kid_is.extract(network, images.pixels)["logits"].argmax(1) == images.labels
    assert correct.double().mean().item() == pytest.approx(0.991, abs=0.001)


def test_custom_extractor_is_accepted(tmp_path):
    torch.save(torch.ones(784, 2), tmp_path / "p.pth")
    outputs = fid_kid_is.extract(
        Projection(find_or_download(Projection.name, None, str(tmp_path / "p.pth"))),
        torch.full((3, 1, 28, 28), 255, dtype=torch.uint8),
    )
    assert outputs["features"].tolist() == [[784.0] * 2] * 3
