"""`darkroom predict` with detectors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from callbacks.writers.detection_writer import DetectionWriter
from datamodules.detection import Detection
from datamodules.transforms.draw_objects import _captions, draw_objects
from experiments.cli.main import main
from tests.helpers.subprocess_helpers import forked, two_forked
from tests.tasks.detection import SMALL_NETWORK, write_detection_recipe


@pytest.fixture
def recipe(workdir):
    init_args = {**SMALL_NETWORK, "num_keypoints": 0, "total_images": 8, "score_threshold": 0.0, "max_detections": 6}
    return write_detection_recipe(workdir / "tiny.yaml", {"class_path": "modules.mask_rcnn.MaskRCNN", "init_args": init_args})


def test_predict_writes_overlays_label_maps_and_annotations(workdir, recipe, three_photos, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "r", "--data.test", "[]"]) == 0
    argv = ["predict", str(recipe), "--input", str(three_photos), "--output", "out", "--score", "0"]
    assert forked(main, argv) == 0
    content = json.loads((workdir / "out/annotations.json").read_text())
    reference = COCO(str(workdir / "out/annotations.json"))
    assert content["categories"] == [{"id": 1, "name": "coin"}]
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    for image in content["images"]:
        original = Image.open(image["file_name"])
        name = f"{original.filename.rpartition('/')[2].partition('.')[0]}.png"
        rows = reference.imgToAnns[image["id"]]
        assert len(rows) == 6
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
        ids = np.asarray(Image.open(workdir / "out" / name))
        assert ids.dtype == np.uint16
        expected = np.zeros(original.size[::-1])
        for i in range(6, 0, -1):  # the highest score is on top
            expected[reference.annToMask(rows[i - 1]) == 1] = i
        assert (ids == expected).all()
        width, height = Image.open(workdir / "out/overlays" / name).size
        assert width // original.width == height // original.height > 1  # small images are enlarged
    assert sorted(path.name for path in (workdir / "out").iterdir() if path.suffix == ".json") == ["annotations.json"]
    data = json.loads((workdir / "out/annotations.json").read_text())
    status, _ = two_forked(main, [*argv[:-3], "two", "--score", "0", "--trainer.devices", "2", "--trainer.accelerator", "cpu"])
    assert status == [0, 0]
    assert json.loads((workdir / "two/annotations.json").read_text()) == data
    assert forked(main, [*argv[:-1], "1"]) == 0
    assert not json.loads((workdir / "out/annotations.json").read_text())["annotations"]
    capfd.readouterr()
    assert forked(main, [*argv[:-1], "2"]) == 2
    assert "score" in capfd.readouterr().err
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(three_photos), "--score", "0.5"]) == 2
    assert "--score: espcn/t91_x3 does not have this option" in capfd.readouterr().err


def test_written_annotations_are_a_dataset(workdir, recipe, photos):
    """The output of one network can be the training set of another."""
    (workdir / "set").mkdir()
    (workdir / "set/images").symlink_to(photos)
    writer = DetectionWriter({}, workdir / "set", 0.5, ["", "coin"], [])
    name = sorted(photos.iterdir())[0].name
    found = {
        "boxes": torch.tensor([[10.0, 20, 30, 50]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]),
        "masks": torch.zeros(1, 90, 96, dtype=torch.bool),
    }
    found["masks"][0, 20:50, 10:30] = True
    from callbacks.writers.detection_writer import coco_annotations

    writer.write_annotations({1: ({"id": 1, "file_name": name, "height": 90, "width": 96}, coco_annotations(found, 1))})
    data = Detection(str(workdir / "set"), str(workdir / "set"), 2)
    data.setup("validate")
    true = data.val_images[0]["annotations"][0]
    assert true["boxes"].tolist() == [[10, 20, 30, 50]]
    assert true["areas"].tolist() == [600]


def test_drawings_show_boxes_masks_and_skeletons():
    image = torch.zeros(3, 40, 60)
    objects = {
        "boxes": torch.tensor([[10.0, 10, 30, 30]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.75]),
        "masks": torch.zeros(1, 40, 60, dtype=torch.bool),
        "keypoints": torch.tensor([[[40.0, 5, 1], [55, 5, 1], [50, 30, 0]]]),
    }
    objects["masks"][0, 15:20, 15:20] = True
    drawn = draw_objects(image, objects, skeleton=[(0, 1)])
    assert drawn[:, 17, 17].max() > 0.3  # mask
    assert drawn[:, 25, 10].max() > 0.3  # left edge of the box
    assert drawn[:, 25, 20].max() == 0
    assert drawn[:, 5, 47].max() > 0.3  # connection of the two visible keypoints
    assert drawn[:, 30, 50].max() == 0  # an invisible keypoint
    large = draw_objects(image, objects, skeleton=[(0, 1)], scale=3)
    assert large.shape == (3, 120, 180)
    for y, x in ((52, 52), (75, 30), (15, 141)):  # the same places
        assert large[:, y, x].max() > 0.3
    assert large[:, 75, 60].max() == 0
    assert torch.equal(draw_objects(image, {name: values[:0] for name, values in objects.items()}), image)


@pytest.mark.parametrize(
    ("names", "width", "expected"),
    [
        ([], 200, ""),
        (["", "coin"], 40, "0.75"),  # the name of a single class is left out
        (["", "coin"], 12, ""),
        (["", "cat", "dog"], 80, "cat 0.75"),
        (["", "cat", "dog"], 30, "cat"),
        (["", "cat", "dog"], 12, ""),
    ],
)
def test_captions_are_not_wider_than_their_boxes(names, width, expected):
    boxes = torch.tensor([[5.0, 5, 5 + width, 40]])
    objects = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.75])}
    assert _captions(objects, names) == [expected]
    plain, drawn = (draw_objects(torch.zeros(3, 60, 220), objects, words) for words in ((), names))
    assert torch.equal(plain, drawn) == (not expected)
    assert torch.equal(plain[:, :, 6 + width :], drawn[:, :, 6 + width :])
