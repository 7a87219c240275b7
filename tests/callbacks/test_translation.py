import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix

from callbacks.metrics.cycle_l1 import CycleL1
from callbacks.metrics.fcn_score import FCNScore
from callbacks.metrics.translation_fid import TranslationFID
from callbacks.visualization.previews import PreviewImages
from datamodules.catalog.masked_images import list_masked_images
from datamodules.catalog.palettes import PALETTES, colorize, nearest_class, palette
from datamodules.errors import UserError
from experiments import ROOT
from experiments.cli.main import main
from experiments.run.recipes import find_recipe
from modules.cyclegan import CycleGAN
from modules.smp import SMPSegmenter
from modules.unet import UNet
from tests.helpers.subprocess_helpers import forked


def outputs(direction, count=1, **entries):
    generator = torch.Generator().manual_seed(len(direction) + count)
    images = {
        name: torch.rand(count, 3, 12, 16, generator=generator)
        for name in ("image", "prediction", "reconstruction", "identity")
    }
    return {**images, "direction": [direction] * count, **entries}


def test_cycle_and_identity_errors_are_mean_absolute_differences():
    metric = CycleL1()
    to_b, to_a = outputs("AtoB", 2), outputs("BtoA", 3)
    states = [metric.update(to_b, i) for i in range(2)] + [metric.update(to_a, i) for i in range(3)]
    results = metric.compute(states, None)
    for direction, batch, identity in (("AtoB", to_b, "BtoA"), ("BtoA", to_a, "AtoB")):
        arrays = {name: value.double().numpy() for name, value in batch.items() if name != "direction"}
        assert results[f"cycle-l1/{direction}"] == pytest.approx(
            np.abs(arrays["reconstruction"] - arrays["image"]).mean(), abs=1e-7
        )
        assert results[f"change-l1/{direction}"] == pytest.approx(
            np.abs(arrays["prediction"] - arrays["image"]).mean(), abs=1e-7
        )
        assert results[f"identity-l1/{identity}"] == pytest.approx(
            np.abs(arrays["identity"] - arrays["image"]).mean(), abs=1e-7
        )


@pytest.mark.parametrize("name", PALETTES)
def test_palette_colors_are_distinct_and_decode_to_their_classes(name):
    colors = palette(name)
    assert len({tuple(color) for color in colors.tolist()} | {(0, 0, 0)}) == len(colors) + 1
    mask = np.arange(len(colors)).repeat(4).reshape(-1, 4)
    assert np.array_equal(nearest_class(colorize(mask, colors) / 255, colors), mask)
    shifted = (colorize(mask, colors).float() + 5).clamp(0, 255) / 255  # close to the palette colors, but not equal
    assert np.array_equal(nearest_class(shifted, colors), mask)


def test_unknown_palette_raises():
    with pytest.raises(UserError, match=r"voc .*camvid, cityscapes"):
        palette("voc")


class NearestColorSegmenter(UNet):
    """A segmenter that predicts the class of the nearest palette color."""

    def __init__(self):
        super().__init__(3, 11, base_channels=2, depth=1)

    def probabilities(self, image):
        classes = nearest_class(image[0], palette("camvid"))
        return torch.nn.functional.one_hot(classes, 11).permute(2, 0, 1)[None].float()


def test_fcn_scores_match_sklearn():
    score = FCNScore(NearestColorSegmenter(), "weights")
    generator = np.random.default_rng(0)
    mask = generator.integers(0, 11, (12, 16))
    mask[0, :5] = 255
    noisy_mask = np.where(generator.random(mask.shape) < 0.3, generator.integers(0, 11, mask.shape), mask)
    image = colorize(np.where(noisy_mask == 255, 0, noisy_mask), palette("camvid"))[None] / 255
    other = image.flip(2)  # must not affect any metric
    batch = {"dataset": ["some"], "mask": torch.from_numpy(mask)[None]}
    to_labels = {**batch, "image": other, "prediction": image, "direction": ["AtoB"]}
    to_photograph = {**batch, "image": other, "prediction": image, "direction": ["BtoA"]}
    real = {**batch, "image": image, "prediction": other, "direction": ["AtoB"]}
    results = score.compute([score.update(to_labels, 0), score.update(to_photograph, 0)], None)
    results |= {name: value for name, value in score.compute([score.update(real, 0)], None).items() if "score-real" in name}
    valid = mask != 255
    matrix = confusion_matrix(mask[valid], np.where(noisy_mask == 255, 0, noisy_mask)[valid], labels=range(11))
    hits = matrix.diagonal()
    expected = {
        "pixel-accuracy": hits.sum() / matrix.sum(),
        "class-accuracy": (hits / matrix.sum(1)).mean(),
        "class-iou": (hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean(),
    }
    for kind in ("fcn-score", "nearest-color", "fcn-score-real"):
        for name, value in expected.items():
            assert results[f"{kind}/{name}"] == pytest.approx(value, abs=1e-12)


def test_smaller_label_maps_are_resized_by_nearest_neighbor():
    score = FCNScore(NearestColorSegmenter(), "weights")
    mask = np.array([[0, 1], [2, 3]]).repeat(6, 0).repeat(8, 1)
    small = colorize(np.array([[0, 1], [2, 3]]), palette("camvid"))[None] / 255
    batch = {"image": small, "prediction": small, "mask": torch.from_numpy(mask)[None], "direction": ["AtoB"]}
    assert score.update(batch, 0)["nearest-color"].diagonal().sum() == mask.size


def test_segmenter_without_weights_raises(workdir):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(test=["camvid/test"]))
    with pytest.raises(UserError, match=r"FCNScore\.weights: no file deeplab/camvid\.safetensors in .*data"):
        FCNScore(NearestColorSegmenter(), "deeplab/camvid.safetensors").setup(trainer, None, "test")


