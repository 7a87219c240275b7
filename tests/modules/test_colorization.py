"""Colorization: network, objective, decoding and predictions against independent implementations, and the contract."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.color import rgb2lab
from torch import nn

from callbacks.metrics.color_metrics import ColorMetrics
from datamodules.colorization import Colorization
from datamodules.errors import UserError
from datamodules.io.image_io import read_image
from datamodules.photographs import center_crop, read_resized
from datamodules.transforms.ab_bins import (
    BINS,
    annealed_mean,
    rebalancing_weights,
    smooth,
)
from datamodules.transforms.lab import rgb_to_lab
from experiments.cli.main import main
from experiments.run.recipes import find_recipe
from modules.colorization import RELEASED_URL, ColorfulColorization
from modules.colorization_baselines import RandomColorization
from modules.colorization_probe import ColorizationProbe
from modules.networks.weights import load_weights
from tests.helpers.subprocess_helpers import forked
from tests.tasks.colorization import ColorizationContract, write_colorization_recipe

MODEL = {
    "class_path": "modules.colorization.ColorfulColorization",
    "init_args": {"base_channels": 4, "learning_rate": 3e-3, "weight_decay": 0.0, "mask_gray": True},
}


class TestColorization(ColorizationContract):
    learns_slowly = True
    model = MODEL
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicColorization"
    bf16_rtol = 0.05
    training_overrides = ["--model.total_images", "1600", "--val_every_images", "200", "--model.base_channels", "8"]
    max_loss_ratio = 0.8  # 0.61 ... 0.71 over eight seeds


# Network and objective


def test_network_has_the_layers_of_the_paper():
    network = ColorfulColorization().network
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 22
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()) == 7
    assert [layer.dilation[0] for layer in convolutions] == [1] * 10 + [2] * 6 + [1] * 6
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters * 4 / 1e6 == pytest.approx(129, abs=0.6)  # megabytes in Table 1
    assert network.eval()(torch.zeros(1, 1, 64, 80)).shape == (1, 313, 16, 20)


def test_cross_entropy_is_that_of_the_definition():
    method = ColorfulColorization(base_channels=4, neighbors=5)
    generator = torch.Generator().manual_seed(0)
    method.frequencies.weights.copy_(torch.rand(313, generator=generator) + 0.5)
    logits = torch.randn(2, 313, 3, 4, generator=generator)
    ab = torch.rand(2, 2, 3, 4, generator=generator) * 100 - 50
    colors = ab.permute(0, 2, 3, 1).reshape(-1, 2)
    distances = torch.cdist(colors, BINS, compute_mode="donot_use_mm_for_euclid_dist")
    target = torch.exp(-distances.square() / 50)
    target[distances > distances.kthvalue(5, dim=1, keepdim=True).values] = 0
    target /= target.sum(1, keepdim=True)  # Z
    dense = target.view(2, 3, 4, 313).permute(0, 3, 1, 2)
    weights = method.frequencies.weights[target.argmax(1)].view(2, 3, 4)
    expected = weights * F.cross_entropy(logits, dense, reduction="none")
    assert torch.allclose(method.cross_entropy(logits, ab), expected, rtol=1e-4, atol=1e-5)


# Data and commands


def test_frequencies_are_those_of_the_photographs(photos, capsys):
    data = Colorization(str(photos), str(photos), size=32, resize=48)
    data.setup("fit")
    method = ColorfulColorization(base_channels=4)
    method.inspect_data(data)
    counts = np.zeros(313)
    for path in sorted(photos.iterdir()):
        image = read_resized(path, 48).permute(1, 2, 0).numpy()
        ab = torch.from_numpy(rgb2lab(image / 255)[::4, ::4, 1:].reshape(-1, 2))
        counts += np.bincount((ab[:, None] - BINS).square().sum(-1).argmin(1).numpy(), minlength=313)
    expected = rebalancing_weights(smooth(torch.from_numpy(counts)), 0.5)
    assert torch.allclose(method.frequencies.weights, expected.float(), rtol=0.02)
    gray = sum(
        np.abs(rgb2lab(read_resized(path, 48).permute(1, 2, 0).numpy() / 255)[..., 1:]).max() < 5 for path in photos.iterdir()
    )
    assert f"{photos.name}: {gray} of {len(list(photos.iterdir()))} photographs are gray" in capsys.readouterr().out
    with pytest.raises(UserError, match="color frequencies of other photographs"):
        data.train = "other"
        data.data_report.content_hashes = {"other": {"a": "b"}}
        method.inspect_data(data)


def test_gray_crops_have_no_weight():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 16, 16, generator=generator)
    gray = torch.rand(4, 1, 16, 16, generator=generator).expand(-1, 3, -1, -1)
    method = ColorfulColorization(base_channels=4, mask_gray=True).eval()
    mixed, colored = (method.losses({"image": batch})["cross_entropy"] for batch in (torch.cat([image, gray]), image))
    assert torch.allclose(2 * mixed, colored, rtol=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_photographs_are_all_or_a_subset(photos, streaming):
    data = Colorization(str(photos), str(photos), size=32, resize=48, streaming=streaming)
    data.setup("fit")
    images = [data.training_photograph(number) for number in data.photograph_subset()]
    assert all(torch.equal(a, read_resized(b, 48)) for a, b in zip(images, sorted(photos.iterdir()), strict=True))
    assert len(set(data.photograph_subset(3))) == 3


def test_curve_of_errors_has_its_closed_form():
    """The reference integrates the share of pixels below each threshold."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 8, 8), generator=generator).double() / 255
    ab = rgb_to_lab(image)[:, 1:] + 40 * torch.randn(1, 2, 8, 8, generator=generator, dtype=torch.float64)
    metric = ColorMetrics()
    values = metric.compute([metric.update({"image": image, "prediction": image, "ab": ab}, 0)], None)
    errors = (ab - rgb_to_lab(image)[:, 1:]).norm(dim=1).flatten().numpy()
    thresholds = np.linspace(0, 150, 100_001)
    shares = np.searchsorted(np.sort(errors), thresholds, side="right") / errors.size
    assert values["auc/raw"] == pytest.approx(100 * np.trapezoid(shares, thresholds) / 150, abs=1e-3)


