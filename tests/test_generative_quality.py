"""Figures of generated images, beside torch-fidelity's own command on the same saved files and other independent values."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from callbacks import generative_quality
from callbacks.generative_quality import GenerativeQuality


def random_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Values of a scale that keeps the signal alive through the layers, so that images are told apart."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in network.state_dict().items():
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("bn.weight")):
            weights[name] = torch.ones_like(value)
        elif value.ndim > 1:
            deviation = math.sqrt(2 / value[0].numel())
            weights[name] = torch.randn(value.shape, generator=generator) * deviation
        else:
            weights[name] = torch.zeros_like(value)
    return weights


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception", ["64"], feature_extractor_weights_path=str(path))
    torch.save(random_weights(network), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photos):
    """Twenty pictures of 24 x 24 a folder: cuttings of photographs, and the same ones brighter and mirrored."""
    root = tmp_path_factory.mktemp("images")
    sets = {}
    for name in ("made", "real"):
        (root / name).mkdir()
        pictures = []
        for i, path in enumerate([path for path in sorted(photos.iterdir()) for _ in range(3)][:20]):
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
        datamodule=SimpleNamespace(real={"real": real}),
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
    assert logged == {f"real/{name}": value for name, value in callback.figures["real"]["all"].items()}
    return callback.figures["real"]["all"]


def test_figures_are_those_of_torch_fidelitys_command(folders, inception_weights, tmp_path, monkeypatch):
    root, sets = folders
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generative_quality, "SUBSET", 10)
    words = ["--input1", root / "made", "--input2", root / "real", "--fid", "--kid", "--isc", "--kid-subset-size", "10"]
    words += [
        "--feature-extractor-weights-path",
        inception_weights,
        "--cpu",
        "--json",
        "--silent",
        "--no-cache",
        "--batch-size",
        "7",
    ]
    program = [sys.executable, "-m", "torch_fidelity.fidelity", *map(str, words)]
    theirs = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert theirs["frechet_inception_distance"] > 1
    measures = ["frechet", "kernel", "inception-score"]
    expected = {
        "fid/inception-tf-20": theirs["frechet_inception_distance"],
        "kernel/inception-tf-20": theirs["kernel_inception_distance_mean"],
        "inception-score/inception-tf-20": theirs["inception_score_mean"],
        "inception-score-std/inception-tf-20": theirs["inception_score_std"],
    }
    first = quality_of(GenerativeQuality(measures, weights=str(inception_weights)), sets)
    assert first == pytest.approx(expected, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = quality_of(GenerativeQuality(measures, weights=str(inception_weights)), sets, batch=20)
    assert again == pytest.approx(expected, rel=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1
