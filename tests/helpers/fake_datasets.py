"""Fake files of datasets that are not installed, made of embedded photographs and digits."""

import hashlib
import json
import pickle
import re
from functools import cache
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from datamodules.catalog.array_readers import read_digits
from datamodules.catalog.catalog import CatalogEntry, get_dataset, resolve_images
from datamodules.catalog.masked_images import list_masked_images


def lay_out(name: str) -> None:
    """Write small images in place of the files of a dataset, once for all splits."""
    dataset = get_dataset(name.partition("/")[0])
    if dataset.source != "embedded":
        _write(dataset.name, dataset.path)


@cache
def _write(name: str, path: Path) -> None:
    dataset = get_dataset(name)
    if dataset.arrays:
        WRITERS[dataset.name](dataset.path)
        return
    if dataset.masks:
        _write_masked_images(dataset)
        return
    if "annotations" in dataset.objects:
        write_coco(dataset)
        return
    examples = [re.sub(r"\[(.)[^]]*\]", r"\1", pattern) for pattern in dataset._patterns(None, None)]
    templates = [
        name.replace("**/", "some/").replace("*", "image{}").replace("??", "1{}").replace("?", "{}") for name in examples
    ]
    targets = list(dataset.manifest()) or [pattern.format(*[i] * 3) for pattern in templates for i in range(7)]
    for i, target in enumerate(targets):
        path = dataset.path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        seven_crops()[i % 7].crop((0, 0, 64, 64)).save(path)


@cache
def seven_crops() -> list[Image.Image]:
    """Return crops of photographs: RGB, 112 x 112."""
    photographs = resolve_images("photographs/train")[:4] + resolve_images("photographs/test")
    return [Image.open(path).crop((60, 40, 172, 152)).convert("RGB") for path in photographs]


