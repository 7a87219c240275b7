"""Fast style transfer: features and losses against independent implementations, the network, and the contract."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from callbacks.writers.image_writer import ImageWriter
from datamodules.errors import UserError
from datamodules.io.image_io import read_image
from datamodules.io.paths import file_hash
from datamodules.stylization import Stylization
from experiments import ROOT
from experiments.bench import scaling_worker
from experiments.cli.main import main
from experiments.run.video import read_frames, write_video
from modules.losses.perceptual import feature_loss, gram_matrix, style_loss, total_variation
from modules.networks.tiled_transform import transform_tiled
from modules.networks.transform_net import StyleNorm, TransformNet
from modules.networks.weights import inference_state_dict, load_weights
from modules.style_transfer import StyleTransfer, read_style
from modules.tasks.stylization import parse_mixture
from tests.helpers.subprocess_helpers import forked
from tests.tasks.stylization import StylizationContract, write_stylization_recipe

STYLES = Path("experiments/methods/style/styles")
MODEL = {
    "class_path": "modules.style_transfer.StyleTransfer",
    "init_args": {
        "styles": [str(STYLES / "wave.jpg"), str(STYLES / "the_scream.jpg")],
        "style_size": 64,
        "feature_network": "vgg19-distilled",
        "content_layer": "relu3_1",
        "style_layers": ["relu1_1", "relu2_1", "relu3_1"],
        "style_weight": 10.0,
        "gram": "mean",
        "norm": "instance",
        "upsampling": "nearest",
        "base_channels": 4,
    },
}


class TestStyleTransfer(StylizationContract):
    learns_slowly = True
    model = MODEL
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicStyleTransfer"
    bf16_rtol = 0.2  # the style loss is the square of a small difference
    training_overrides = ["--model.total_images", "400", "--val_every_images", "100", "--model.learning_rate", "0.003"]
    max_objective_ratio = 0.8


def test_gram_matrix_and_losses_match_their_definitions():
    features, targets = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    psi = features.numpy().reshape(2, 3, 20)
    expected = np.einsum("ncp,ndp->ncd", psi, psi) / (3 * 4 * 5)  # eq. 3
    assert np.allclose(gram_matrix(features), expected, atol=1e-6)
    assert feature_loss(features, targets).item() == pytest.approx((features - targets).square().sum().item() / (2 * 3 * 4 * 5))
    difference = expected - gram_matrix(targets).numpy()
    frobenius = np.linalg.norm(difference, axis=(1, 2)) ** 2  # eq. 4
    grams = {"a": gram_matrix(targets)}
    assert style_loss({"a": features}, grams, "sum").item() == pytest.approx(frobenius.mean(), rel=1e-5)
    assert style_loss({"a": features}, grams, "mean").item() == pytest.approx(frobenius.mean() / 9, rel=1e-5)


def test_gram_matrix_does_not_depend_on_positions():
    features = torch.rand(1, 3, 6, 7)
    shuffled = features.flatten(2)[:, :, torch.randperm(42)].view_as(features)
    assert torch.allclose(gram_matrix(features), gram_matrix(shuffled), atol=1e-6)


def test_total_variation_of_a_ramp():
    ramp = torch.arange(4.0).expand(1, 1, 3, 4)  # 9 horizontal differences of 1
    assert total_variation(ramp).item() == 9


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_network_has_the_parameters_of_the_paper(norm):
    assert sum(parameter.numel() for parameter in TransformNet(32, norm, "transposed").parameters()) == 1_679_235


def test_style_norm_matches_instance_norm_with_the_parameters_of_each_style():
    norm, maps = StyleNorm("instance", 3, 2), torch.rand(2, 3, 5, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    outputs = norm(maps, torch.eye(2))
    for i in range(2):
        expected = F.instance_norm(maps[i : i + 1], weight=norm.weight[i], bias=norm.bias[i])
        assert torch.allclose(outputs[i : i + 1], expected, atol=1e-5)


def test_styles_take_turns_and_their_grams_are_computed_once():
    method = StyleTransfer(**MODEL["init_args"])
    method.setup("fit")
    mixture = method.train_mixture({"sample_ids": range(5, 9)})
    assert mixture.argmax(1).tolist() == [1, 0, 1, 0]
    style = read_style(STYLES / "wave.jpg", 64)
    target = gram_matrix(method.features(style, ["relu2_1"])["relu2_1"])[0]
    grams = method.gram_matrices()
    assert torch.allclose(grams["relu2_1"][0], target)
    method.compute_target_grams()
    assert method.gram_matrices()["relu2_1"] is grams["relu2_1"]
    assert all(gram.dtype == torch.float64 for gram in method.double().gram_matrices().values())  # they move with the method
    method.float()
    terms = method.objective(style[..., :64, :64], style[..., :64, :64], method.mixture_of([0]))
    assert terms["content"].item() == 0


def test_crops_are_crops_of_the_resized_photographs(photos):
    data = Stylization(str(photos), str(photos), size=64, resize=72)
    data.setup("fit")
    batch = data.crops[10, np.array([3, 3, 5])]["image"]
    assert batch.shape == (3, 3, 64, 64)
    path = sorted(photos.iterdir())[5]
    image = read_image(path).expand(3, -1, -1)
    resized = F.interpolate(
        image[None].float(), (72, round(image.shape[2] * 72 / image.shape[1])), mode="bilinear", antialias=True
    )
    full = resized[0].round()
    candidates = [
        crop
        for view in (full, full.flip(2))
        for crop in view.unfold(1, 64, 1).unfold(2, 64, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    ]
    assert any((crop - batch[2]).abs().max() <= 1 for crop in candidates)


def test_streamed_crops_are_those_of_memory(photos):
    crops = []
    for streaming in (False, True):
        data = Stylization(str(photos), str(photos), size=64, resize=72, streaming=streaming)
        data.setup("fit")
        crops.append(data.crops[10, np.array([3, 3, 5])]["image"])
    assert torch.equal(*crops)


def test_a_resumed_run_requires_the_same_painting(workdir, photos, three_photos, capfd):
    shutil.copy(ROOT / STYLES / "wave.jpg", workdir / "mine.jpg")
    model = {**MODEL, "init_args": {**MODEL["init_args"], "styles": ["mine.jpg"], "total_images": 4}}
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, model)
    assert forked(main, ["fit", str(recipe), "--run", "r"]) == 0
    record = json.loads((workdir / "runs/tiny/r/record.json").read_text())
    assert record["reference_weights"]["mine.jpg"] == file_hash(ROOT / STYLES / "wave.jpg")
    shutil.copy(ROOT / STYLES / "the_scream.jpg", workdir / "mine.jpg")
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "8"]) == 2
    assert "mine.jpg: the file has changed since the checkpoint" in capfd.readouterr().err


def test_styles_are_computed_where_the_feature_network_is():
    """Lightning sets the device of a method before it moves its networks."""
    method = StyleTransfer(**MODEL["init_args"])
    method._device = torch.device("meta")
    method.setup("fit")
    assert all(gram.device.type == "cpu" for gram in method.gram_matrices().values())


def test_predict_stylizes_images_of_any_size(workdir, photos, three_photos):
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "20"]) == 0
    (workdir / "mine").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (61, 83, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(workdir / "mine/alpha.png")
    Image.fromarray(pixels[..., 0]).save(workdir / "mine/gray.png")
    assert forked(main, ["predict", str(recipe), "--run", "r", "--input", "mine", "--output", "out"]) == 0
    sizes = {path.name: np.asarray(Image.open(path)).shape for path in (workdir / "out").iterdir()}
    assert sizes == {"alpha.png": (61, 83, 4), "gray.png": (61, 83, 3)}


def test_predict_refuses_what_it_would_overwrite_or_cannot_use(workdir, photos, three_photos, capfd):
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    weights = StyleTransfer(**MODEL["init_args"]).state_dict()
    save_file(weights, workdir / "weights.safetensors")
    (workdir / "mine/small").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(workdir / "mine/photo.jpg")
    Image.new("RGB", (64, 64)).save(workdir / "mine/photo.png")
    for name in ("a", "b"):
        Image.new("RGB", (20, 64)).save(workdir / f"mine/small/{name}.png")
    (workdir / "mine/clip.mp4").write_bytes(b"")
    predict = ["predict", str(recipe), "--ckpt", "weights.safetensors"]
    for options, reason in (
        (["--input", "mine/photo.jpg", "--output", "mine"], "--output: mine/photo.png exists, and may be one of your files"),
        (["--input", "mine/photo.jpg", "--output", ""], "--output is empty"),
        (["--input", "", "--output", "out"], "--input is empty"),
        (["--input", "mine/photo.jpg", "--output", "out", "--alpha", "2"], "alpha: '2' is not a number from 0 to 1"),
        (
            ["--input", "mine/small", "--output", "out"],
            "a.png: 20x64 pixels; mine/small/b.png: 20x64 pixels, too small: at least 41",
        ),
    ):
        assert forked(main, [*predict, *options]) == 2
        assert reason in capfd.readouterr().err
    assert not list((workdir / "out").glob("*"))
    (workdir / "mine/small").rename(workdir / "small")
    assert forked(main, [*predict, "--input", "mine", "--output", "out"]) == 0
    assert "mine/clip.mp4  skipped: give a video as --input" in capfd.readouterr().out


def test_a_checkpoint_is_evaluated_with_the_precision_of_the_committed_weights(tmp_path):
    trained, from_checkpoint, committed = (StyleTransfer([str(STYLES / "wave.jpg")], base_channels=4) for _ in range(3))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "last.ckpt")
    save_file(inference_state_dict(trained, trained.state_dict()), tmp_path / "committed.safetensors")
    load_weights(from_checkpoint, tmp_path / "last.ckpt")
    load_weights(committed, tmp_path / "committed.safetensors")
    for name, values in trained.state_dict().items():
        assert torch.equal(from_checkpoint.state_dict()[name], values.half().float())
        assert torch.equal(committed.state_dict()[name], values.half().float())


def test_predict_mixes_styles_and_the_photograph(workdir, photos, three_photos, capfd):
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "40"]) == 0
    photo = min(photos.iterdir())

    def predicted(*options):
        assert forked(main, ["predict", str(recipe), "--run", "r", "--input", str(photo), "--output", "out", *options]) == 0
        return np.asarray(Image.open(workdir / "out" / photo.name)).astype(int)

    wave, scream = predicted("--style", "wave"), predicted("--style", "the_scream")
    assert abs(predicted() - wave).max() == 0  # the first style
    assert abs(wave - scream).max() > 2
    assert abs(predicted("--style", "wave=0, the_scream=2") - scream).max() == 0
    assert abs(predicted("--alpha", "0") - np.asarray(Image.open(photo).convert("RGB"))).max() == 0
    half = predicted("--alpha", "0.5")
    assert abs(half - (wave + np.asarray(Image.open(photo).convert("RGB"))) / 2).max() <= 1
    capfd.readouterr()
    for options, reason in (
        (["--style", "monet"], "--style: no style 'monet'. Use one of: wave, the_scream"),
        (["--style", "wave=much"], "--style: 'much' is not a number"),
        (["--style", "wave=-1"], "--style: wave=-1 is negative"),
        (["--style", "wave=0"], "--style: the weights of 'wave=0' have a sum of zero"),
        (["--alpha", "2"], "alpha"),
        (["--direction", "AtoB"], "--direction: "),
    ):
        assert forked(main, ["predict", str(recipe), "--run", "r", "--input", str(photo), *options]) == 2
        assert reason in capfd.readouterr().err


def test_repeated_styles_and_names_with_separators_are_refused():
    with pytest.raises(UserError, match="--style: 'wave' is repeated"):
        parse_mixture("wave=0.3,wave=0.7", ["wave", "the_scream"])
    with pytest.raises(UserError, match="have a sum of zero or infinity"):
        parse_mixture("wave=1e308,the_scream=1e308", ["wave", "the_scream"])
    with pytest.raises(UserError, match=r"model\.styles: a=b contains '=' or ','"):
        StyleTransfer(["a=b.jpg"])


def interrupted_main(arguments: list[str]) -> int:
    """Run a command line that Ctrl-C interrupts after its third image."""
    write = ImageWriter.write_on_batch_end

    def write_and_interrupt(*args: Any) -> None:
        write(*args)
        if args[-2] == 2:  # index of the batch
            raise KeyboardInterrupt

    ImageWriter.write_on_batch_end = write_and_interrupt
    return main(arguments)


def test_video_is_stylized_frame_by_frame(workdir, photos, three_photos, capfd):
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "4"]) == 0
    (workdir / "frames").mkdir()
    photo = Image.open(min(photos.iterdir())).convert("RGB")
    for i in range(4):
        photo.crop((6 * i, 0, 6 * i + 71, 64)).save(workdir / f"frames/{i}.png")
    write_video(sorted((workdir / "frames").iterdir()), Fraction(10), workdir / "clip.mp4")
    frames, rate = read_frames(workdir / "clip.mp4", workdir / "frames")  # those of the encoded video, 70 pixels wide
    assert (len(frames), rate) == (4, 10)
    assert forked(main, ["predict", str(recipe), "--run", "r", "--input", "clip.mp4", "--output", "out"]) == 0
    assert [path.name for path in (workdir / "out").iterdir()] == ["clip.mp4"]
    (workdir / "decoded").mkdir()
    decoded, rate = read_frames(workdir / "out/clip.mp4", workdir / "decoded")
    assert (len(decoded), rate) == (4, 10)
    assert forked(main, ["predict", str(recipe), "--run", "r", "--input", "frames", "--output", "images"]) == 0
    stylized = [read_image(workdir / "images" / path.name).float() for path in frames]
    for i, path in enumerate(decoded):
        errors = [(read_image(path).float() - other).square().mean().sqrt().item() for other in stylized]
        assert errors.index(min(errors)) == i
        assert errors[i] < 25  # of 255; the compression is lossy
    capfd.readouterr()
    (workdir / "text.mp4").write_text("text")
    for video, options, reason in (
        ("text.mp4", [], "text.mp4 cannot be read as a video"),
        ("none.mp4", [], "none.mp4 cannot be read as a video: No such file or directory"),
        ("out/clip.mp4", [], "is the input and would be overwritten"),
        ("clip.mp4", ["--trainer.devices", "2"], "--trainer.devices 1"),
        ("clip.mp4", ["--style", "monet"], "--style: no style 'monet'"),
    ):
        assert forked(main, ["predict", str(recipe), "--run", "r", "--input", video, "--output", "out", *options]) == 2
        assert reason in capfd.readouterr().err

    assert forked(interrupted_main, ["predict", str(recipe), "--run", "r", "--input", "clip.mp4", "--output", "stopped"]) != 0
    assert "interrupted after 2 of 4 frames" in capfd.readouterr().out
    partial = read_frames(workdir / "stopped/clip-partial.mp4", workdir / "decoded")[0]
    assert len(partial) == 2
    assert (read_image(partial[1]).float() - stylized[1]).square().mean().sqrt() < 25


@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_tiles_equal_a_single_pass(norm, upsampling):
    network = TransformNet(4, norm, upsampling, n_styles=2).double()
    image, mixture = torch.rand(2, 3, 156, 132).double(), torch.tensor([[1.0, 0.0], [0.3, 0.7]]).double()
    with torch.no_grad():
        network(torch.rand(2, 3, 64, 64).double(), mixture)  # statistics of batch normalization
        network.eval()
        expected = network(image, mixture)
        tiled = transform_tiled(network, image, mixture, 64)
    assert (tiled - expected).abs().max() < 1e-12
    assert torch.equal(network(image, mixture), expected)  # the network is as before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model.styles", "[nowhere.jpg]"], "model.styles: no file nowhere.jpg"),
        (["--model.styles", "[small.png]"], "small.png: 20x20 pixels, too small for a style"),
        (["--model.styles", "[text.jpg]"], "text.jpg: not an image"),
        (["--model.styles", "[]"], "model.styles: no style is given"),
        (["--model.feature_weights", "other.pth"], "other.pth does not contain the weights of FeatureNetwork"),
        (["--model.content_layer", "relu9_9"], "vgg19-distilled has no layer relu9_9"),
        (["--model.style_size", "8"], "model.style_size: 8 is too small for a style"),
        (["--model.style_layers", "[]"], "model.style_layers: no layer is given"),
        (["--data.size", "32"], "32x32 pixels are too few for the network"),
    ],
)
def test_unusable_styles_and_weights_are_one_line_before_training(workdir, photos, three_photos, capfd, options, reason):
    Image.new("RGB", (20, 20)).save(workdir / "small.png")
    (workdir / "text.jpg").write_text("text")
    torch.save({"features.0.weight": torch.zeros(3)}, workdir / "other.pth")
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    assert forked(main, ["fit", str(recipe), *options]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert reason in error
    assert not list((workdir / "runs").rglob("last.ckpt"))


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_bench_trains_the_bare_loop_with_the_losses_and_the_precision_of_the_recipe(
    workdir, photos, three_photos, capfd, precision
):
    recipe = write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL)
    recipe.write_text(recipe.read_text().replace("trainer:", f"trainer:\n  precision: {precision}"))
    assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "1", "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", "share_of_peak"):
        assert results[name] > 0
    assert forked(scaling_worker.main, str(recipe), "2") == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["flops"] > 0
