"""Embedded photographs and digits, laid out as the files of data sets that are not here."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.array_files import read_digits
from datamodules.catalogue import find, locate


def lay_out(name: str) -> None:
    """Small real pictures where the data set's files lie."""
    data_set = find(name.partition("/")[0])
    if data_set.get == "embedded":
        return
    if data_set.arrays:
        {"mnist": lay_out_mnist, "cifar10": lay_out_cifar10}[data_set.name](data_set.path)
        return
    photographs = locate("photographs/train")[:4] + locate("photographs/test")
    cuttings = [Image.open(path).crop((60, 40, 220, 200)).convert("RGB") for path in photographs]
    stars = data_set.images.replace("**/", "some/").replace("*", "picture{}")
    targets = list(data_set.manifest()) or [stars.format(*[i] * 3) for i in range(7)]
    for i, target in enumerate(targets):
        path = data_set.path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        cuttings[i % 7].save(path)


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
    pixels = np.asarray(Image.open(locate("photographs/test")[0]).convert("RGB").resize((320, 320)))
    tiles = pixels.reshape(10, 32, 10, 32, 3).transpose(0, 2, 4, 1, 3).reshape(100, 3072)
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (inside / name).write_bytes(pickle.dumps({"data": tiles, "labels": [i % 10 for i in range(100)]}))
    (inside / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def accept_laid_out_cifar10(patch: pytest.MonkeyPatch) -> None:
    """Let torchvision, which knows the MD5 of the real files, take those that are laid out."""
    from torchvision.datasets import CIFAR10

    inside = find("cifar10").path / "cifar-10-batches-py"
    digest = {path.name: hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in inside.iterdir()}
    patch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", digest[f"data_batch_{i}"]] for i in range(1, 6)])
    patch.setattr(CIFAR10, "test_list", [["test_batch", digest["test_batch"]]])
    patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": digest["batches.meta"]})
