"""Own networks in the methods: classes of a file next to a recipe, without a new method."""

import re
import shlex

import pytest
import torch
import yaml

from datamodules.errors import UserError
from experiments import METHODS
from experiments.cli.main import main
from experiments.run.recipes import find_recipe
from modules.cyclegan import CycleGAN
from modules.dcgan import DCGAN
from modules.smp import SMPSegmenter
from tests.experiments.test_recipes import write_coins
from tests.helpers.subprocess_helpers import forked

PAGE = (METHODS / "unet/README.md").read_text().replace("\\\n", " ")
OWN = """
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

class SNDCGAN(nn.Sequential):
    '''Miyato et al., arXiv:1802.05957: spectral normalization in place of batch normalization.'''

    def __init__(self, channels=1, width=8):
        super().__init__(
            spectral_norm(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.1),
            nn.Flatten(), spectral_norm(nn.Linear(2 * width * 49, 1)),
        )

class NotANetwork:
    pass
"""


@pytest.fixture
def own(workdir):
    """Return a recipe with another discriminator, next to the file of its class."""
    (workdir / "own").mkdir()
    (workdir / "own/mynets.py").write_text(OWN)
    content = find_recipe("dcgan/demo").content
    content["model"]["init_args"] |= {
        "discriminator": {"class_path": "mynets.SNDCGAN", "init_args": {"width": 6}},
        "base_channels": 8,
        "total_images": 96,
    }
    content["data"]["init_args"]["batch_size"] = 32
    content["trainer"] = {}
    recipe = workdir / "own/sn.yaml"
    recipe.write_text(yaml.safe_dump({**content, "val_every_images": 96, "monitor": None}))
    return recipe


def test_own_discriminator_trains_resumes_and_is_exported(own, workdir, capfd):
    assert forked(main, ["fit", str(own), "--run", "one"]) == 0
    checkpoint = torch.load(workdir / "runs/sn/one/checkpoints/last.ckpt", weights_only=True)
    shape = checkpoint["state_dict"]["discriminator.2.parametrizations.weight.original"].shape
    assert shape == (12, 6, 4, 4)
    assert forked(main, ["fit", str(own), "--run", "one", "--model.total_images", "128"]) == 0  # resumes
    assert forked(main, ["sample", "runs/sn/one", "--count", "2", "--output", "a"]) == 0
    assert forked(main, ["export", "runs/sn/one", "--output", "sn.safetensors"]) == 0
    capfd.readouterr()
    assert forked(main, ["sample", "sn.safetensors", "--count", "2", "--output", "b"]) == 2
    assert "mynets.SNDCGAN is not part of Darkroom" in capfd.readouterr().err
    words = ["--modules", str(own.parent / "mynets.py"), "--count", "2", "--output", "b"]
    assert forked(main, ["sample", "sn.safetensors", *words]) == 0
    assert (workdir / "a/000001.png").read_bytes() == (workdir / "b/000001.png").read_bytes()


def test_changed_code_of_an_own_network_is_another_version(own, workdir):
    from experiments.results.fingerprint import code_fingerprint

    before = code_fingerprint(find_recipe(str(own)))
    (own.parent / "mynets.py").write_text(OWN.replace("0.1", "0.2"))
    after = code_fingerprint(find_recipe(str(own)))
    assert before["training"] != after["training"]
    assert before["metrics"] == after["metrics"]


def test_networks_of_other_methods():
    conv = {"class_path": "torch.nn.Conv2d", "init_args": {"in_channels": 3, "out_channels": 3, "kernel_size": 1}}
    method = CycleGAN(crop=24, base_channels=2, n_residual_blocks=1, generator=conv, discriminator=conv)
    assert [type(network) for network in (method.G_AB, method.G_BA, method.D_A, method.D_B)] == [torch.nn.Conv2d] * 4
    assert method.G_AB is not method.G_BA
    assert method(torch.rand(1, 3, 24, 24)).shape == (1, 3, 24, 24)
    segmenter = SMPSegmenter(encoder_weights=None, encoder_name="resnet18", num_classes=3, network=conv).eval()
    assert segmenter(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert not [name for name in segmenter.state_dict() if "encoder" in name]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "torch.nn.Convolution"}, "no class torch.nn.Convolution"),
        ({"class_path": "nowhere.Network"}, "no class nowhere.Network"),
        ({"class_path": "pathlib.Path"}, "is not a torch.nn.Module"),
        ({"class_path": "torch.nn.Conv2d", "init_args": {"width": 1}}, "torch.nn.Conv2d: .*width"),
        ({"init_args": {}}, "is not a network"),
        ({"class_path": "torch.nn.ReLU", "args": {}}, "is not a network"),
    ],
)
def test_unusable_networks_are_named(spec, message):
    with pytest.raises(UserError, match=rf"model\.discriminator: .*{message}"):
        DCGAN(channels=1, size=28, base_channels=2, discriminator=spec)


def test_command_of_the_page_trains_a_unet_with_another_encoder(workdir):
    """With random weights of the encoder, in place of a download."""
    (command,) = re.findall(r"^darkroom (fit unet/folder .*SMPSegmenter.*)$", PAGE, re.MULTILINE)
    write_coins(workdir)
    short = ["--model.encoder_weights", "null", "--model.total_images", "4", "--val_every_images", "4", "--run", "one"]
    assert forked(main, [*shlex.split(command), *short]) == 0
    checkpoint = torch.load(workdir / "runs/unet/folder/one/checkpoints/last.ckpt", weights_only=True)
    assert "network.encoder.layer1.0.conv1.weight" in checkpoint["state_dict"]
