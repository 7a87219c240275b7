"""Compare perceptual distances with torchmetrics, torchvision and a direct computation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import alexnet, squeezenet1_0

from callbacks.metrics.perceptual_distance import FeatureDistance, SqueezeNetDistance
from datamodules.errors import UserError
from modules.networks.squeezenet import CAFFE_NAMES, FIRE_INDICES, SqueezeNetFeatures


class Slices(nn.Module):
    """AlexNet's features as in LPIPS, from torchvision's layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, image):
        maps = 2 * image - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        maps, outputs = maps / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), []
        for layer in self.layers:
            maps = layer(maps)
            if isinstance(layer, nn.ReLU):
                outputs.append(maps)
        return outputs


def test_feature_distance_matches_lpips_without_linear_layers():
    torch.manual_seed(0)
    reference = _LPIPS(pretrained=False, net="alex", pnet_rand=True, use_dropout=False)
    for layer in reference.lins:
        nn.init.ones_(layer.model[0].weight)
    layers = alexnet(weights=None).features[:12].eval()
    layers.load_state_dict({f"{i}.{kind}": value for i, kind, value in named_parameters(reference.net)})
    for parameter in layers.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_()
    images = torch.rand(2, 3, 64, 80), torch.rand(2, 3, 64, 80)
    for (_, _, theirs), ours in zip(named_parameters(reference.net), layers.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    with torch.no_grad():
        expected = reference(*images, normalize=True).flatten()
        assert torch.allclose(FeatureDistance(Slices(layers))(*images), expected, rtol=1e-4)


def named_parameters(network):
    """Return index, kind and tensor of the convolutions of LPIPS' AlexNet, whose slices keep torchvision's indices."""
    return [(name.split(".")[-2], name.split(".")[-1], value) for name, value in network.named_parameters()]


@pytest.fixture
def caffe_weights(tmp_path):
    """Return a SqueezeNet with random weights, and its weights under the names of the Caffe model."""
    torch.manual_seed(0)
    network = squeezenet1_0(weights=None).eval()
    state = network.features.state_dict()
    arrays = {}
    for kind in ("weight", "bias"):
        arrays[f"conv1.{kind}"] = state[f"0.{kind}"].numpy()
        for fire, index in FIRE_INDICES.items():
            for ours, caffe in CAFFE_NAMES.items():
                arrays[f"fire{fire}/{caffe}.{kind}"] = state[f"{index}.{ours}.{kind}"].numpy()
    np.savez(tmp_path / "squeezenet.npz", **arrays)
    return network, tmp_path / "squeezenet.npz"


def test_squeezenet_features_match_torchvision(caffe_weights):
    network, path = caffe_weights
    image = torch.rand(2, 3, 64, 64)
    maps = image.flip(1) * 255 - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    with torch.no_grad():
        features = SqueezeNetFeatures(path)(image)
        for end, ours in zip((2, 6, 11, 13), features, strict=True):
            assert torch.allclose(ours, network.features[:end](maps), rtol=1e-4, atol=1e-4)


def test_files_without_the_weights_are_refused(tmp_path, caffe_weights):
    _, path = caffe_weights
    arrays = dict(np.load(path))
    np.savez(tmp_path / "missing.npz", **{name: value for name, value in arrays.items() if name != "conv1.bias"})
    np.savez(tmp_path / "shape.npz", **{**arrays, "conv1.bias": np.zeros(3, np.float32)})
    np.savez(tmp_path / "pickle.npz", **{**arrays, "conv1.bias": np.array([{}], dtype=object)})
    (tmp_path / "text.npz").write_text("text")
    for name in ("missing", "shape", "pickle", "text"):
        with pytest.raises(UserError, match=f"{name}.npz does not contain the weights of SqueezeNet"):
            SqueezeNetFeatures(tmp_path / f"{name}.npz")


TRAINER = SimpleNamespace(is_global_zero=True, datamodule=SimpleNamespace(test=["set"]))


def test_distance_uses_luma_without_the_border(caffe_weights):
    _, path = caffe_weights
    metric = SqueezeNetDistance(str(path), crop_border=4)
    metric.setup(TRAINER, None, "test")
    prediction, target = torch.rand(2, 2, 3, 40, 36)
    outputs = {"prediction": prediction, "target": target, "dataset": ["set"] * 2, "name": ["a", "b"]}
    weights = torch.tensor([65.481, 128.553, 24.966]).double() / 255  # BT.601 luma of 8-bit RGB, in 16 ... 235
    for i in range(2):
        luma = [
            ((torch.floor(images[i, :, 4:-4, 4:-4].double() * 255 + 0.5) * weights.view(3, 1, 1)).sum(0) + 16) / 255
            for images in (prediction, target)
        ]
        with torch.no_grad():
            expected = FeatureDistance(SqueezeNetFeatures(path))(*(y.float().expand(1, 3, -1, -1) for y in luma))
        assert metric.update(outputs, i) == {"distance-y/squeezenet1_0": pytest.approx(expected.item(), rel=1e-2)}


def test_missing_weights_are_skipped_or_refused(tmp_path, capsys):
    missing = str(tmp_path / "missing.npz")
    metric = SqueezeNetDistance(missing, 4, on_missing_weights="skip")
    metric.setup(TRAINER, None, "test")
    assert "skipped   distance-y/squeezenet1_0: weights of SqueezeNet: no file" in capsys.readouterr().out
    assert metric.update({}, 0) == {}
    with pytest.raises(UserError, match=r"set --trainer\.callbacks\.on_missing_weights skip"):
        SqueezeNetDistance(missing, 4).setup(TRAINER, None, "test")


def test_images_that_are_too_small_are_named(caffe_weights):
    metric = SqueezeNetDistance(str(caffe_weights[1]), crop_border=4)
    metric.setup(TRAINER, None, "test")
    for side in (29, 28):
        image = torch.rand(1, 1, side, 40)
        outputs = {"prediction": image, "target": image, "dataset": ["icons"], "name": ["icon"]}
        if side == 29:
            assert metric.update(outputs, 0) == {"distance-y/squeezenet1_0": 0}
        else:
            with pytest.raises(UserError, match="icons/icon: 20 pixels without the cropped border are too few"):
                metric.update(outputs, 0)
