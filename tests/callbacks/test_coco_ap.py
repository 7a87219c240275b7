import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from callbacks.metrics.coco_ap import EVALUATIONS, COCOAveragePrecision, found_rows, true_rows
from callbacks.metrics.seg_ctc import CTCSegOfDetections
from datamodules.detection import Detection
from datamodules.errors import UserError
from datamodules.transforms.objects import decode_masks, encode_masks


def perturbed(rng, annotations, height, width, n_labels):
    """Return detections: objects zero to two times, with shifted boxes, masks and keypoints, and some other labels."""
    count = len(annotations["labels"])
    index = np.repeat(np.arange(count), rng.integers(0, 3, count))
    boxes = annotations["boxes"][index].astype(np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    boxes += rng.normal(0, 0.08, boxes.shape) * np.tile(sides, 2)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    wrong = rng.random(len(index)) < 0.1
    labels = np.where(wrong, rng.integers(1, n_labels + 1, len(index)), annotations["labels"][index])
    masks = decode_masks([annotations["masks"][i] for i in index], height, width)
    for i, shift in enumerate(rng.integers(-4, 5, (len(index), 2)).tolist()):
        masks[i] = masks[i].roll(shift, (0, 1))
    found = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(labels),
        "scores": torch.from_numpy(rng.random(len(index)).round(2)),  # some are equal
        "masks": masks.bool(),
    }
    if annotations["keypoints"].shape[1]:
        points = annotations["keypoints"][index].astype(np.float64)
        points[..., :2] += rng.normal(0, 6, points[..., :2].shape)
        found["keypoints"] = torch.from_numpy(points)
    return found


def evaluate(metric, data, n_labels):
    """Return the metric's values and its states, for perturbed objects as detections."""
    rng, states, names = np.random.default_rng(0), [], []
    for i in range(len(data.val_images)):
        batch = data.val_images[i]
        size = batch["image"][0].shape[-2:]
        batch["prediction"] = [perturbed(rng, batch["annotations"][0], *size, n_labels)]
        states.append(metric.update(batch, 0))
        names.append(batch["name"][0])
    return metric.compute(states, SimpleNamespace(datamodule=data)), states, names


def pycocotools_values(true, states, numbers, kind, category_of, max_detections=100):
    """Evaluate the same detections with pycocotools."""
    results = []
    for number, state in zip(numbers, states, strict=True):
        for row in found_rows(kind, number, state):
            row = {key: value for key, value in row.items() if key not in ("area", "iscrowd")}
            row["category_id"] = category_of[row["category_id"]]
            if kind != "box":
                del row["bbox"]  # the areas would be those of the boxes
            if kind == "mask":
                code = row["segmentation"]
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            results.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(true, true.loadRes(results), EVALUATIONS[kind])
        if kind != "keypoints":
            evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("num_keypoints", [0, 17])
def test_values_equal_pycocotools_on_coco(with_real_data, num_keypoints):
    n_labels = 1 if num_keypoints else 80
    data = Detection("coco-mini/train", "coco-mini/val", n_labels + 1, num_keypoints=num_keypoints)
    data.setup("validate")
    values, states, names = evaluate(COCOAveragePrecision(), data, n_labels)
    kind_of_file = "person_keypoints" if num_keypoints else "instances"
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO(str(with_real_data / f"COCO-mini/annotations/{kind_of_file}_val2017.json"))
    categories = dict(enumerate(sorted(true.getCatIds()), 1))
    kinds = ("box", "mask", "keypoints") if num_keypoints else ("box", "mask")
    assert len(values) == 12 + 12 + (10 if num_keypoints else 0)
    for kind in kinds:
        expected = pycocotools_values(true, states, list(map(int, names)), kind, categories)
        found = [value for name, value in values.items() if name.startswith(f"{kind}/")]
        assert found == pytest.approx((100 * expected).tolist(), abs=1e-10)
        assert 0 < found[0] < 90


@pytest.mark.parametrize("max_detections", [100, 12])
def test_values_equal_pycocotools_on_scenes_of_digits(max_detections):
    data = Detection("digit-scenes/val", "digit-scenes/val", 11)
    data.setup("validate")
    values, states, _ = evaluate(COCOAveragePrecision(max_detections), data, 10)
    images = [{"id": i, "height": 128, "width": 128} for i in range(1, 101)]
    rows = [row for i, state in enumerate(states, 1) for row in true_rows("mask", i, state)]
    for i, row in enumerate(rows, 1):
        row["id"] = i
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = {"images": images, "annotations": rows, "categories": [{"id": i} for i in range(1, 11)]}
        true.createIndex()
    suffix = "" if max_detections == 100 else "/max12"
    for kind in ("box", "mask"):
        stats = pycocotools_values(true, states, range(1, 101), kind, {i: i for i in range(1, 11)}, max_detections)
        names = ["ap", "ap50", "ap75", "ap-small", "ap-medium", "ap-large", "ar1", "ar10", f"ar{max_detections}"]
        expected = dict(zip([*names, "ar-small", "ar-medium", "ar-large"], stats, strict=True))
        if max_detections == 12:
            del expected["ap"]  # pycocotools returns -1 for other numbers than 100
        for name, value in expected.items():
            if value == -1:  # no digit is large
                assert f"{kind}/{name}{suffix}" not in values
            else:
                assert values[f"{kind}/{name}{suffix}"] == pytest.approx(100 * value, abs=1e-10)