def _write_masked_images(dataset: CatalogEntry) -> None:
    """Write crops of the coins image, and masks with the values of the dataset.

    Datasets in `PAIRS` get two images. The others get the expected number of images, or three for each pattern.
    """
    sample = list_masked_images("coins")[0].load(1)
    values = list(dataset.masks.get("value_map", range(len(dataset.masks["classes"]))))
    values = values if not dataset.masks.get("instances") else list(range(40))
    is_uint16 = dataset.masks.get("instances")
    for i, (image_path, mask) in enumerate(PAIRS.get(dataset.name, pairs_from_patterns)(dataset)):
        for path in (image_path, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        top, left = 20 * (i % 8), 10 * (i % 8)
        crop = np.s_[top : top + 96, left : left + 80]
        Image.fromarray(sample.pixels[0].numpy()[crop]).save(image_path)
        mask_values = np.array(values)[(sample.instance_ids[crop] + np.arange(80) // 16) % len(values)]
        Image.fromarray(mask_values.astype(np.uint16 if is_uint16 else np.uint8)).save(mask)
        if dataset.objects:  # instances of Cityscapes
            ids = np.where(sample.instance_ids[crop] > 0, 26_000 + sample.instance_ids[crop], 0)
            Image.fromarray(ids.astype(np.uint16)).save(mask.with_name(mask.name.replace("labelIds", "instanceIds")))


def pairs_from_patterns(dataset: CatalogEntry) -> list[tuple[Path, Path]]:
    """Return the paths of images and masks that the catalog expects."""
    image_paths = []
    for pattern in dataset._patterns(None, None):
        for i in range(dataset.expected_count() if dataset.count else 3):
            name = re.sub(
                r"\[(\d)-(\d)\]",
                lambda match, i=i: str(range(int(match[1]), int(match[2]) + 1)[i % (int(match[2]) - int(match[1]) + 1)]),
                pattern,
            )
            image_paths.append(dataset.path / name.replace("*", f"{i:03d}"))
    image_paths = list(dict.fromkeys(image_paths))
    source, target = dataset.masks["replace"]
    return [(path, dataset.path / re.sub(source, target, path.relative_to(dataset.path).as_posix())) for path in image_paths]


def voc_pairs(dataset: CatalogEntry) -> list[tuple[Path, Path]]:
    root = dataset.path / "VOCdevkit/VOC2012"
    (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(("train", "val")):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(f"2007_00000{i}\n")
    return [(root / f"JPEGImages/2007_00000{i}.jpg", root / f"SegmentationClass/2007_00000{i}.png") for i in (0, 1)]


def pets_pairs(dataset: CatalogEntry) -> list[tuple[Path, Path]]:
    root = dataset.path / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(("trainval", "test")):
        (root / f"annotations/{split}.txt").write_text(f"Birman_{i} 1 1 1\n")
    return [(root / f"images/Birman_{i}.jpg", root / f"annotations/trimaps/Birman_{i}.png") for i in (0, 1)]


def cityscapes_pairs(dataset: CatalogEntry) -> list[tuple[Path, Path]]:
    stem = "{kind}/{split}/ulm/ulm_0_{kind}{ending}.png"
    return [
        (
            dataset.path / stem.format(kind="leftImg8bit", split=split, ending=""),
            dataset.path / stem.format(kind="gtFine", split=split, ending="_labelIds"),
        )
        for split in ("train", "val")
    ]


def penn_fudan_pairs(dataset: CatalogEntry) -> list[tuple[Path, Path]]:
    names = [f"FudanPed{i:05d}" for i in range(1, 75)] + [f"PennPed{i:05d}" for i in range(1, 97)]
    return [(dataset.path / f"PNGImages/{name}.png", dataset.path / f"PedMasks/{name}_mask.png") for name in names]


PAIRS = {"voc": voc_pairs, "pets": pets_pairs, "cityscapes": cityscapes_pairs, "penn-fudan": penn_fudan_pairs}


def write_coco(dataset: CatalogEntry) -> None:
    """Write five photographs for each split, with two objects in all but the last, and annotation files of COCO."""
    polygon = [[10.0, 10, 60, 10, 60, 90, 10, 90]]
    points = [[20.0 + i, 20 + 2 * i, 1 + i % 2] for i in range(17)]
    annotation = {"bbox": [10.0, 10, 50, 80], "area": 4000.0, "iscrowd": 0, "segmentation": polygon}
    keypoints = {"keypoints": [value for point in points for value in point], "num_keypoints": 17}
    (dataset.path / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        images = []
        for i, crop in enumerate(seven_crops()[:5], 1):
            name = f"{i:012d}.jpg"
            (dataset.path / f"{split}2017").mkdir(parents=True, exist_ok=True)
            crop.save(dataset.path / f"{split}2017/{name}")
            images.append({"id": i, "file_name": name, "height": 112, "width": 112})
        numbers = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
        categories = [{"id": number, "name": f"class {number}"} for number in numbers]
        objects = [{**annotation, **keypoints, "id": i, "image_id": (i + 1) // 2, "category_id": 1} for i in range(1, 9)]
        person = {"id": 1, "name": "person", "keypoints": [f"point {i}" for i in range(17)], "skeleton": [[1, 2]]}
        for kind, categories_of_kind in (("instances", categories), ("person_keypoints", [person])):
            content = {"images": images, "annotations": objects, "categories": categories_of_kind}
            (dataset.path / f"annotations/{kind}_{split}2017.json").write_text(json.dumps(content))


def write_mnist(folder: Path) -> None:
    """Write the four unpacked files, with repeated embedded digits."""
    images, labels = read_digits("all")
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 50_100), ("t10k", 200)):
        for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            content = np.resize(array, (count, *array.shape[1:])).astype(np.uint8)
            header = bytes([0, 0, 8, content.ndim]) + b"".join(length.to_bytes(4, "big") for length in content.shape)
            (folder / "raw" / f"{prefix}-{kind}-ubyte").write_bytes(header + content.tobytes())


def write_cifar10(folder: Path) -> None:
    """Write batches of crops of photographs in the original format."""
    tiles = hundred_tiles().transpose(0, 3, 1, 2).reshape(100, 3072)
    batch_folder = folder / "cifar-10-batches-py"
    batch_folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (batch_folder / name).write_bytes(pickle.dumps({"data": tiles, "labels": [i % 10 for i in range(100)]}))
    (batch_folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def write_cifar10_jpeg(folder: Path) -> None:
    """Write two archives of JPEGs, with one folder per class."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with ZipFile(folder / f"{split}.zip", "w") as archive:
            for i, tile in enumerate(hundred_tiles()):
                buffer = BytesIO()
                Image.fromarray(tile).save(buffer, "JPEG", quality=95)
                archive.writestr(f"{split}/{'abcdefghij'[i % 10]}/{i:04d}.jpg", buffer.getvalue())


def write_svhn(folder: Path) -> None:
    """Write two MATLAB files, in which digit 0 has the label 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        labels = np.array([[i % 10 or 10] for i in range(100)], np.uint8)
        savemat(folder / f"{split}_32x32.mat", {"X": hundred_tiles().transpose(1, 2, 3, 0), "y": labels})


def write_stl10(folder: Path) -> None:
    """Write crops of photographs in the original format: pixels in column-major order, and labels from 1 on."""
    (folder / "stl10_binary").mkdir(parents=True, exist_ok=True)
    tiles = hundred_tiles().repeat(3, axis=1).repeat(3, axis=2).transpose(0, 3, 2, 1)
    for name in ("train", "test", "unlabeled"):
        (folder / f"stl10_binary/{name}_X.bin").write_bytes(tiles.tobytes())
        (folder / f"stl10_binary/{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(100)))
    (folder / "stl10_binary/fold_indices.txt").write_text("0 1 2\n" * 10)


def write_static_mnist(folder: Path) -> None:
    """Write three files of rows of zeros and ones, with 30 embedded digits each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [" ".join(map(str, row)) + " \n" for row in (read_digits("all")[0][:30].reshape(30, 784) > 127).astype(int)]
    for split in ("train", "valid", "test"):
        (folder / f"binarized_mnist_{split}.amat").write_text("".join(rows))


def write_omniglot28(folder: Path) -> None:
    """Write a MATLAB file: column-major images in [0, 1] as columns, 40 embedded training digits and 20 test digits."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = read_digits("all")[0][:60].swapaxes(2, 3).reshape(60, 784).T / 255
    target = np.eye(50)[:, np.arange(60) % 50]
    arrays = {"data": columns[:, :40], "target": target[:, :40], "testdata": columns[:, 40:], "testtarget": target[:, 40:]}
    savemat(folder / "chardata.mat", arrays)


def write_frey(folder: Path) -> None:
    """Write a MATLAB file: row-major faces as columns, 1,965 crops of a photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.open(resolve_images("photographs/test")[0]).convert("L"))
    faces = [pixels[i // 40 : i // 40 + 28, 10 * (i % 40) : 10 * (i % 40) + 20].reshape(560) for i in range(1965)]
    savemat(folder / "frey_rawface.mat", {"ff": np.stack(faces, 1)})


def hundred_tiles() -> np.ndarray:
    """Return crops of a photograph: uint8 (100, 32, 32, 3)."""
    pixels = np.asarray(Image.open(resolve_images("photographs/test")[0]).convert("RGB").resize((320, 320)))
    return pixels.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(100, 32, 32, 3)


WRITERS = {
    "mnist": write_mnist,
    "mnist-static": write_static_mnist,
    "omniglot28": write_omniglot28,
    "frey": write_frey,
    "cifar10": write_cifar10,
    "cifar10-jpeg": write_cifar10_jpeg,
    "svhn": write_svhn,
    "stl10": write_stl10,
}


def accept_what_is_laid_out(patch: pytest.MonkeyPatch) -> None:
    """Patch the MD5 checksums of CIFAR-10, SVHN and STL-10 in torchvision to those of the fake files."""
    from torchvision.datasets import CIFAR10, STL10, SVHN

    for split, (url, name, _) in SVHN.split_list.items():
        if (path := get_dataset("svhn").path / name).exists():
            patch.setitem(SVHN.split_list, split, [url, name, md5(path)])
    stl10 = get_dataset("stl10").path / "stl10_binary"
    for files in ("train_list", "test_list"):
        if stl10.exists():
            patch.setattr(STL10, files, [[name, md5(stl10 / name)] for name, _ in getattr(STL10, files)])
    batch_folder = get_dataset("cifar10").path / "cifar-10-batches-py"
    if not batch_folder.exists():
        return
    digest = {path.name: md5(path) for path in batch_folder.iterdir()}
    patch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", digest[f"data_batch_{i}"]] for i in range(1, 6)])
    patch.setattr(CIFAR10, "test_list", [["test_batch", digest["test_batch"]]])
    patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": digest["batches.meta"]})


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