def test_predict_keeps_the_lightness_of_images_of_any_size_and_mode(workdir, photos, three_photos, capfd):
    recipe = write_colorization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "8"]) == 0
    folder = workdir / "mine"
    folder.mkdir()
    color = Image.open(sorted(photos.glob("astronaut*"))[0])
    color.convert("L").resize((301, 200)).save(folder / "gray.png")
    color.convert("RGBA").save(folder / "transparent.png")
    color.convert("CMYK").save(folder / "print.tif")
    color.crop((0, 0, 1, 7)).save(folder / "tiny.png")
    Image.fromarray(np.array(color.convert("L")).astype(np.uint16) * 257).save(folder / "uint16.png")
    argv = ["predict", str(recipe), "--run", "r", "--input", str(folder)]
    assert forked(main, [*argv, "--output", "out"]) == 0
    for path in folder.iterdir():
        result = Image.open(workdir / "out" / f"{path.stem}.png")
        assert result.size == Image.open(path).size
        expected = read_image(path).expand(3, -1, -1)
        lightness = [rgb2lab(pixels / 255)[..., 0] for pixels in (np.array(result)[..., :3], expected.permute(1, 2, 0).numpy())]
        assert np.abs(lightness[0] - lightness[1]).max() < 0.8, path  # of 100; colors are rounded to 8 bits
    assert forked(main, [*argv, "--output", "vivid", "--temperature", "0.01"]) == 0
    gray = [np.array(Image.open(workdir / name / "gray.png")) for name in ("out", "vivid")]
    assert not np.array_equal(*gray)
    for words in (["--temperature", "0"], ["--style", "wave"]):
        assert forked(main, [*argv, *words]) == 2
    regression = {**MODEL, "init_args": {**MODEL["init_args"], "loss": "regression", "total_images": 8}}
    recipe = write_colorization_recipe(workdir / "l2.yaml", photos, three_photos, regression)
    assert forked(main, ["fit", str(recipe), "--run", "r"]) == 0
    assert forked(main, ["predict", str(recipe), "--input", str(folder), "--temperature", "0.5"]) == 2
    error = capfd.readouterr().err
    assert "--style: " in error
    assert "predicts no distribution of colors" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 30}, "data.size: 30 is not a multiple of 8. Use 32"),
        ({"size": 32, "resize": 50}, "data.resize: 50 is not a multiple of 8. Use 56"),
        ({"size": 64, "resize": 48}, "data.resize: 48 is smaller than data.size: 64"),
    ],
)
def test_invalid_sizes_are_refused(photos, arguments, message):
    with pytest.raises(UserError, match=message):
        Colorization(str(photos), str(photos), **arguments)


def test_data_that_cannot_be_used_are_refused(workdir, photos):
    for folder in ("a/images", "b/images"):
        (workdir / folder).mkdir(parents=True)
        shutil.copy(next(photos.iterdir()), workdir / folder)
    with pytest.raises(UserError, match=r"data.val: .*b/images and .*a/images have the same name"):
        Colorization(str(workdir / "a/images"), str(workdir / "b/images"))
    data = Colorization("digits/train", "digits/val", size=24, resize=24, streaming=True)
    with pytest.raises(UserError, match=r"data.streaming: digits/train"):
        data.setup("fit")


