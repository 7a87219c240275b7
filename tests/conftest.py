"""Fixtures for all tests: crops of photographs, a working directory, and the real datasets."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two processes on two cores

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.catalog.catalog import resolve_images
from tests.helpers.gpu_contract import DEVICE
from tests.helpers.subprocess_helpers import start_server

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server before this process computes anything; a controller of pytest-xdist runs no tests."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return
    hashes = tempfile.TemporaryDirectory()
    session.config.add_cleanup(hashes.cleanup)
    os.environ["DARKROOM_TEST_HASHES"] = hashes.name  # of code, see `forkserver_preload.py`
    start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the training tests of the contract as slow for methods that take more than eight seconds; skip tests without GPUs."""
    needed = {"gpu": 1, "gpus2": 2}
    found = torch.cuda.device_count() if DEVICE == "cuda" else 2
    for item in items:
        if count := max((needed[mark.name] for mark in item.iter_markers() if mark.name in needed), default=0):
            reason = f"needs {count} GPU(s) that torch can use, found {found}"
            item.add_marker(pytest.mark.skipif(found < count, reason=reason))
        if item.name.startswith("test_training_improves") and getattr(getattr(item, "cls", None), "learns_slowly", False):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Return a folder with eight 96 x 90 crops of the embedded photographs."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [path for path in resolve_images("photographs") if path.stem in ("astronaut", "camera", "chelsea", "coffee")]
    for path in paths:
        image = Image.open(path)
        for i in range(2):
            left, top = 60 + 100 * i, 80
            image.crop((left, top, left + 96, top + 90)).save(folder / f"{path.stem}{i}.png")
    return folder


@pytest.fixture(scope="session")
def three_photos(photos, tmp_path_factory) -> Path:
    """Return a folder with three of these crops, in different sizes. Two ranks get unequal numbers of images."""
    folder = tmp_path_factory.mktemp("three")
    for i, path in enumerate(sorted(photos.iterdir())[::3]):
        Image.open(path).crop((0, 0, 96 - 6 * i, 90)).save(folder / path.name)
    return folder


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """Change to a temporary working directory, which also contains the folders of runs and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARKROOM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DARKROOM_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("DARKROOM_RUN_FOLDER", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real datasets, DARKROOM_DATA, or skip the test."""
    root = os.environ.get("DARKROOM_DATA")
    if not root or not Path(root, "Set5").exists():
        pytest.skip("DARKROOM_DATA does not name a folder with Set5 in it")
    return Path(root).resolve()


@pytest.fixture
def with_real_data(real_data, monkeypatch) -> Path:
    """Set the data root to the folder of real datasets."""
    monkeypatch.setenv("DARKROOM_DATA", str(real_data))
    return real_data


def as_tensor(path: Path) -> torch.Tensor:
    """Decode an image with PIL: uint8 (C, H, W)."""
    array = np.array(Image.open(path))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