def test_precision_of_a_worked_example():
    """Two objects; detections by score: true, false, true. The precisions are 1 up to recall 0.5, then 2/3."""
    boxes = np.array([[0.0, 0, 40, 40], [50, 50, 90, 90]], np.float32)
    true = {
        "boxes": boxes,
        "labels": np.array([1, 1]),
        "areas": np.array([1600.0, 1600.0]),
        "crowd": np.array([False, False]),
        "masks": [],
        "keypoints": np.zeros((2, 0, 3)),
    }
    found = {
        "boxes": torch.tensor([[0.0, 0, 40, 40], [0, 50, 40, 90], [50, 50, 90, 90]]),
        "labels": torch.tensor([1, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    metric = COCOAveragePrecision()
    state = metric.update({"prediction": [found], "annotations": [true], "image": [torch.zeros(3, 100, 100)]}, 0)
    values = metric.compute([state], SimpleNamespace(datamodule=SimpleNamespace(class_names=["", "a"])))
    expected = 100 * (51 + 50 * 2 / 3) / 101  # recalls 0, 0.01, ..., 0.5, then 0.51, ..., 1
    for name in ("ap", "ap50", "ap-medium"):
        assert values[f"box/{name}"] == pytest.approx(expected)
    assert values["box/ar1"] == 50
    assert values["box/ar100"] == 100
    assert "box/ap-small" not in values
    assert not any(name.startswith("mask") for name in values)


def test_other_keypoints_need_sigmas():
    points = np.array([[[5.0, 5, 2], [20, 20, 2]]], np.float32)
    true = {
        "boxes": np.array([[0.0, 0, 40, 40]], np.float32),
        "labels": np.array([1]),
        "areas": np.array([1600.0]),
        "crowd": np.array([False]),
        "masks": [],
        "keypoints": points,
    }
    moved = torch.from_numpy(points) + torch.tensor([8.0, 0, 0])
    found = {
        "boxes": torch.tensor([[0.0, 0, 40, 40]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]),
        "keypoints": moved,
    }
    outputs = {"prediction": [found], "annotations": [true], "image": [torch.zeros(3, 50, 50)]}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(class_names=["", "a"]))
    metric = COCOAveragePrecision()
    with pytest.raises(UserError, match="17 sigmas for 2 keypoints"):
        metric.compute([metric.update(outputs, 0)], trainer)
    for sigma in (0.05, 0.1, 0.2):
        metric = COCOAveragePrecision(keypoint_sigmas=[sigma, sigma])
        values = metric.compute([metric.update(outputs, 0)], trainer)
        similarity = np.exp(-(8**2) / (2 * 1600 * (2 * sigma) ** 2))  # OKS
        passed = sum(similarity >= threshold for threshold in np.linspace(0.5, 0.95, 10))
        assert values["keypoints/ap"] == pytest.approx(10 * passed)


def test_seg_of_detections():
    """The object of 20 pixels is covered by 16 of a detection of 18; the second object by a detection with a low score."""
    masks = torch.zeros(2, 10, 12, dtype=torch.bool)
    masks[0, :4, :5], masks[1, 6:, 6:] = True, True
    found = torch.zeros(3, 10, 12, dtype=torch.bool)
    found[0, :4, 1:5], found[0, 4, 1:3], found[1, :4, :5], found[2, 6:, 6:] = True, True, True, True
    outputs = {
        "prediction": [{"masks": found, "scores": torch.tensor([0.9, 0.8, 0.4])}],
        "annotations": [{"masks": encode_masks(masks)}],
        "image": [torch.zeros(3, 10, 12)],
    }
    metric = CTCSegOfDetections()
    state = metric.update(outputs, 0)
    assert state[0].tolist() == pytest.approx([16 / 22, 0])  # overlapping pixels belong to the higher score
    assert metric.compute([state], None) == {"seg/ctc/score0.5": pytest.approx(8 / 22)}
    assert CTCSegOfDetections(score=0.3).update(outputs, 0)[0].tolist() == pytest.approx([16 / 22, 1])
    masks[1, 4:, 5:] = True  # now the two touch at a corner
    outputs["annotations"] = [{"masks": encode_masks(masks)}]
    name = "seg/ctc/score0.5"
    assert metric.compute([state, metric.update(outputs, 0)], None) == {
        name: pytest.approx(4 / 22 * 2),
        f"{name}/touching": pytest.approx(8 / 22),
    }
