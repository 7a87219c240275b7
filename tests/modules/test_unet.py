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
from tests.helpers.subprocess_helpers import forked
from tests.tasks.segmentation import SegmentationContract


class TestUNet(SegmentationContract):
    learns_slowly = True
    model = {"class_path": "modules.unet.UNet", "init_args": {"base_channels": 8, "depth": 2, "tile_size": 44}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicUNet"
    samples = {"crop": 28, "margin": 40}
    training_overrides = [
        "--model.total_images",
        "1600",
        "--val_every_images",
        "400",
        "--model.learning_rate",
        "0.003",
        "--model.dropout",
        "0",
    ]
    min_score = 0.7  # 8 seeds, AVX-512: 0.89 ... 0.96

    @pytest.mark.slow
    def test_bench_reports_metrics(self, workdir, recipe, capfd):
        assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "2", "--json"]) == 0
        metrics = json.loads(capfd.readouterr().out)
        assert metrics["megapixels_per_second"] > 0
        assert metrics["ratio_to_bare"] > 0.2
        assert metrics["images_per_second_pil"] > 0


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UNet(base_channels=4, depth=2, tile_size=12).eval().double()


def test_network_matches_the_paper():
    """Figure 1: input 572, output 388, 23 convolutions, 31,030,658 parameters."""
    with torch.device("meta"):
        network = UNet()
        assert network(torch.rand(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert sum(p.numel() for p in network.parameters()) == 31_030_658
    assert sum(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) for layer in network.modules()) == 23


def test_tiling_matches_output_size_at_each_depth():
    for depth in (1, 2, 3, 4):
        tiling = UNet(base_channels=1, depth=depth, tile_size=Tiling(2**10 + 4, 0, 2**depth, 4).round_up(60)).tiling
        side = tiling.tile_size + tiling.margin
        with torch.device("meta"):
            logits = UNet(base_channels=1, depth=depth, tile_size=tiling.tile_size)(torch.rand(1, 1, side, side))
        assert logits.shape[-1] == tiling.tile_size


def test_every_layer_is_compiled(monkeypatch):
    """A `ModuleList` is never called: compiled itself, it would leave its layers uncompiled."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    method = UNet(base_channels=4, depth=2, tile_size=12)
    method.compile_networks()
    layers = {layer for part in compiled for layer in part.modules()}
    convolutions = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    assert {layer for layer in method.modules() if isinstance(layer, convolutions)} <= layers
    assert not [part for part in compiled if isinstance(part, torch.nn.ModuleList)]


def test_invalid_sizes_raise_user_error():
    with pytest.raises(UserError, match=r"U-Net: 570x572 pixels .* 572"):
        UNet(base_channels=1)(torch.rand(1, 1, 572, 570))
    with pytest.raises(UserError, match=r"model\.tile_size: 380 .* 388"):
        UNet(base_channels=1, tile_size=380)


@pytest.mark.parametrize(("height", "width"), [(37, 52), (12, 100), (5, 3), (1, 40)])
def test_tiled_prediction_equals_a_single_pass(network, height, width):
    image = torch.rand(2, 1, height, width, dtype=torch.float64)
    tiling = network.tiling
    sides = (tiling.round_up(height), tiling.round_up(width))
    padded = np.pad(
        image.numpy(),
        [(0, 0), (0, 0), *((20, 20 + side - length) for side, length in zip(sides, (height, width), strict=True))],
        "reflect",
    )
    expected = network(torch.from_numpy(padded)).softmax(1)[..., :height, :width]
    assert torch.allclose(network.probabilities(image), expected, atol=1e-12)


def test_crop_reflect_matches_numpy_reflect_padding():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    expected = np.pad(image[0, 0].numpy(), ((3, 9), (3, 7)), mode="reflect")
    assert (crop_reflect(image, 0, 0, (9, 8), 6)[0, 0].numpy() == expected).all()


def test_dihedral_views_are_distinct_and_invertible():
    image = torch.rand(3, 5, 5)
    views = [apply_dihedral(image, view) for view in TTA_VIEWS[8]]
    assert len({view.numpy().tobytes() for view in views}) == 8
    for view, transformed in zip(TTA_VIEWS[8], views, strict=True):
        assert torch.equal(apply_dihedral(transformed, INVERSE.get(view, view)), image)
    rotations = {np.rot90(image.numpy(), k, (1, 2)).tobytes() for k in range(4)}
    assert {apply_dihedral(image, view).contiguous().numpy().tobytes() for view in TTA_VIEWS[4]} == rotations


def test_probabilities_with_tta_are_rotation_equivariant(network):
    network.tta_views = 8
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    rotated = network.probabilities(image.rot90(1, (2, 3)))
    assert torch.allclose(rotated, network.probabilities(image).rot90(1, (2, 3)), atol=1e-12)


def test_predict_step_is_the_argmax_of_probabilities(network):
    image = torch.rand(1, 1, 30, 41, dtype=torch.float64)
    classes = network.predict_step({"image": image}, 0)["prediction"]
    assert classes.dtype == torch.uint8
    assert torch.equal(classes, network.probabilities(image).argmax(1).byte())


def test_loss_is_weighted_cross_entropy():
    method = UNet(base_channels=1, depth=1, tile_size=6).eval()
    batch = {"image": torch.rand(2, 1, 22, 22), "mask": torch.randint(0, 2, (2, 6, 6)), "weight": torch.rand(2, 6, 6)}
    batch["mask"][0, 0, :3] = 255
    log_probs = method(batch["image"]).log_softmax(1)
    expected = sum(
        -batch["weight"][n, i, j] * log_probs[n, batch["mask"][n, i, j], i, j]
        for n in range(2) for i in range(6) for j in range(6) if batch["mask"][n, i, j] != 255
    ) / 72  # fmt: skip
    assert method.losses(batch)["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match=r"data\.margin: 18 .*16"):
        method.losses({**batch, "mask": batch["mask"][:, 1:-1, 1:-1]})


def test_initial_weights_preserve_the_mean_square_of_feature_maps():
    """With N(0, sqrt(2 / N)), the mean square stays near 1 after two convolutions with ReLU."""
    torch.manual_seed(0)
    features = UNet(base_channels=64, depth=1, tile_size=6).enc[0](torch.randn(4, 1, 40, 40))
    assert 0.3 < features.square().mean() < 1.5


def test_tile_sizes_are_bounded_and_tile_count_is_minimal():
    tiling = UNet(base_channels=2, depth=2, tile_size=44).tiling
    for side, passes in ((44, 1), (45, 4), (84, 4), (85, 9), (7, 1)):
        input_sides = []
        predict_tiled(
            lambda tile, input_sides=input_sides: input_sides.append(tile.shape[-1]) or tile[..., 20:-20, 20:-20],
            torch.rand(1, 1, side, side),
            tiling,
        )
        assert len(input_sides) == passes
        assert max(input_sides) <= 84
