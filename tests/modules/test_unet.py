import json

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from experiments.cli.main import main
from modules.tasks.segmentation import INVERSE, TTA_VIEWS, apply_dihedral
from modules.tasks.tiling import Tiling, crop_reflect, predict_tiled
from modules.unet import UNet
from tests.helpers.method_contract import SegmentationContract
from tests.helpers.subprocess_helpers import forked


class TestUNet(SegmentationContract):
    model = {"class_path": "modules.unet.UNet", "init_args": {"base_channels": 8, "depth": 2, "tile_size": 44}}
    steady = "tests.helpers.deterministic_variants.SteadyUNet"
    samples = {"crop": 28, "margin": 40}
    learns = [
        "--model.total_images",
        "1600",
        "--val_every_images",
        "400",
        "--model.learning_rate",
        "0.003",
        "--model.dropout",
        "0",
    ]
    mark = 0.8

    def test_bench_names_its_figures(self, workplace, recipe, capfd):
        assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "2", "--json"]) == 0
        figures = json.loads(capfd.readouterr().out)
        assert figures["megapixels_per_second"] > 0
        assert figures["ratio_to_bare"] > 0.2
        assert figures["images_per_second_pil"] > 0


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UNet(base_channels=4, depth=2, tile_size=12).eval().double()


def test_the_papers_network():
    """572 in, 388 out, 23 convolutions, 31,030,658 parameters: Figure 1 and its caption."""
    with torch.device("meta"):
        paper = UNet()
        assert paper(torch.rand(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert sum(p.numel() for p in paper.parameters()) == 31_030_658
    assert sum(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) for layer in paper.modules()) == 23


def test_each_depth_knows_its_margin_and_its_sides():
    for depth in (1, 2, 3, 4):
        tiling = UNet(base_channels=1, depth=depth, tile_size=Tiling(2**10 + 4, 0, 2**depth, 4).round_up(60)).tiling
        side = tiling.tile_size + tiling.margin
        with torch.device("meta"):
            found = UNet(base_channels=1, depth=depth, tile_size=tiling.tile_size)(torch.rand(1, 1, side, side))
        assert found.shape[-1] == tiling.tile_size


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(UserError, match="U-Net: 570x572 pixels cannot be halved; 572 could"):
        UNet(base_channels=1)(torch.rand(1, 1, 572, 570))
    with pytest.raises(UserError, match=r"model\.tile_size: 380; this network can have 4 more than 16 times n: 388"):
        UNet(base_channels=1, tile_size=380)


@pytest.mark.parametrize(("height", "width"), [(37, 52), (12, 100), (5, 3), (1, 40)])
def test_tiles_are_one_big_pass(network, height, width):
    image = torch.rand(2, 1, height, width, dtype=torch.float64)
    tiling = network.tiling
    sides = (tiling.round_up(height), tiling.round_up(width))
    mirrored = np.pad(
        image.numpy(),
        [(0, 0), (0, 0), *((20, 20 + side - length) for side, length in zip(sides, (height, width), strict=True))],
        "reflect",
    )
    whole = network(torch.from_numpy(mirrored)).softmax(1)[..., :height, :width]
    assert torch.allclose(network.probabilities(image), whole, atol=1e-12)


def test_pieces_beyond_a_picture_are_its_mirror_image():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    expected = np.pad(image[0, 0].numpy(), ((3, 9), (3, 7)), mode="reflect")
    assert (crop_reflect(image, 0, 0, (9, 8), 6)[0, 0].numpy() == expected).all()


def test_the_symmetries_are_the_squares_and_are_undone():
    image = torch.rand(3, 5, 5)
    views = [apply_dihedral(image, view) for view in TTA_VIEWS[8]]
    assert len({view.numpy().tobytes() for view in views}) == 8
    for view, turned in zip(TTA_VIEWS[8], views, strict=True):
        assert torch.equal(apply_dihedral(turned, INVERSE.get(view, view)), image)
    quarters = {np.rot90(image.numpy(), k, (1, 2)).tobytes() for k in range(4)}
    assert {apply_dihedral(image, view).contiguous().numpy().tobytes() for view in TTA_VIEWS[4]} == quarters


def test_a_mean_over_symmetries_turns_with_the_picture(network):
    network.tta_views = 8
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    turned = network.probabilities(image.rot90(1, (2, 3)))
    assert torch.allclose(turned, network.probabilities(image).rot90(1, (2, 3)), atol=1e-12)


def test_classes_of_a_picture_are_those_of_its_probabilities(network):
    image = torch.rand(1, 1, 30, 41, dtype=torch.float64)
    found = network.predict_step({"image": image}, 0)["prediction"]
    assert found.dtype == torch.uint8
    assert torch.equal(found, network.probabilities(image).argmax(1).byte())


def test_the_loss_is_the_weighted_cross_entropy():
    method = UNet(base_channels=1, depth=1, tile_size=6).eval()
    batch = {"image": torch.rand(2, 1, 22, 22), "mask": torch.randint(0, 2, (2, 6, 6)), "weight": torch.rand(2, 6, 6)}
    batch["mask"][0, 0, :3] = 255
    log = method(batch["image"]).log_softmax(1)
    expected = sum(
        -batch["weight"][n, i, j] * log[n, batch["mask"][n, i, j], i, j]
        for n in range(2) for i in range(6) for j in range(6) if batch["mask"][n, i, j] != 255
    ) / 72  # fmt: skip
    assert method.losses(batch)["entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match=r"data\.margin: 18, but this network takes away 16"):
        method.losses({**batch, "mask": batch["mask"][:, 1:-1, 1:-1]})


def test_initial_weights_keep_the_signals_size():
    """With N(0, sqrt(2 / N)), two convolutions deep, a ReLU network's maps keep a mean square of about 1."""
    torch.manual_seed(0)
    maps = UNet(base_channels=64, depth=1, tile_size=6).enc[0](torch.randn(4, 1, 40, 40))
    assert 0.3 < maps.square().mean() < 1.5


def test_no_tile_is_larger_than_asked_for_and_none_is_needless():
    tiling = UNet(base_channels=2, depth=2, tile_size=44).tiling
    for side, passes in ((44, 1), (45, 4), (84, 4), (85, 9), (7, 1)):
        calls = []
        predict_tiled(
            lambda tile, calls=calls: calls.append(tile.shape[-1]) or tile[..., 20:-20, 20:-20],
            torch.rand(1, 1, side, side),
            tiling,
        )
        assert len(calls) == passes
        assert max(calls) <= 84
