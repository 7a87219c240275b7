"""The recipes of detection are trained for a few steps, and those with released weights are evaluated."""

import json

import pytest
import torch

from tests.experiments.test_recipes import ALL, TRAINED, datamodule_of, main_with_fake_datasets
from tests.helpers.fake_datasets import lay_out
from tests.helpers.recipe_results import assert_losses_are_documented
from tests.helpers.subprocess_helpers import forked


def detection_recipes():
    """Return the recipes of detection; those that differ from another one by an option of the network or the dataset are slow."""
    kept = ("demo", "dsb2018", "coco_mini", "r50_c4", "persons_keypoints_masks", "cityscapes")
    tested = {f"mask_rcnn/{name}" for name in kept}
    return [
        pytest.param(recipe, marks=[] if recipe.name in tested else pytest.mark.slow, id=recipe.name)
        for recipe in TRAINED
        if datamodule_of(recipe) == "Detection"
    ]


@pytest.mark.parametrize("recipe", detection_recipes())
def test_detection_recipe_trains_a_few_steps(recipe, workdir):
    data = recipe.content["data"]["init_args"]
    lay_out(data["train"])
    overrides = ["--model.total_images", "4", "--data.batch_size", "2", "--val_every_images", "2", "--model.backbone", "small"]
    overrides += ["--model.backbone_weights", "null", "--model.base_channels", "8", "--model.fpn_channels", "8"]
    overrides += ["--model.box_channels", "8", "--model.mask_channels", "4", "--model.keypoint_channels", "4"]
    overrides += ["--model.rois_per_image", "8", "--model.train_proposals", "20", "--model.test_proposals", "20"]
    overrides += ["--model.min_size", "96", "--model.max_detections", "5", "--trainer.precision", "32-true"]
    overrides += ["--trainer.limit_val_batches", "3", "--trainer.limit_test_batches", "3"]
    overrides += ["--data.short_sides", "[96]"] if data.get("short_sides") else []
    overrides += ["--data.num_workers", "1"] if data.get("num_workers") else []
    if data["train"].startswith("digit-scenes"):  # these are not files
        overrides += ["--data.train", "digit-scenes/val", "--data.test", "[digit-scenes/val]"]
    assert forked(main_with_fake_datasets, ["fit", recipe.name, "--run", "short", *overrides]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert json.loads((folder / "record.json").read_text())["metrics"]
    assert list((folder / "samples").iterdir())
    assert_losses_are_documented(recipe, folder)


@pytest.mark.parametrize("name", ["released", pytest.param("released_keypoints", marks=pytest.mark.slow)])
def test_released_detectors_are_evaluated_with_their_weights(name, workdir, monkeypatch, capfd):
    """The weights are random, and have the names of those that torchvision publishes."""
    monkeypatch.setenv("TORCH_HOME", str(workdir / "torch"))
    lay_out("coco2017/val")
    argv = ["test", f"mask_rcnn/{name}", "--record", "record.json", "--model.min_size", "64", "--model.test_proposals", "20"]
    argv += ["--model.max_detections", "2", "--trainer.limit_test_batches", "2"]
    assert forked(main_with_fake_datasets, argv) == 2
    assert "download" in capfd.readouterr().err
    recipe = next(recipe for recipe in ALL if recipe.name == f"mask_rcnn/{name}")
    weights = recipe.load_class("model")(**recipe.content["model"]["init_args"])
    kind = "keypointrcnn_resnet50_fpn_coco-fc266e95" if name.endswith("keypoints") else "maskrcnn_resnet50_fpn_coco-bf2d0c1e"
    torch.save(weights.state_dict(), workdir / f"torch/hub/checkpoints/{kind}.pth")
    assert forked(main_with_fake_datasets, argv) == 0
    assert json.loads((workdir / "record.json").read_text())["metrics"]["coco2017-val"]["box/ap"]
