"""Download a dataset; every file is checked against a hash."""

import pooch
from rich.console import Console
from rich.progress import track
from torchvision import datasets

from datamodules.catalog.catalog import CatalogEntry, DatasetNotFound, data_root, get_dataset


def download(data_set: CatalogEntry) -> int:
    """Fetch a set's files, each checked against its sha256, into the data root; files that are intact stay.

    Returns:
        How many files the set now has.

    Raises:
        MissingData: the set must be had by hand, or the download failed; the message says what to do.
    """
    if data_set.source == "torchvision":
        download_torchvision(data_set.name)
        return sum(1 for pattern in data_set._patterns(None, None) for _ in data_set.path.glob(pattern))
    if data_set.source != "files":
        raise DatasetNotFound(f"{data_set.name} cannot be downloaded: {data_set.install_hint()}")
    registry = {name: f"sha256:{whole}" for name, (_, whole) in data_set.manifest().items()}
    store = pooch.create(path=data_set.path, base_url=data_set.url, registry=registry, retry_if_failed=3)
    for name in track(registry, description=data_set.name, disable=not Console().is_terminal):
        try:
            store.fetch(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong checksum
            raise DatasetNotFound(f"{data_set.name}: {name} could not be fetched from {data_set.url} ({error})") from None
    return len(registry)


def download_torchvision(name: str) -> None:
    """Download a set by torchvision's class for it, which checks what it gets.

    Raises:
        MissingData: that failed.
    """
    data_set = get_dataset(name)
    root = data_set.path
    try:
        if name == "mnist":
            datasets.MNIST(str(data_root()), download=True)
        elif name == "cifar10":
            datasets.CIFAR10(str(root), download=True)
        elif name == "voc":
            datasets.VOCSegmentation(str(root), "2012", download=True)
        elif name == "pets":
            for part in ("trainval", "test"):
                datasets.OxfordIIITPet(str(root), part, target_types="segmentation", download=True)
        elif name == "celeba":
            datasets.CelebA(str(data_root()), split="all", download=True)
        else:
            for part in ("train", "test"):
                datasets.SVHN(str(root), split=part, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise DatasetNotFound(f"{name} could not be fetched: {error}") from None
