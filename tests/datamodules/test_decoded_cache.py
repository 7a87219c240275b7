"""The cache of decoded images, compared with images that are decoded at each start."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import UserError
from datamodules.io import decoded_cache
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import Square, load_image_set
from tests.helpers.subprocess_helpers import started

SIZE = 16


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for i in range(20):
        write_image(tmp_path / f"images/class{i % 2}/{i:02d}.bmp", i)
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """Cache sets of any size, and list the files that are decoded."""
    monkeypatch.setattr(decoded_cache, "MIN_IMAGES", 4)
    files, read = [], decoded_cache._decoded

    def counting(paths, *args):
        files.extend(paths)
        return read(paths, *args)

    monkeypatch.setattr(decoded_cache, "_decoded", counting)
    return files


def load(folder: Path, skip_bad: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, str], list[str]]:
    report = DataReport(skip_bad)
    pixels, labels = load_image_set(str(folder), SIZE, 3, Square(), report)
    return pixels, labels, report.fingerprints(), report.skipped


def entries(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache/decoded").glob("*.bin"))


def test_second_start_decodes_only_a_sample(folder, decoded):
    write_image(folder / "class0/a.bmp", 50)
    (folder / "class1/b.bmp").write_bytes(b"no image")
    expected = load_without_cache(folder)
    for count in (22, decoded_cache.SAMPLED + 3):
        decoded.clear()
        found = load(folder, skip_bad=True)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2:] == expected[2:]
        assert "b.bmp" in found[3][0]
        assert len(decoded) <= count
    with pytest.raises(UserError, match=r"1 of 22 images cannot be used .*b\.bmp"):
        load(folder)
    assert len(entries(folder)) == 1


def load_without_cache(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded_cache, "MIN_IMAGES", 1000)
        return load(folder, skip_bad=True)


def test_changed_files_and_settings_are_decoded_again(folder, decoded):
    first = load(folder)
    write_image(folder / "class0/02.bmp", 99)
    second = load(folder)
    assert not torch.equal(first[0], second[0])
    assert first[2] != second[2]
    path = folder / "class0/00.bmp"  # the sample includes the first file
    times = path.stat()
    write_image(path, 98)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(load(folder)[0], load_without_cache(folder)[0])
    load_image_set(str(folder), SIZE, 3, Square(18), DataReport())
    assert len(entries(folder)) == 3


@pytest.mark.parametrize("damage", ["cut", "no pixels", "no results", "half of the results", "other results"])
def test_damaged_entry_is_written_again(folder, decoded, damage):
    expected = load(folder)[0].clone()  # not a map of the file that is damaged
    (path,) = entries(folder)
    results = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "no pixels":
        path.unlink()
    elif damage == "no results":
        results.unlink()
    else:
        results.write_text(results.read_text()[:40] if damage.startswith("half") else "[1, 2]")
    assert torch.equal(load(folder)[0], expected)
    assert len(entries(folder)) == 1


def test_cache_without_space_or_permission_is_not_used(folder, decoded, monkeypatch):
    expected = load_without_cache(folder)
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage(folder)._replace(free=2**20)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert torch.equal(load(folder)[0], expected[0])
    assert not entries(folder)
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("DARKROOM_CACHE", str(folder.parent / "file"))
    assert torch.equal(load(folder)[0], expected[0])


def load_and_count(folder: Path) -> None:
    """Write the number of decoded files to a file of this process."""
    decoded_cache.MIN_IMAGES = 4
    files, read = [], decoded_cache._decoded
    decoded_cache._decoded = lambda paths, *args: files.extend(paths) or read(paths, *args)
    load(folder)
    (folder.parent / f"count-{os.getpid()}").write_text(str(len(files)))


def test_one_of_several_processes_decodes(folder, tmp_path):
    processes = [started([tmp_path / "out"] * 2, load_and_count, folder) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counts = sorted(int(path.read_text()) for path in tmp_path.glob("count-*"))
    assert counts[-1] == 20
    assert max(counts[:2]) <= decoded_cache.SAMPLED + 2
