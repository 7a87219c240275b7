"""Download datasets and verify the checksum of every file."""

from importlib.util import find_spec

import pooch
from rich.console import Console
from rich.progress import track
from torchvision import datasets

from datamodules.catalog.catalog import CatalogEntry, DatasetNotFound, get_dataset
from datamodules.io.paths import data_root


def download(dataset: CatalogEntry) -> int:
    """Download a dataset's files into the data root and verify their sha256; existing intact files are kept.

    Returns:
        Number of files of the dataset.

    Raises:
        DatasetNotFound: the dataset must be installed manually, or the download failed; the message contains instructions.
    """
    if dataset.source == "torchvision":
        download_torchvision(dataset.name)
        return sum(1 for pattern in dataset._patterns(None, None) for _ in dataset.path.glob(pattern))
    if dataset.source != "files":
        raise DatasetNotFound(f"{dataset.name} cannot be downloaded: {dataset.install_hint()}")
    registry = {name: f"sha256:{file_hash}" for name, (_, file_hash) in dataset.manifest().items()}
    fetcher = pooch.create(path=dataset.path, base_url=dataset.url, registry=registry, retry_if_failed=3)
    for name in track(registry, description=dataset.name, disable=not Console().is_terminal):
        try:
            fetcher.fetch(name)
        except (OSError, ValueError) as error:  # requests raises OSErrors, pooch a ValueError for a wrong checksum
            by_hand = f"save the file as {dataset.path / name} (sha256 {registry[name].removeprefix('sha256:')})"
            raise DatasetNotFound(
                f"{dataset.name}: {dataset.url}{name} could not be downloaded ({error}). "
                f"Check the connection, or {by_hand}. Then retry"
            ) from None
    return len(registry)


def download_torchvision(name: str) -> None:
    """Download a dataset with its torchvision class, which verifies checksums.

    Raises:
        DatasetNotFound: the download failed.
    """
    dataset = get_dataset(name)
    root = dataset.path
    try:
        if name == "mnist":
            datasets.MNIST(str(data_root()), download=True)
        elif name == "cifar10":
            datasets.CIFAR10(str(root), download=True)
        elif name == "stl10":
            datasets.STL10(str(root), download=True)
        elif name == "voc":
            datasets.VOCSegmentation(str(root), "2012", download=True)
        elif name == "pets":
            for split in ("trainval", "test"):
                datasets.OxfordIIITPet(str(root), split, target_types="segmentation", download=True)
        elif name == "celeba":
            datasets.CelebA(str(data_root()), split="all", download=True)
        else:
            for split in ("train", "test"):
                datasets.SVHN(str(root), split=split, download=True)
    except ImportError as error:
        raise DatasetNotFound(f"{name}: its download requires the package {error.name}. Run pip install {error.name}") from None
    except (OSError, RuntimeError, ValueError) as error:
        if name == "celeba" and find_spec("gdown") is None:  # torchvision calls it for Google Drive
            raise DatasetNotFound(f"{name}: its download requires the package gdown. Run pip install gdown") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        by_hand = "; ".join(f"{address} (md5 {md5})" for address, md5 in torchvision_files(name))
        folder = {"mnist": data_root() / "MNIST/raw", "pets": root / "oxford-iiit-pet"}.get(name, root)
        advice = f"Check the connection, or save in {folder}: {by_hand}. Then retry"
        raise DatasetNotFound(f"{name} could not be downloaded ({reason}). {advice}") from None


def torchvision_files(name: str) -> list[tuple[str, str]]:
    """Return the address and the md5 of each file of a dataset of torchvision."""
    if name == "mnist":
        return [(datasets.MNIST.mirrors[0] + file, md5) for file, md5 in datasets.MNIST.resources]
    if name == "cifar10":
        return [(datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5)]
    if name == "stl10":
        return [(datasets.STL10.url, datasets.STL10.tgz_md5)]
    if name == "svhn":
        return [(url, md5) for split, (url, _, md5) in datasets.SVHN.split_list.items() if split in ("train", "test")]
    if name == "pets":
        return list(datasets.OxfordIIITPet._RESOURCES)
    if name == "voc":
        return [(datasets.voc.DATASET_YEAR_DICT["2012"]["url"], datasets.voc.DATASET_YEAR_DICT["2012"]["md5"])]
    if name == "celeba":
        files = datasets.CelebA.file_list
        return [(f"{file} of https://drive.google.com/uc?id={file_id}", md5) for file_id, md5, file in files]
    raise AssertionError(name)
