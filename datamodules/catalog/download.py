"""Download datasets and verify the checksum of every file."""

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
            raise DatasetNotFound(
                f"{dataset.name}: {name} could not be downloaded from {dataset.url} ({error}). Check the connection, then retry"
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
    except (OSError, RuntimeError, ValueError) as error:
        raise DatasetNotFound(f"{name} could not be downloaded ({error}). Check the connection, then retry") from None
