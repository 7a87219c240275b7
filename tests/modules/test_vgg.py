"""Compare feature networks with torchvision and with the released distilled network."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.models import vgg16, vgg19

from datamodules.errors import UserError
from modules.networks.vgg import FeatureNetwork, find_feature_weights, layer_names


def torchvision_features(network, image, names, depth):
    """Compute features with torchvision's own layers."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    maps, outputs = (image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1), []
    for layer in network.features[:depth]:
        maps = layer(maps)
        if isinstance(layer, torch.nn.ReLU):
            outputs.append(maps.clone())
    return dict(zip(names, outputs, strict=False))


@pytest.mark.parametrize(("name", "build", "depth"), [("vgg16", vgg16, 23), ("vgg19", vgg19, 21)])
def test_features_match_torchvision(name, build, depth):
    reference = build(weights=None).eval()
    network = FeatureNetwork(name, ["relu1_2", "relu4_1"])
    network.load_state_dict(reference.state_dict())
    image = torch.rand(2, 3, 32, 40)
    expected = torchvision_features(reference, image, layer_names(name), depth)
    features = network(image, ["relu1_2", "relu4_1"])
    assert list(features) == ["relu1_2", "relu4_1"]
    for layer, maps in features.items():
        assert torch.allclose(maps, expected[layer], atol=1e-5), layer
    assert list(network(image, ["relu1_2"])) == ["relu1_2"]


def test_distilled_weights_match_the_release(real_data):
    """The first layer of the release converts RGB to BGR minus a mean; ours includes it."""
    path = real_data / "weights/vgg19-distilled16x/4SE.pth"
    if not path.exists():
        pytest.skip("no weights/vgg19-distilled16x in DARKROOM_DATA")
    release = torch.load(path, map_location="cpu", weights_only=True)["model"]
    network = FeatureNetwork("vgg19-distilled", ["relu3_1"])
    network.load_state_dict(load_file(find_feature_weights("vgg19-distilled", None)))
    image = torch.rand(1, 3, 48, 40)
    maps = F.conv2d(image, release["conv0.weight"], release["conv0.bias"])
    for layer in ("conv11", "conv12", "conv21", "conv22", "conv31"):
        maps = F.max_pool2d(maps, 2) if layer in ("conv21", "conv31") else maps
        maps = F.relu(F.conv2d(F.pad(maps, (1,) * 4, mode="reflect"), release[f"{layer}.weight"], release[f"{layer}.bias"]))
    ours = network(image, ["relu3_1"])["relu3_1"]
    assert (ours - maps).abs().max() < 0.01 * maps.abs().max()  # half precision


def test_unknown_layer_raises():
    with pytest.raises(UserError, match=r"vgg16 has no layer relu6_1"):
        FeatureNetwork("vgg16", ["relu6_1"])


def test_weights_of_another_vgg_are_refused():
    """VGG-16 and VGG-19 have the same names up to relu3_3."""
    small = FeatureNetwork("vgg16", ["relu2_2"])
    states = {name: FeatureNetwork(name, ["relu5_1"]).state_dict() for name in ("vgg16", "vgg19")}
    small.load_state_dict(states["vgg16"])
    with pytest.raises(RuntimeError, match="its convolutions are not those of vgg16"):
        small.load_state_dict(states["vgg19"])
