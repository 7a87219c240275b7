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
from callbacks.metrics.fcn_score import ROOT, FCNScore
from callbacks.metrics.translation_fid import TranslationFID
from callbacks.visualization.previews import PreviewImages
from datamodules.catalog.masked_images import list_masked_images
from datamodules.catalog.palettes import PALETTES, colorize, nearest_class, palette
from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run.recipes import find_recipe
from modules.smp import SMPSegmenter
from modules.unet import UNet
from tests.helpers.subprocess_helpers import forked


def outputs(direction, count=1, **more):
    generator = torch.Generator().manual_seed(len(direction) + count)
    pictures = {
        name: torch.rand(count, 3, 12, 16, generator=generator) for name in ("image", "prediction", "reconstruction", "same")
    }
    return {**pictures, "direction": [direction] * count, **more}


def test_cycle_and_identity_errors_are_mean_absolute_differences():
    quality = CycleL1()
    to_b, to_a = outputs("AtoB", 2), outputs("BtoA", 3)
    kept = [quality.update(to_b, i) for i in range(2)] + [quality.update(to_a, i) for i in range(3)]
    found = quality.compute(kept, None)
    for direction, out, identity in (("AtoB", to_b, "BtoA"), ("BtoA", to_a, "AtoB")):
        of = {name: value.double().numpy() for name, value in out.items() if name != "direction"}
        assert found[f"cycle-l1/{direction}"] == pytest.approx(np.abs(of["reconstruction"] - of["image"]).mean(), abs=1e-7)
        assert found[f"change-l1/{direction}"] == pytest.approx(np.abs(of["prediction"] - of["image"]).mean(), abs=1e-7)
        assert found[f"identity-l1/{identity}"] == pytest.approx(np.abs(of["same"] - of["image"]).mean(), abs=1e-7)


@pytest.mark.parametrize("name", PALETTES)
def test_colours_are_distinct_and_come_back(name):
    colours = palette(name)
    assert len({tuple(colour) for colour in colours.tolist()} | {(0, 0, 0)}) == len(colours) + 1
    mask = np.arange(len(colours)).repeat(4).reshape(-1, 4)
    assert np.array_equal(nearest_class(colorize(mask, colours) / 255, colours), mask)
    shifted = (colorize(mask, colours).float() + 5).clamp(0, 255) / 255  # not exactly the colours
    assert np.array_equal(nearest_class(shifted, colours), mask)


def test_unknown_colours_are_refused():
    with pytest.raises(UserError, match="no colours are known for the classes of voc; sets that have: camvid, cityscapes"):
        palette("voc")


class Known(UNet):
    """A judge that knows the classes from the colours."""

    def __init__(self):
        super().__init__(3, 11, base_channels=2, depth=1)

    def probabilities(self, image):
        classes = nearest_class(image[0], palette("camvid"))
        return torch.nn.functional.one_hot(classes, 11).permute(2, 0, 1)[None].float()


def test_fcn_scores_are_sklearns():
    score = FCNScore(Known(), "weights")
    generator = np.random.default_rng(0)
    mask = generator.integers(0, 11, (12, 16))
    mask[0, :5] = 255
    wrong = np.where(generator.random(mask.shape) < 0.3, generator.integers(0, 11, mask.shape), mask)
    picture = colorize(np.where(wrong == 255, 0, wrong), palette("camvid"))[None] / 255
    other = picture.flip(2)  # what no figure may be of
    out = {"dataset": ["some"], "mask": torch.from_numpy(mask)[None]}
    to_labels = {**out, "image": other, "prediction": picture, "direction": ["AtoB"]}
    to_photograph = {**out, "image": other, "prediction": picture, "direction": ["BtoA"]}
    real = {**out, "image": picture, "prediction": other, "direction": ["AtoB"]}
    found = score.compute([score.update(to_labels, 0), score.update(to_photograph, 0)], None)
    found |= {name: value for name, value in score.compute([score.update(real, 0)], None).items() if "score-real" in name}
    counted = mask != 255
    matrix = confusion_matrix(mask[counted], np.where(wrong == 255, 0, wrong)[counted], labels=range(11))
    right = matrix.diagonal()
    expected = {
        "pixel-accuracy": right.sum() / matrix.sum(),
        "class-accuracy": (right / matrix.sum(1)).mean(),
        "class-iou": (right / (matrix.sum(0) + matrix.sum(1) - right)).mean(),
    }
    for kind in ("fcn-score", "nearest-color", "fcn-score-real"):
        for name, value in expected.items():
            assert found[f"{kind}/{name}"] == pytest.approx(value, abs=1e-12)


def test_smaller_label_maps_are_enlarged_by_what_is_nearest():
    score = FCNScore(Known(), "weights")
    mask = np.array([[0, 1], [2, 3]]).repeat(6, 0).repeat(8, 1)
    small = colorize(np.array([[0, 1], [2, 3]]), palette("camvid"))[None] / 255
    out = {"image": small, "prediction": small, "mask": torch.from_numpy(mask)[None], "direction": ["AtoB"]}
    assert score.update(out, 0)["nearest-color"].diagonal().sum() == mask.size


def test_judge_without_weights_is_refused(workplace):
    running = SimpleNamespace(datamodule=SimpleNamespace(test=["camvid/test"]))
    with pytest.raises(
        UserError, match=r"FCNScore\.weights: no file deeplab/camvid\.safetensors, neither here nor below .*data"
    ):
        FCNScore(Known(), "deeplab/camvid.safetensors").setup(running, None, "test")


