"""The cache of decoded images, compared with images that are decoded at each start."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.catalog.domains import load_domains
from datamodules.errors import UserError
from datamodules.io import decoded_cache
from datamodules.io.folders import list_images
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import Square, load_image_set
from datamodules.photographs import RandomCrops, read_resized
from datamodules.stylization import Stylization
from datamodules.superresolution import SuperResolution
from datamodules.superresolution_datasets import InMemoryPatches, read_pixels
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.unpaired import Unpaired, UnpairedCrops
from tests.helpers.subprocess_helpers import started

SIZE = 16


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed % 3, 24 - seed % 2, 3), dtype=np.uint8)
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
    for count in (22, decoded_cache.SAMPLED + 1):
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
    write_image(path, 96)  # of the same size
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


def stylization(folder: Path) -> tuple[RandomCrops, DataReport, RandomCrops]:
    """Return training crops that are read by a datamodule, its report, and crops of files that are read one by one."""
    data = Stylization(str(folder), str(folder), size=16, resize=20, skip_bad=True)
    data.setup("fit")
    files = [path for path in list_images(folder) if path.stat().st_size]
    labels = torch.tensor([int(path.parent.name[-1]) for path in files])
    return (
        data.crops,
        data.data_report,
        RandomCrops(RaggedImageBuffer([read_resized(file, 20) for file in files]), labels, 16, 0),
    )


def super_resolution(folder: Path) -> tuple[InMemoryPatches, DataReport, InMemoryPatches]:
    """Return patches as in `stylization`."""
    data = SuperResolution(2, str(folder), val=str(folder), patch_size=8, skip_bad=True)
    data._setup_training()
    files = [path for path in list_images(folder) if path.stat().st_size]
    images = RaggedImageBuffer([read_pixels(file, 2, 1) for file in files])
    expected = InMemoryPatches(images, 0, data.patches.size, 2, data.patches.border_overhang)
    return data.patches, data.data_report, expected


def unpaired(folder: Path, resize: int | None = 20) -> tuple[UnpairedCrops, DataReport, UnpairedCrops]:
    """Return crops as in `stylization`; the folders of the classes are the domains. Unusable files are removed."""
    for domain, name in (("A", "class0"), ("B", "class1")):
        if not (link := folder.parent / f"train{domain}").exists():
            link.symlink_to(folder / name)
    for path in list_images(folder):
        if not path.stat().st_size:
            path.unlink()
    spec = f"{folder.parent}/train"
    data = Unpaired(spec, spec, crop=16, resize=resize)
    data.setup("fit")
    images = [
        [image.pixels() if resize is None else image.resize_square(image.pixels(), resize) for image in domain]
        for domain in load_domains(spec)
    ]
    return data.train_crops, data.data_report, UnpairedCrops(images[0], images[1], 16, True, 0)


def unpaired_of_original_size(folder: Path) -> tuple[UnpairedCrops, DataReport, UnpairedCrops]:
    return unpaired(folder, None)


DATAMODULES = [stylization, super_resolution, unpaired, unpaired_of_original_size]


def assert_same_batches(found: Any, expected: Any) -> None:
    """Compare batches with their layout in memory, on which the rounding of a convolution may depend."""
    assert len(found) == len(expected)
    for start, items in ((0, [3, 0, 8]), (40, [1, 1, 5])):
        pairs = zip(found[start, np.array(items)].items(), expected[start, np.array(items)].items(), strict=True)
        for (name, value), (other_name, other) in pairs:
            assert name == other_name
            assert torch.equal(value, other)
            assert value.stride() == other.stride()


@pytest.mark.parametrize("load_images", DATAMODULES)
def test_batches_are_the_same_with_and_without_the_cache(folder, decoded, monkeypatch, load_images):
    (folder / "class1/b.bmp").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded_cache, "MIN_IMAGES", 1000)
        without, report, expected = load_images(folder)
    assert_same_batches(without, expected)
    assert not entries(folder)
    first, first_report, _ = load_images(folder)
    count, n_entries = len(decoded), len(entries(folder))
    decoded.clear()
    second, second_report, _ = load_images(folder)
    assert 0 < len(decoded) < count
    assert len(entries(folder)) == n_entries > 0
    for found, found_report in ((first, first_report), (second, second_report)):
        assert_same_batches(found, expected)
        assert vars(found_report) == vars(report)
    write_image(folder / "class0/02.bmp", 99)
    changed, changed_report, expected = load_images(folder)
    assert_same_batches(changed, expected)
    assert changed_report.fingerprints() != report.fingerprints()


@pytest.mark.parametrize("load_images", DATAMODULES)
def test_without_space_batches_are_the_same(folder, decoded, monkeypatch, load_images):
    usage = shutil.disk_usage(folder)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found, _, expected = load_images(folder)
    assert_same_batches(found, expected)
    assert [path.suffix for path in (folder.parent / "cache/decoded").iterdir() if path.suffix != ".lock"] == []


def test_a_set_without_usable_files_is_an_error_at_each_start(folder, decoded):
    for path in list_images(folder):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no image can be used: .*00\.bmp: empty file"):
            load(folder, skip_bad=True)


@pytest.mark.slow
@pytest.mark.parametrize("load_images", DATAMODULES)
def test_mapped_pixels_can_be_sent_to_loader_processes(folder, decoded, load_images):
    """Where processes are not forked, as on macOS, they receive a copy of the pixels in shared memory."""
    items, _, expected = load_images(folder)
    sampler = [(0, np.array([3, 0])), (2, np.array([1, 1]))]
    batches = DataLoader(items, sampler=sampler, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    for slice_, batch in zip(sampler, batches, strict=True):
        for name, value in expected[slice_].items():
            assert torch.equal(batch[name], value)


def test_files_that_become_usable_are_read_again(folder, decoded, monkeypatch):
    """The size and the time of modification of a file do not change with its permissions, or with the limit of pixels."""
    (folder / "class1/b.bmp").write_bytes(b"no image")
    assert len(load(folder, skip_bad=True)[0]) == 20
    times = (folder / "class1/b.bmp").stat()
    (folder / "class1/b.bmp").write_bytes(b"")
    write_image(folder / "class1/b.bmp", 7)
    read = decoded_cache.os.stat

    def same_times(path, *args, **kwargs):
        return times if str(path).endswith("b.bmp") else read(path, *args, **kwargs)

    monkeypatch.setattr(decoded_cache.os, "stat", same_times)
    assert len(load(folder, skip_bad=True)[0]) == 21
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="decompression bomb"):
        load(folder)


def load_and_count(folder: Path, load_images: Callable[[Path], Any]) -> None:
    """Write the number of decoded files to a file of this process."""
    decoded_cache.MIN_IMAGES = 4
    files, read = [], decoded_cache._decoded
    decoded_cache._decoded = lambda paths, *args: files.extend(paths) or read(paths, *args)
    load_images(folder)
    (folder.parent / f"count-{os.getpid()}").write_text(str(len(files)))


@pytest.mark.parametrize("load_images", [load, super_resolution])
def test_one_of_several_processes_decodes(folder, tmp_path, load_images):
    processes = [started([tmp_path / "out"] * 2, load_and_count, folder, load_images) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counts = sorted(int(path.read_text()) for path in tmp_path.glob("count-*"))
    assert counts[-1] == 20
    assert max(counts[:2]) <= decoded_cache.SAMPLED
