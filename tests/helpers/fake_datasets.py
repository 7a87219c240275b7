"""Embedded photographs and digits, laid out as the files of data sets that are not here."""

import hashlib
import pickle
import re
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
    """Small real pictures where the data set's files lie."""
    data_set = get_dataset(name.partition("/")[0])
    if data_set.source == "embedded":
        return
    if data_set.arrays:
        LAY_OUT[data_set.name](data_set.path)
        return
    if data_set.masks:
        lay_out_masks(data_set)
        return
    photographs = resolve_images("photographs/train")[:4] + resolve_images("photographs/test")
    cuttings = [Image.open(path).crop((60, 40, 220, 200)).convert("RGB") for path in photographs]
    chosen = [re.sub(r"\[(.)[^]]*\]", r"\1", pattern) for pattern in data_set._patterns(None, None)]
    stars = [name.replace("**/", "some/").replace("*", "picture{}").replace("??", "1{}").replace("?", "{}") for name in chosen]
    targets = list(data_set.manifest()) or [pattern.format(*[i] * 3) for pattern in stars for i in range(7)]
    for i, target in enumerate(targets):
        path = data_set.path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        cuttings[i % 7].save(path)


def lay_out_masks(data_set: CatalogEntry) -> None:
    """Three pictures a split, of coins, whose masks have some of the set's values; two for sets that torchvision reads."""
    sample = list_masked_images("coins")[0].load(1)
    values = list(data_set.masks.get("values", range(len(data_set.masks["classes"]))))
    values = values if not data_set.masks.get("instances") else list(range(40))
    deep = data_set.masks.get("instances")
    for i, (picture, mask) in enumerate(PAIRS.get(data_set.name, pairs_by_pattern)(data_set)):
        for path in (picture, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        top, left = 20 * (i % 8), 10 * (i % 8)
        cut = np.s_[top : top + 96, left : left + 80]
        Image.fromarray(sample.pixels[0].numpy()[cut]).save(picture)
        shown = np.array(values)[(sample.instance_ids[cut] + np.arange(80) // 16) % len(values)]
        Image.fromarray(shown.astype(np.uint16 if deep else np.uint8)).save(mask)


def pairs_by_pattern(data_set: CatalogEntry) -> list[tuple[Path, Path]]:
    """Paths of pictures and masks where the catalogue looks for them."""
    pictures = []
    for pattern in data_set._patterns(None, None):
        for i in range(data_set.expected_count() if data_set.count else 3):
            name = re.sub(
                r"\[(\d)-(\d)\]",
                lambda found, i=i: str(range(int(found[1]), int(found[2]) + 1)[i % (int(found[2]) - int(found[1]) + 1)]),
                pattern,
            )
            pictures.append(data_set.path / name.replace("*", f"{i:03d}"))
    pictures = list(dict.fromkeys(pictures))
    source, target = data_set.masks["replace"]
    return [(path, data_set.path / re.sub(source, target, path.relative_to(data_set.path).as_posix())) for path in pictures]


def pairs_of_voc(data_set: CatalogEntry) -> list[tuple[Path, Path]]:
    root = data_set.path / "VOCdevkit/VOC2012"
    (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(("train", "val")):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(f"2007_00000{i}\n")
    return [(root / f"JPEGImages/2007_00000{i}.jpg", root / f"SegmentationClass/2007_00000{i}.png") for i in (0, 1)]


def pairs_of_pets(data_set: CatalogEntry) -> list[tuple[Path, Path]]:
    root = data_set.path / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(("trainval", "test")):
        (root / f"annotations/{split}.txt").write_text(f"Birman_{i} 1 1 1\n")
    return [(root / f"images/Birman_{i}.jpg", root / f"annotations/trimaps/Birman_{i}.png") for i in (0, 1)]


def pairs_of_cityscapes(data_set: CatalogEntry) -> list[tuple[Path, Path]]:
    stem = "{kind}/{split}/ulm/ulm_0_{kind}{ending}.png"
    return [
        (
            data_set.path / stem.format(kind="leftImg8bit", split=split, ending=""),
            data_set.path / stem.format(kind="gtFine", split=split, ending="_labelIds"),
        )
        for split in ("train", "val")
    ]


PAIRS = {"voc": pairs_of_voc, "pets": pairs_of_pets, "cityscapes": pairs_of_cityscapes}


def lay_out_mnist(folder: Path) -> None:
    """Its four files, unpacked; the embedded digits again and again."""
    images, labels = read_digits("all")
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 50_100), ("t10k", 200)):
        for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            content = np.resize(array, (count, *array.shape[1:])).astype(np.uint8)
            header = bytes([0, 0, 8, content.ndim]) + b"".join(length.to_bytes(4, "big") for length in content.shape)
            (folder / "raw" / f"{prefix}-{kind}-ubyte").write_bytes(header + content.tobytes())


def lay_out_cifar10(folder: Path) -> None:
    """Batches of cuttings of photographs in the origin's own format."""
    tiles = hundred_tiles().transpose(0, 3, 1, 2).reshape(100, 3072)
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (inside / name).write_bytes(pickle.dumps({"data": tiles, "labels": [i % 10 for i in range(100)]}))
    (inside / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def lay_out_cifar10_jpeg(folder: Path) -> None:
    """Two archives of JPEGs, a folder a class."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        with ZipFile(folder / f"{part}.zip", "w") as archive:
            for i, tile in enumerate(hundred_tiles()):
                packed = BytesIO()
                Image.fromarray(tile).save(packed, "JPEG", quality=95)
                archive.writestr(f"{part}/{'abcdefghij'[i % 10]}/{i:04d}.jpg", packed.getvalue())


def lay_out_svhn(folder: Path) -> None:
    """Two of MATLAB's files, whose digit 0 has the label 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        labels = np.array([[i % 10 or 10] for i in range(100)], np.uint8)
        savemat(folder / f"{part}_32x32.mat", {"X": hundred_tiles().transpose(1, 2, 3, 0), "y": labels})


def lay_out_static_mnist(folder: Path) -> None:
    """Three files of rows of zeros and ones, 30 embedded digits each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [" ".join(map(str, row)) + " \n" for row in (read_digits("all")[0][:30].reshape(30, 784) > 127).astype(int)]
    for part in ("train", "valid", "test"):
        (folder / f"binarized_mnist_{part}.amat").write_text("".join(rows))


def lay_out_omniglot28(folder: Path) -> None:
    """One of MATLAB's files: a column a picture, column by column, between 0 and 1; 40 embedded digits, 20 for tests."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = read_digits("all")[0][:60].swapaxes(2, 3).reshape(60, 784).T / 255
    target = np.eye(50)[:, np.arange(60) % 50]
    parts = {"data": columns[:, :40], "target": target[:, :40], "testdata": columns[:, 40:], "testtarget": target[:, 40:]}
    savemat(folder / "chardata.mat", parts)


def lay_out_frey(folder: Path) -> None:
    """One of MATLAB's files: a column a face, row by row; 1,965 cuttings of a photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.open(resolve_images("photographs/test")[0]).convert("L"))
    faces = [pixels[i // 40 : i // 40 + 28, 10 * (i % 40) : 10 * (i % 40) + 20].reshape(560) for i in range(1965)]
    savemat(folder / "frey_rawface.mat", {"ff": np.stack(faces, 1)})


def hundred_tiles() -> np.ndarray:
    """Cuttings of a photograph: uint8 (100, 32, 32, 3)."""
    pixels = np.asarray(Image.open(resolve_images("photographs/test")[0]).convert("RGB").resize((320, 320)))
    return pixels.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(100, 32, 32, 3)


LAY_OUT = {
    "mnist": lay_out_mnist,
    "mnist-static": lay_out_static_mnist,
    "omniglot28": lay_out_omniglot28,
    "frey": lay_out_frey,
    "cifar10": lay_out_cifar10,
    "cifar10-jpeg": lay_out_cifar10_jpeg,
    "svhn": lay_out_svhn,
}


def accept_what_is_laid_out(patch: pytest.MonkeyPatch) -> None:
    """Let torchvision, which knows the MD5 of CIFAR-10's and SVHN's real files, take those that are laid out."""
    from torchvision.datasets import CIFAR10, SVHN

    for part, (url, name, _) in SVHN.split_list.items():
        if (path := get_dataset("svhn").path / name).exists():
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            patch.setitem(SVHN.split_list, part, [url, name, digest])
    inside = get_dataset("cifar10").path / "cifar-10-batches-py"
    if not inside.exists():
        return
    digest = {path.name: hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in inside.iterdir()}
    patch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", digest[f"data_batch_{i}"]] for i in range(1, 6)])
    patch.setattr(CIFAR10, "test_list", [["test_batch", digest["test_batch"]]])
    patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": digest["batches.meta"]})