@pytest.mark.parametrize("arguments", [{"uniform_weight": 1.5}, {"uniform_weight": 0.0}, {"neighbors": 400}])
def test_invalid_settings_are_refused(arguments):
    with pytest.raises(UserError, match=f"model.{next(iter(arguments))}"):
        ColorfulColorization(**arguments)


def test_learning_rate_has_steps():
    method = ColorfulColorization(base_channels=4, learning_rate=3e-5, learning_rate_steps={200: 3e-6, 100: 1e-5})
    assert [method.schedule(images) for images in (0, 99, 100, 199, 200)] == [3e-5, 3e-5, 1e-5, 1e-5, 3e-6]
    assert [stage.start for stage in method.stages()] == [0, 100, 200]


def authors_network(width):
    """Return the layers of the authors' PyTorch code, in its layout."""

    def convolutions(before, after, count, stride=1, dilation=1):
        layers = []
        for number in range(count):
            step = stride if number == count - 1 else 1
            layers += [nn.Conv2d(before, after, 3, step, dilation, dilation), nn.ReLU()]
            before = after
        return nn.Sequential(*layers, nn.BatchNorm2d(after))

    sides = [(1, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width), *[(8 * width, 8 * width)] * 3]
    counts, strides, dilations = (2, 2, 3, 3, 3, 3, 3), (2, 2, 2, 1, 1, 1, 1), (1, 1, 1, 1, 2, 2, 1)
    network = nn.Module()
    for number, settings in enumerate(zip(sides, counts, strides, dilations, strict=True), start=1):
        (before, after), count, stride, dilation = settings
        network.add_module(f"model{number}", convolutions(before, after, count, stride, dilation))
    last = 4 * width
    up = [nn.ConvTranspose2d(2 * last, last, 4, 2, 1), nn.ReLU()]
    same = [nn.Conv2d(last, last, 3, padding=1), nn.ReLU(), nn.Conv2d(last, last, 3, padding=1), nn.ReLU()]
    network.add_module("model8", nn.Sequential(*up, *same, nn.Conv2d(last, 313, 1)))
    network.add_module("model_out", nn.Conv2d(313, 2, 1, bias=False))
    return network


