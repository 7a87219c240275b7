import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from datamodules.catalog.annotated_images import list_annotated_images
from datamodules.catalog.catalog import DatasetNotFound
from datamodules.catalog.coco_annotations import InvalidAnnotations, decompress_counts, read_coco_file
from datamodules.catalog.digit_scenes import digit_scene
from datamodules.detection import Detection
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.sampler import GroupedBatchSampler
from datamodules.transforms.objects import (
    decode_masks,
)
from tests.helpers.fake_datasets import lay_out

HEIGHT, WIDTH = 40, 60
POLYGON = [[5.0, 5, 25, 5, 25, 30, 5, 30], [30.0, 5, 35, 5, 35, 10]]
CODE = {"size": [HEIGHT, WIDTH], "counts": [400, 10, HEIGHT * WIDTH - 410]}
KEYPOINTS = [10.0, 10, 2, 12, 10, 1, 0, 0, 0]
CATEGORY = {"keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]]}


def annotation(number, **changes):
    entry = {"id": number, "image_id": 1, "category_id": 3, "bbox": [5.0, 5, 20, 25], "area": 500.0, "iscrowd": 0}
    return {**entry, "segmentation": POLYGON, "keypoints": KEYPOINTS, "num_keypoints": 2, **changes}


def write_folder(folder, annotations, sizes=((HEIGHT, WIDTH), (HEIGHT, WIDTH), (WIDTH, HEIGHT))):
    """Write images and an annotation file."""
    (folder / "images").mkdir(parents=True)
    images = []
    for number, (height, width) in enumerate(sizes, 1):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    categories = [{"id": 3, "name": "coin", **CATEGORY}, {"id": 9, "name": "note"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return str(folder)


def test_masks_equal_those_of_pycocotools(workdir):
    entries = [
        annotation(1),
        annotation(2, segmentation=CODE, iscrowd=1, category_id=9),
        annotation(3, segmentation={"size": CODE["size"], "counts": "`<:Vn1"}, image_id=2),
        annotation(4, segmentation=[], image_id=2),
    ]
    (image, second, third) = list_annotated_images(write_folder(workdir / "f", entries), 3).images
    reference = COCO(str(workdir / "f/annotations.json"))
    found = image.annotations(HEIGHT, WIDTH)
    for i, code in enumerate(found.masks):
        assert (decode_masks([code], HEIGHT, WIDTH)[0].numpy() == reference.annToMask(reference.anns[i + 1])).all()
    assert found.boxes.tolist() == [[5, 5, 25, 30]] * 2
    assert found.labels.tolist() == [1, 2]
    assert found.crowd.tolist() == [False, True]
    assert found.keypoints[0].tolist() == [[10, 10, 2], [12, 10, 1], [0, 0, 0]]
    codes = second.annotations(HEIGHT, WIDTH).masks
    assert (decode_masks(codes[:1], HEIGHT, WIDTH)[0].numpy() == reference.annToMask(reference.anns[3])).all()
    assert decode_masks(codes[1:], HEIGHT, WIDTH).sum() == 20 * 25  # the box
    assert not len(third.annotations(WIDTH, HEIGHT).labels)


def test_masks_of_coco_equal_those_of_pycocotools(real_data):
    for kind, num_keypoints in (("instances", 0), ("person_keypoints", 17)):
        path = real_data / f"COCO-mini/annotations/{kind}_val2017.json"
        reference, count = COCO(str(path)), 0
        content = read_coco_file(path, num_keypoints)
        assert not content.problems
        images = list_annotated_images("coco-mini/val", num_keypoints).images
        for entry, image in zip(content.images, images, strict=True):
            found = image.annotations(entry.height, entry.width)
            rows = content.annotations.get(entry.id, [])
            assert [row["area"] for row in rows] == found.areas.tolist()
            for row, code in zip(rows, found.masks, strict=True):
                expected = reference.annToRLE(row)["counts"]
                assert code["counts"] == expected
                assert sum(decompress_counts(expected.decode())) == entry.height * entry.width
                count += 1
        assert count == sum(map(len, content.annotations.values())) == len(reference.anns)


PROBLEMS = {
    "there is no image 7": {"image_id": 7},
    "there is no category 4": {"category_id": 4},
    "iscrowd is 2": {"iscrowd": 2},
    "is empty": {"bbox": [5, 5, 0, 3]},
    "is not inside of its image of 60x40": {"bbox": [50, 5, 20, 3]},
    "is not [x, y, width, height]": {"bbox": [1, 2, 3]},
    "is not [x, y, width": {"bbox": [1, 2, 3, "4"]},
    "a polygon has 4 coordinates": {"segmentation": [[1, 2, 3, 4]]},
    "a polygon is not inside": {"segmentation": [[1, 2, 3, 4, 70, 3]]},
    "neither a list of polygons": {"segmentation": "abc"},
    "the run-length code has the size [60, 40]": {"segmentation": {"size": [60, 40], "counts": [2400]}},
    "do not add up to the 2400 pixels": {"segmentation": {"size": [40, 60], "counts": [2399]}},
    "not add up to the 2400": {"segmentation": {"size": [40, 60], "counts": "`<:^"}},
    "not add up to the 2400 pixels": {"segmentation": {"size": [40, 60], "counts": "~"}},
    "6 numbers for 3 keypoints, not 9": {"keypoints": [1, 2, 2, 3, 4, 2]},
    "no numbers for 3 keypoints": {"keypoints": None},
    "there is no image 1.0": {"image_id": 1.0},
    "there is no category [1]": {"category_id": [1]},
    "there is no category True": {"category_id": True},
    "the box [5, 5, 1e-09, 3] is empty": {"bbox": [5, 5, 1e-9, 3]},
    "the box [60.2, 5, 0.5, 3] is empty": {"bbox": [60.2, 5, 0.5, 3]},
    "the box [1000": {"bbox": [10**400, 5, 1, 3]},
    "a list of polygons nor": {"segmentation": [[10**400, 5, 1, 3, 4, 5]]},
    "its polygons have no pixel": {"segmentation": [[5, 5, 5, 5, 5, 5]]},
    "polygons have no pixel": {"segmentation": [[60.5, 5, 61, 5, 61, 9]]},
    "its run-length code has no pixel": {"segmentation": {"size": [40, 60], "counts": [2400]}},
    "run-length code do not add up": {"segmentation": {"size": [40, 60], "counts": [400.0, 10, 1990]}},
    "the run-length code has the size [40.0, 60.0]": {"segmentation": {"size": [40.0, 60.0], "counts": [400, 10, 1990]}},
    "code do not add up": {"segmentation": {"size": [40, 60], "counts": "`<:Vn" + chr(0x1031)}},
    "of the run-length code do not add up": {"segmentation": {"size": [40, 60], "counts": "o" * 100_000}},
    "the area x is not a number": {"area": "x"},
    "the area nan is not": {"area": float("nan")},
    "the area 2401 is not": {"area": 2401},
    "the visibility of a keypoint is 7": {"keypoints": [10, 10, 7, 0, 0, 0, 0, 0, 0]},
    "the keypoint [70, 10] is not inside": {"keypoints": [70, 10, 2, 0, 0, 0, 0, 0, 0]},
}


@pytest.mark.parametrize("reason", PROBLEMS)
def test_unusable_annotations_are_named_and_left_out_only_when_asked(workdir, reason):
    folder = write_folder(workdir / "f", [annotation(1), annotation(17, **PROBLEMS[reason])])
    data = Detection(folder, folder, num_classes=3, num_keypoints=3)
    with pytest.raises(InvalidAnnotations) as error:
        data.setup("fit")
    assert f"{folder}/annotations.json: annotation 17: " in str(error.value)
    assert reason in str(error.value)
    data = Detection(folder, folder, num_classes=3, num_keypoints=3, skip_bad=True)
    data.setup("validate")
    assert [len(data.val_images[i]["annotations"][0]["labels"]) for i in range(3)] == [1, 0, 0]
    assert "annotation 17" in data.data_report.skipped[0]


def test_annotation_files_that_cannot_be_read_are_refused(workdir):
    folder = Path(write_folder(workdir / "f", [annotation(1)]))
    content = json.loads((folder / "annotations.json").read_text())

    def refused(text, message, error=InvalidAnnotations):
        (folder / "annotations.json").write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(error, match=message):
            list_annotated_images(str(folder), 3)

    refused("{", "is not JSON")
    refused("[" * 100_000, "is not JSON")
    refused("[]", "the list 'images' is missing")
    refused({**content, "categories": {}}, "the list 'categories' is missing")
    refused({**content, "images": [{"id": 1}]}, "no valid id, file_name, height and width")
    refused({**content, "images": content["images"] * 2}, "two images have the id 1")
    refused({**content, "images": []}, "contains no images", DatasetNotFound)
    for number in (0, None, 1.5, "1", 10**30, float("inf")):
        refused({**content, "categories": [{"id": number, "name": "x"}]}, "has no id of its own from 1 to 100000")
    refused({**content, "categories": content["categories"] * 2}, "has no id of its own")
    refused({**content, "categories": [{"id": 1, "name": ""}]}, "has no name")
    refused({**content, "categories": []}, "there are no categories")
    refused({**content, "categories": [{"id": 1, "name": "x", "keypoints": 5}]}, "not a list of names")
    refused({**content, "categories": [{"id": 1, "name": "x", "keypoints": ["A", "a"]}]}, "two keypoints have the same name")
    refused({**content, "images": [content["images"][0], {**content["images"][0], "id": 9}]}, "two images have the file_name")
    refused({**content, "images": [{**content["images"][0], "height": float("inf")}]}, "no valid id, file_name")
    refused({**content, "categories": [{"id": 3, "name": "x", "keypoints": ["a"]}]}, "have 1 keypoints")
    skeleton = [{"id": 3, "name": "x", **CATEGORY, "skeleton": [[1, 9]]}]
    refused({**content, "categories": skeleton}, "skeleton")
    images = [{**content["images"][0], "file_name": "../secret.png"}]
    refused({**content, "images": images}, "1 of its 1 images are missing, such as ../secret.png", DatasetNotFound)
    (folder / "annotations.json").write_text(json.dumps({**content, "images": [{**content["images"][0], "width": 61}]}))
    with pytest.raises(InvalidImage, match="60x40 pixels, but 61x40 in the annotation file"):
        Detection(str(folder), str(folder), 3).setup("fit")


def test_options_that_do_not_fit_the_data_are_refused(workdir):
    folder = write_folder(workdir / "f", [annotation(1)])
    other = Path(write_folder(workdir / "g", []))
    for init_args, message in (
        ({"num_classes": 2}, r"data\.num_classes: 2, .* 2 classes .* to 3"),
        ({"num_classes": 3, "num_keypoints": 17}, r"3 keypoints, but data\.num_keypoints is 17"),
        ({"num_classes": 3, "train": "coins/train", "num_keypoints": 3}, r"coins/train has no keypoints"),
        ({"num_classes": 3, "train": "camvid/train"}, r"camvid has no annotated objects"),
        ({"num_classes": 3, "train": str(other)}, r"data\.train: no image of .* has objects"),
        ({"num_classes": 3, "val": "coins/val"}, r"has other classes or keypoints than"),
        ({"num_classes": 3, "zoom": 0.5}, r"data\.zoom: 0\.5"),
        ({"num_classes": 3, "short_sides": [800], "long_side": 700}, r"data\.long_side: 700"),
        ({"num_classes": 1}, r"data\.num_classes: 1"),
    ):
        with pytest.raises(UserError, match=message):
            Detection(**{"train": folder, "val": folder, **init_args}).setup("fit")


def test_label_maps_and_folders_of_masks_are_read(workdir):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    first, second = pixels.copy(), pixels.copy()
    first[5:10, 5:15], second[20:30, 30:40] = 255, 255
    for name in ("maps", "folders"):
        (workdir / name / "images").mkdir(parents=True)
        (workdir / name / "masks/a").mkdir(parents=True)
        Image.fromarray(pixels).save(workdir / name / "images/a.png")
    Image.fromarray(first).save(workdir / "folders/masks/a/1.png")
    Image.fromarray(second).save(workdir / "folders/masks/a/2.png")
    label_image = ((first > 0) * 7 + (second > 0) * 300).astype(np.uint16)
    (workdir / "maps/masks/a").rmdir()
    Image.fromarray(label_image).save(workdir / "maps/masks/a.png")
    for name in ("maps", "folders"):
        data = Detection(str(workdir / name), str(workdir / name), num_classes=2, hflip=False)
        data.setup("fit")
        sample = data.train_images[0, np.array([0])]
        assert sample["objects"][0]["boxes"].tolist() == [[5, 5, 15, 10], [30, 20, 40, 30]]
        assert (sample["objects"][0]["masks"].numpy() == np.stack([first, second]) // 255).all()
        assert data.class_names == ["", "object"]
    Image.fromarray(first[:20]).save(workdir / "folders/masks/a/2.png")
    with pytest.raises(InvalidImage, match=r"2\.png: 60x20, but its image has 60x40"):
        data.setup("fit")
    Image.fromarray(pixels).save(workdir / "folders/masks/a/2.png")
    with pytest.raises(InvalidImage, match=r"2\.png: a mask without pixels"):
        data.setup("fit")
    (workdir / "folders/images/b.png").write_bytes((workdir / "folders/images/a.png").read_bytes())
    with pytest.raises(DatasetNotFound, match=r"b\.png has no folder of masks"):
        data.setup("fit")
    (workdir / "folders/images/b.png").rename(workdir / "folders/images/a.jpeg")
    with pytest.raises(InvalidImage, match=r"have the same name"):
        data.setup("fit")


def test_folders_of_masks_of_images_in_folders_are_separate(workdir):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:9, :9] = 255
    for folder in ("images/a", "masks/a/b"):
        (workdir / "set" / folder).mkdir(parents=True)
    for name in ("images/a.png", "images/a/b.png", "masks/a/1.png", "masks/a/b/1.png"):
        Image.fromarray(mask).save(workdir / "set" / name)
    images = list_annotated_images(str(workdir / "set")).images
    assert [len(image.annotations(HEIGHT, WIDTH).labels) for image in images] == [1, 1]


def test_photographs_are_no_label_maps(workdir):
    for name in ("images", "masks"):
        (workdir / "set" / name).mkdir(parents=True)
    pixels = np.arange(200 * 200, dtype=np.uint16).reshape(200, 200)
    Image.fromarray((pixels // 256).astype(np.uint8)).save(workdir / "set/images/a.png")
    Image.fromarray(pixels).save(workdir / "set/masks/a.png")
    with pytest.raises(InvalidImage, match="40000 different values, not ids of objects"):
        Detection(str(workdir / "set"), str(workdir / "set"), 2).setup("fit")


def test_rotated_photographs_have_the_size_in_which_they_are_seen(workdir):
    folder = Path(write_folder(workdir / "f", [annotation(1)], sizes=((HEIGHT, WIDTH),)))
    turned = Image.open(folder / "images/1.png").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it clockwise
    turned.save(folder / "images/1.jpg", exif=exif)
    (folder / "images/1.png").unlink()
    (folder / "annotations.json").write_text((folder / "annotations.json").read_text().replace("1.png", "1.jpg"))
    for streaming in (False, True):
        data = Detection(str(folder), str(folder), 3, streaming=streaming)
        data.setup("fit")
        assert data.train_images[0, np.array([0])]["image"][0].shape == (3, HEIGHT, WIDTH)
        assert data.is_wide.tolist() == [True]


def test_names_do_not_need_the_dataset(workdir):
    """`predict` runs with committed or released weights, without the training images."""
    data = Detection("coco2017/train", "coco2017/val", 91, category_ids=True)
    assert data.class_names[1:3] == ["person", "bicycle"]
    assert data.class_names[90] == "toothbrush"
    assert len(data.class_names) == 91
    assert Detection("coco2017/train", "coco2017/val", 81).class_names[80] == "toothbrush"
    persons = Detection("coco2017/train", "coco2017/val", 2, num_keypoints=17)
    assert persons.class_names == ["", "person"]
    assert len(persons.skeleton) == 19
    assert Detection("dsb2018/train", "dsb2018/val", 2).class_names == ["", "nucleus"]
    assert Detection("mine", "mine", 3).class_names == ["", "class 1", "class 2"]


def test_cityscapes_instances_have_classes_and_groups(workdir):
    lay_out("cityscapes")
    (image,) = list_annotated_images("cityscapes/val").images
    path = next((workdir / "data/Cityscapes/gtFine/val").rglob("*instanceIds.png"))
    values = np.zeros(np.asarray(Image.open(path)).shape, np.uint16)
    values[:5, :5], values[10:20, 10:20], values[30:40, 30:40], values[50:60, 50:60] = 26, 26001, 24000, 11
    Image.fromarray(values).save(path)
    found = image.annotations(*values.shape)
    assert found.labels.tolist() == [3, 1, 3]  # a group of cars, a person, a car; buildings are no objects
    assert found.crowd.tolist() == [True, False, False]


def test_penn_fudan_is_read(workdir):
    lay_out("penn-fudan")
    data = Detection("penn-fudan/train", "penn-fudan/val", num_classes=2)
    data.setup("fit")
    assert data.class_names == ["", "pedestrian"]
    assert len(data.train_images) == 120
    assert len(data.val_images) == 50


def test_scenes_of_digits_have_exact_masks():
    scene = digit_scene("val", 3)
    digits = scene.masks.any(0)
    assert 2 <= len(scene.labels) <= 6
    assert (scene.masks.sum(0) <= 1).all()
    assert (scene.pixels.amax(0)[digits] > 40).all()
    assert (scene.pixels.amax(0)[~digits] < 192).all()
    assert not torch.equal(scene.pixels, digit_scene("test", 3).pixels)
    data = Detection("digit-scenes/val", "digit-scenes/val", num_classes=11)
    data.setup("validate")
    assert data.val_images[3]["annotations"][0]["labels"].tolist() == scene.labels


def test_batches_have_one_shape_and_every_image_once():
    groups = np.array([0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0])
    position = [0]
    sampler = GroupedBatchSampler(groups, 4, 0, lambda: position[0])
    stream = iter(sampler)
    batches = [next(stream)[1] for _ in range(33)]  # 12 passes
    items = np.concatenate(batches)
    for start in range(0, 132, 11):
        assert sorted(items[start : start + 11]) == list(range(11))
    pure = sum(len(set(groups[batch])) == 1 for batch in batches)
    assert pure >= 12  # of 33; random batches would have 4
    position[0] = 40
    assert np.array_equal(next(iter(sampler))[1], batches[10])
    halves = [next(iter(GroupedBatchSampler(groups, 4, 0, lambda: 20, rank, 2)))[1] for rank in (0, 1)]
    assert np.array_equal(np.concatenate(halves), batches[5])


def test_streamed_batches_equal_those_in_memory(workdir):
    entries = [annotation(1), annotation(2, image_id=3, bbox=[0.0, 0, 10, 10], segmentation=None)]
    folder = write_folder(workdir / "f", entries)
    samples, hashes = [], []
    for streaming in (False, True):
        data = Detection(
            folder,
            folder,
            3,
            num_keypoints=3,
            short_sides=[30, 50],
            crop=24,
            zoom=1.2,
            streaming=streaming,
            group_by_shape=True,
        )
        data.setup("fit")
        samples.append([next(iter(data.train_dataloader())) for _ in range(1)] + [data.train_images[4, np.array([0, 2, 1])]])
        hashes.append(data.data_report.fingerprints())
    for one, other in zip(*samples, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
        for a, b in zip(one["objects"], other["objects"], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert hashes[0].keys() == hashes[1].keys()


def test_images_without_objects_are_left_out_only_when_asked(workdir):
    hidden = [0.0] * 9
    folder = write_folder(workdir / "f", [annotation(1), annotation(2, image_id=2, keypoints=hidden, num_keypoints=0)])
    counts = []
    for init_args in ({}, {"skip_empty": True}, {"skip_empty": True, "min_keypoints": 2}):
        data = Detection(folder, folder, 3, num_keypoints=3, **init_args)
        data.setup("fit")
        counts.append(len(data.train_images))
        assert len(data.val_images) == 3
    assert counts == [3, 2, 1]