def test_camvids_label_maps_decode_to_the_labels(with_real_data):
    for labelled in list_masked_images("camvid/val")[:3]:
        mask = labelled.read_mask()
        decoded = nearest_class(colorize(mask, palette("camvid")) / 255, palette("camvid")).numpy()
        assert np.array_equal(decoded[mask != 255], mask[mask != 255])


def test_the_sheet_shows_what_goes_there_and_comes_back_in_both_directions(tmp_path):
    samples = PreviewImages(tmp_path, rows=2)
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False, loggers=[], state=state)
    method = SimpleNamespace(images_seen=30)
    samples.on_validation_epoch_start(trainer, method)
    shown = [outputs(direction, count) for direction, count in (("AtoB", 1), ("AtoB", 2), ("AtoB", 3), ("BtoA", 4))]
    for i, out in enumerate(shown):
        samples.on_validation_batch_end(trainer, method, out, None, i)
    samples.on_validation_epoch_end(trainer, method)
    sheet = np.asarray(Image.open(tmp_path / "000000030.png"))
    assert sheet.shape == (3 * (12 + 4), 3 * 16, 3)  # two of A, the one of B
    for row, out in enumerate((shown[0], shown[1], shown[3])):
        for column, name in enumerate(("image", "prediction", "reconstruction")):
            cell = sheet[row * 16 : row * 16 + 12, column * 16 : column * 16 + 16]
            assert np.abs(cell - out[name][0].permute(1, 2, 0).numpy() * 255).max() <= 0.501


def test_the_judges_scores_in_a_record_are_its_own(workplace, with_real_data):
    """Every photograph of CamVid's val, made small, enlarged and judged without any of the callback's code."""
    recipe, judge = workplace / "judged.yaml", ROOT / "experiments/methods/deeplab/weights/camvid.safetensors"
    settings = find_recipe("cyclegan/camvid").content
    settings["model"]["init_args"] |= {"base_channels": 2, "n_residual_blocks": 0, "total_images": 2}
    settings["data"]["init_args"] |= {"train": "camvid/val", "test": ["camvid/val"], "max_val_images": 1}
    recipe.write_text(yaml.safe_dump({**settings, "val_every_images": 2}))
    assert forked(main, ["fit", str(recipe), "--run", "one"]) == 0
    record = json.loads((workplace / "runs" / "judged" / "one" / "record.json").read_text())
    network = SMPSegmenter("deeplabv3plus", "timm-mobilenetv3_small_minimal_100", None, classes=11, tile_size=256)
    network.load_state_dict(load_file(judge))
    matrix = np.zeros((11, 11))
    for picture in sorted((with_real_data / "CamVid" / "val").glob("*.png")):
        small = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(small, (64, 64), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        seen = torch.nn.functional.interpolate(small, (180, 240), mode="bilinear", antialias=True)
        with torch.no_grad():
            given = network.eval().test_step({"image": seen}, 0)["prediction"]
        found = torch.nn.functional.interpolate(given, (360, 480), mode="bilinear")[0].argmax(0).numpy()
        labels = np.asarray(Image.open(picture.parent.parent / "valannot" / picture.name))
        matrix += confusion_matrix(labels[labels < 11], found[labels < 11], labels=range(11))
    compute_metric = record["metrics"]["camvid-val"]
    right = matrix.diagonal()
    assert compute_metric["fcn-score-real/pixel-accuracy"]["mean"] == pytest.approx(right.sum() / matrix.sum(), abs=1e-6)
    iou = (right / (matrix.sum(0) + matrix.sum(1) - right)).mean()
    assert compute_metric["fcn-score-real/class-iou"]["mean"] == pytest.approx(iou, abs=1e-6)
    assert 0 < compute_metric["fcn-score/pixel-accuracy"]["mean"] < compute_metric["fcn-score-real/pixel-accuracy"]["mean"]
    assert list(record["evaluator_weights"]) == ["FCNScore"]


def test_frechet_distances_are_of_each_directions_own_domain():
    class Network:
        name = "means"

        def __call__(self, images):
            return {"features": images.float().mean((2, 3)) / 255}

    quality = TranslationFID()
    quality.features.network = Network()
    to_b, to_a = outputs("AtoB", 40), outputs("BtoA", 50)
    to_b["prediction"] = to_b["prediction"] * 0.5
    kept = [quality.update(to_b, i) for i in range(40)] + [quality.update(to_a, i) for i in range(50)]
    found = quality.compute(kept, None)

    def written_out(made, real):
        from scipy.linalg import sqrtm

        made, real = (((x * 255 + 0.5).floor() / 255).mean((2, 3)).double().numpy() for x in (made, real))
        one, two = (np.cov(x, rowvar=False) for x in (made, real))
        gap = made.mean(0) - real.mean(0)
        return gap @ gap + np.trace(one + two - 2 * sqrtm(one @ two).real)

    assert found["fid/means-AtoB-40"] == pytest.approx(written_out(to_b["prediction"], to_a["image"]), abs=1e-5)
    assert found["fid/means-BtoA-50"] == pytest.approx(written_out(to_a["prediction"], to_b["image"]), abs=1e-5)