def test_weights_in_the_layout_of_the_authors_give_the_output_of_their_layers(workdir):
    torch.manual_seed(0)
    reference = authors_network(4).eval()
    for layer in reference.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean):
                nn.init.uniform_(values, 0.5, 1.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    reference.model_out.weight.data = BINS.T[:, :, None, None] / 110
    weights = {name: value for name, value in reference.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(weights, workdir / "authors.pth")
    method = ColorfulColorization(base_channels=4, affine=True, temperature=1.0).eval()
    load_weights(method, workdir / "authors.pth")
    lightness = 100 * torch.rand(1, 1, 32, 40)
    features = (lightness - 50) / 100
    for number in range(1, 9):
        features = getattr(reference, f"model{number}")(features)
    expected = 110 * F.interpolate(reference.model_out(features.softmax(1)), scale_factor=4, mode="bilinear")
    assert torch.allclose(method.predict_ab(lightness, {}), expected, atol=1e-3)
    with pytest.raises(UserError, match="does not fit this model"):
        load_weights(ColorfulColorization(base_channels=4), workdir / "authors.pth")  # without scales
    torch.save({**weights, "model8up.0.weight": weights["model8.0.weight"]}, workdir / "siggraph17.pth")
    with pytest.raises(UserError, match="model8up"):
        load_weights(method, workdir / "siggraph17.pth")


def test_colors_are_decoded_in_full_precision_under_autocast():
    """Under autocast, only the network computes in bf16: the decoding of the same logits does not change."""
    method = ColorfulColorization(base_channels=4).eval()
    logits = 4 * torch.randn(1, 313, 6, 7, generator=torch.Generator().manual_seed(0))
    method.forward = lambda lightness: logits
    expected = method.predict_ab(torch.zeros(1, 1, 24, 28), {})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.predict_ab(torch.zeros(1, 1, 24, 28), {}), expected)
        assert not torch.equal(F.interpolate(annealed_mean(logits, 0.38), scale_factor=4, mode="bilinear"), expected)


def test_released_weights_that_cannot_be_downloaded_are_named(workdir, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_HOME", str(workdir / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_download)
    assert forked(main, ["predict", "colorization/released", "--input", "photo.jpg"]) == 2
    assert RELEASED_URL in capfd.readouterr().err
    assert not find_recipe("colorization/released").is_trainable  # `reproduce --run` evaluates it
    assert find_recipe("colorization/released_code").is_trainable


def refuse_download(url, *args, **kwargs):
    raise OSError(f"no connection to {url}")


def test_training_starts_from_the_weights_of_another_network(workdir, photos, three_photos):
    """A regression takes all but the last convolution of a classification, and keeps its own."""
    torch.manual_seed(1)
    source = ColorfulColorization(base_channels=4)
    torch.save({"state_dict": source.state_dict()}, workdir / "source.ckpt")
    settings = {"base_channels": 4, "initial_weights": str(workdir / "source.ckpt")}
    same, other = ColorfulColorization(**settings), ColorfulColorization("regression", **settings)
    own = {name: value.clone() for name, value in other.state_dict().items()}
    for method in (same, other):
        method.setup("fit")
    assert all(
        torch.equal(value, source.state_dict()[name]) for name, value in same.network.state_dict(prefix="network.").items()
    )
    for name, value in other.network.state_dict(prefix="network.").items():
        assert torch.equal(value, own[name] if name.startswith("network.8.") else source.state_dict()[name])
    affine = ColorfulColorization(base_channels=4, affine=True)
    torch.save({"state_dict": affine.state_dict()}, workdir / "affine.ckpt")
    for wrong in (
        ColorfulColorization(base_channels=4, initial_weights="affine.ckpt"),
        ColorizationProbe("affine.ckpt", base_channels=4),
    ):
        with pytest.raises(UserError, match=r"affine.ckpt does not fit this model"):
            wrong.setup("fit")
    torch.save({"network.encoder.weight": torch.zeros(1)}, workdir / "other.pth")
    with pytest.raises(UserError, match=r"other.pth does not fit this model"):
        ColorizationProbe("other.pth", base_channels=4).setup("fit")
    with pytest.raises(UserError, match=r"source.ckpt does not fit this model"):
        ColorfulColorization(base_channels=8, initial_weights=settings["initial_weights"]).setup("fit")
    recipe = write_colorization_recipe(
        workdir / "tiny.yaml", photos, three_photos, {**MODEL, "init_args": {**MODEL["init_args"], **settings}}
    )
    argv = ["fit", str(recipe), "--run", "r", "--model.total_images"]
    assert forked(main, [*argv, "8"]) == 0
    torch.save({"state_dict": other.state_dict()}, workdir / "source.ckpt")
    assert forked(main, [*argv, "16"]) == 2  # the file has changed


def test_random_colors_are_those_of_one_training_photograph(photos, three_photos):
    data = Colorization(str(photos), str(three_photos), [str(three_photos)], size=32, resize=48)
    data.setup("test")
    method = RandomColorization()
    method.trainer = SimpleNamespace(datamodule=data)
    crops = [center_crop(read_resized(path, 48), 48).permute(1, 2, 0).numpy() for path in sorted(photos.iterdir())]
    references = [torch.from_numpy(rgb2lab(crop / 255)[..., 1:]).permute(2, 0, 1) for crop in crops]
    chosen = set()
    for index in range(20):
        batch = {"index": torch.tensor([index])}
        ab = method.predict_ab(torch.zeros(1, 1, 48, 48), batch)[0]
        matches = [i for i, reference in enumerate(references) if torch.allclose(ab.double(), reference, atol=1e-3)]
        assert len(matches) >= 1
        assert torch.equal(ab, method.predict_ab(torch.zeros(1, 1, 48, 48), batch)[0])
        chosen |= set(matches)
    assert len(chosen) > 3
    assert data.train_fingerprint()[0] == photos.name  # the photographs are in the record
    with pytest.raises(UserError, match="random colors"):
        method.predict_ab(torch.zeros(1, 1, 48, 48), {})


def test_predict_of_large_and_elongated_photographs(monkeypatch):
    """The network's input is limited, and colors are added in strips, with the result of the whole image."""
    method = ColorfulColorization(base_channels=4).eval()
    sizes = []

    def colors(lightness, batch):
        sizes.append(tuple(lightness.shape[-2:]))
        return 30 * torch.ones(1, 2, *lightness.shape[-2:])

    monkeypatch.setattr(method, "predict_ab", colors)
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr("modules.tasks.colorization.PREDICTION_PIXELS", 2**16)
    for height, width in ((8, 4000), (4000, 8), (300, 200)):
        image = torch.rand(1, 3, height, width, generator=generator)
        whole = method.predict_step({"image": image}, 0)["prediction"]
        with monkeypatch.context() as patch:
            patch.setattr("modules.tasks.colorization.STRIP_PIXELS", 900)
            assert torch.equal(method.predict_step({"image": image}, 0)["prediction"], whole)
        assert whole.shape == image.shape
    for height, width in sizes:
        assert not height % 8
        assert not width % 8
        assert height * width <= 1.05 * 2**16
    assert sizes[-1] == (312, 208)