def test_colorized_camvid_labels_decode_to_the_labels(with_real_data):
    for masked_image in list_masked_images("camvid/val")[:3]:
        mask = masked_image.read_mask()
        decoded = nearest_class(colorize(mask, palette("camvid")) / 255, palette("camvid")).numpy()
        assert np.array_equal(decoded[mask != 255], mask[mask != 255])


def test_preview_shows_translations_and_reconstructions_in_both_directions(tmp_path):
    previews = PreviewImages(tmp_path)
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False, loggers=[], state=state)
    method = CycleGAN(crop=32, base_channels=2, n_residual_blocks=0)
    method.images_seen = 30
    previews.on_validation_epoch_start(trainer, method)
    batches = [outputs("AtoB", 1), outputs("AtoB", 2), outputs("AtoB", 3), outputs("AtoB", 4), outputs("BtoA", 5)]
    for i, batch in enumerate(batches):
        previews.on_validation_batch_end(trainer, method, batch, None, i)
    previews.on_validation_epoch_end(trainer, method)
    preview = np.asarray(Image.open(tmp_path / "000000030.png"))
    assert preview.shape == (4 * (12 + 4), 3 * 16, 3)  # three rows of A, one of B
    for row, batch in enumerate((*batches[:3], batches[4])):
        for column, name in enumerate(("image", "prediction", "reconstruction")):
            cell = preview[row * 16 : row * 16 + 12, column * 16 : column * 16 + 16]
            assert np.abs(cell - batch[name][0].permute(1, 2, 0).numpy() * 255).max() <= 0.501


def test_fcn_scores_in_a_record_match_a_direct_evaluation(workdir, with_real_data):
    """Resize and segment every photograph of the CamVid validation split without the code of the callback."""
    recipe, weights = workdir / "evaluated.yaml", ROOT / "experiments/methods/deeplab/weights/camvid.safetensors"
    settings = find_recipe("cyclegan/camvid").content
    settings["model"]["init_args"] |= {"base_channels": 2, "n_residual_blocks": 0, "total_images": 2}
    settings["data"]["init_args"] |= {"train": "camvid/val", "test": ["camvid/val"], "max_val_images": 1}
    recipe.write_text(yaml.safe_dump({**settings, "val_every_images": 2}))
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    record = json.loads((workdir / "runs" / "evaluated" / "one" / "record.json").read_text())
    network = SMPSegmenter("deeplabv3plus", "timm-mobilenetv3_small_minimal_100", None, num_classes=11, tile_size=256)
    network.load_state_dict(load_file(weights))
    matrix = np.zeros((11, 11))
    for image in sorted((with_real_data / "CamVid" / "val").glob("*.png")):
        small = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(small, (64, 64), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        resized = torch.nn.functional.interpolate(small, (180, 240), mode="bilinear", antialias=True)
        with torch.no_grad():
            probabilities = network.eval().test_step({"image": resized}, 0)["prediction"]
        predicted = torch.nn.functional.interpolate(probabilities, (360, 480), mode="bilinear")[0].argmax(0).numpy()
        labels = np.asarray(Image.open(image.parent.parent / "valannot" / image.name))
        matrix += confusion_matrix(labels[labels < 11], predicted[labels < 11], labels=range(11))
    metrics = record["metrics"]["camvid-val"]
    hits = matrix.diagonal()
    assert metrics["fcn-score-real/pixel-accuracy"]["mean"] == pytest.approx(hits.sum() / matrix.sum(), abs=1e-6)
    iou = (hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean()
    assert metrics["fcn-score-real/class-iou"]["mean"] == pytest.approx(iou, abs=1e-6)
    assert 0 < metrics["fcn-score/pixel-accuracy"]["mean"] < metrics["fcn-score-real/pixel-accuracy"]["mean"]
    assert list(record["evaluator_weights"]) == ["FCNScore"]


def test_translation_fid_compares_with_the_target_domain():
    class Network:
        name = "means"

        def __call__(self, images):
            return {"features": images.float().mean((2, 3)) / 255}

    metric = TranslationFID()
    metric.features.network = Network()
    to_b, to_a = outputs("AtoB", 40), outputs("BtoA", 50)
    to_b["prediction"] = to_b["prediction"] * 0.5
    for batch, count in ((to_b, 40), (to_a, 50)):
        for i in range(count):
            metric.store("set", f"{batch['direction'][i]} {i}", metric.update(batch, i))
    results = metric.compute_images(metric.merge([metric.state])["set"], None)["all"]

    def frechet_distance(translated, real):
        from scipy.linalg import sqrtm

        translated, real = (((x * 255 + 0.5).floor() / 255).mean((2, 3)).double().numpy() for x in (translated, real))
        cov_translated, cov_real = (np.cov(x, rowvar=False) for x in (translated, real))
        mean_difference = translated.mean(0) - real.mean(0)
        return mean_difference @ mean_difference + np.trace(
            cov_translated + cov_real - 2 * sqrtm(cov_translated @ cov_real).real
        )

    assert results["fid/means-AtoB-40"] == pytest.approx(frechet_distance(to_b["prediction"], to_a["image"]), abs=1e-5)
    assert results["fid/means-BtoA-50"] == pytest.approx(frechet_distance(to_a["prediction"], to_b["image"]), abs=1e-5)
