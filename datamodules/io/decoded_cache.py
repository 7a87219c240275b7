"""Cache of decoded images on disk: memory-mapped, and shared by all processes, runs and trials on a machine."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import PIL
import torch
from filelock import FileLock
from torch import Tensor

from datamodules.io.image_io import InvalidImage
from datamodules.io.paths import cache_dir

MIN_IMAGES = 1000  # smaller sets are decoded at each start, in about a second
SAMPLED = 8  # files whose content is compared with the cache when it is used
FREE_BYTES = 2**30  # that remain free on the disk
MAX_WAIT_S = 1200  # for a process that decodes the same images; other processes of a run wait half an hour
ReadFn = Callable[[Path], tuple[Tensor, str]]


class DecodedImages(NamedTuple):
    """Decoded files.

    Args:
        results: for each file, the reason why it is unusable (empty if it is usable), and the hash of its content.
        pixels: uint8 (usable files, C, H, W).
    """

    results: list[tuple[str, str]]
    pixels: Tensor


def decode_images(paths: Sequence[Path], shape: tuple[int, int, int], settings: str, read: ReadFn) -> DecodedImages:
    """Decode image files, or map those of an earlier start into memory.

    Sets of at least `MIN_IMAGES` files are written to the cache folder. They are identified by the settings and by the path,
    the size and the time of modification of each file; the content of a few files is compared as well. The first process that
    needs the images decodes them; others wait. Without space or permission for the cache, they are decoded into memory.

    Args:
        paths: image files.
        shape: (C, H, W) of the result.
        settings: everything else on which the pixels depend.
        read: function that returns the pixels, uint8 of the shape, and the content hash of a file, or raises `InvalidImage`.
    """
    if len(paths) < MIN_IMAGES:
        return _in_memory(paths, shape, read)
    folder = cache_dir() / "decoded"
    path = folder / f"{_key(paths, shape, settings)}.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=MAX_WAIT_S):
            has_space = shutil.disk_usage(folder).free > len(paths) * math.prod(shape) + FREE_BYTES
            is_current = _is_current(path, paths, shape, read)
            if not is_current and has_space:
                _write(path, paths, read)
            if is_current or has_space:
                return _mapped(path, shape)
    except OSError:  # not writable, full in the meantime, or in use by another process for a long time
        pass
    return _in_memory(paths, shape, read)


def _key(paths: Sequence[Path], shape: tuple[int, int, int], settings: str) -> str:
    folder = Path.cwd()  # of relative paths
    digest = hashlib.sha256(repr((torch.__version__, PIL.__version__, shape, settings, folder)).encode())
    for path in paths:
        name, size, time = os.fspath(path), 0, 0  # of a file that cannot be read
        with suppress(OSError):
            status = path.stat()
            size, time = status.st_size, status.st_mtime_ns
        digest.update(f"{name} {size} {time}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:32]


def _decoded(paths: Sequence[Path], read: ReadFn) -> Iterator[tuple[Tensor | None, str, str]]:
    """Yield the pixels of each file, None if it is unusable, with the reason and the hash; all cores decode."""

    def attempt(path: Path) -> tuple[Tensor | None, str, str]:
        try:
            pixels, content_hash = read(path)
        except InvalidImage as error:
            return None, str(error), ""
        return pixels, "", content_hash

    with ThreadPoolExecutor() as pool:
        found: Iterator[tuple[Tensor | None, str, str]] = pool.map(attempt, paths)
        if len(paths) >= MIN_IMAGES:
            from rich.console import Console
            from rich.progress import track

            console = Console(stderr=True)
            found = iter(track(found, f"decoding {len(paths):,} images", len(paths), console=console, transient=True))
        yield from found


def _in_memory(paths: Sequence[Path], shape: tuple[int, int, int], read: ReadFn) -> DecodedImages:
    with torch.inference_mode(False):  # other threads, which are not in this mode, may write to the pixels
        pixels = torch.empty(len(paths), *shape, dtype=torch.uint8)
    results, count = [], 0
    for image, reason, content_hash in _decoded(paths, read):
        results.append((reason, content_hash))
        if image is not None:
            pixels[count] = image
            count += 1
    return DecodedImages(results, pixels[:count])


def _write(path: Path, paths: Sequence[Path], read: ReadFn) -> None:
    """Write the pixels, and then the results, which complete the entry."""
    results = []
    pixels = path.with_suffix(".pixels")  # another process may have mapped the earlier file
    with pixels.open("wb") as file:
        for image, reason, content_hash in _decoded(paths, read):
            results.append((reason, content_hash))
            if image is not None:
                file.write(image.contiguous().numpy().tobytes())
    pixels.replace(path)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results))
    part.replace(path.with_suffix(".json"))


def _mapped(path: Path, shape: tuple[int, int, int]) -> DecodedImages:
    results = [(reason, content_hash) for reason, content_hash in json.loads(path.with_suffix(".json").read_text())]
    count = sum(not reason for reason, _ in results)
    with torch.inference_mode(False):
        pixels = torch.from_file(os.fspath(path), shared=False, size=count * math.prod(shape), dtype=torch.uint8)
    return DecodedImages(results, pixels.view(count, *shape))


def _is_current(path: Path, paths: Sequence[Path], shape: tuple[int, int, int], read: ReadFn) -> bool:
    """Return whether the entry is there and complete, and a sample of the files has the content that it was made from."""
    try:
        results = json.loads(path.with_suffix(".json").read_text())
        n_usable = sum(not reason for reason, _ in results)
        if len(results) != len(paths) or path.stat().st_size != n_usable * math.prod(shape):
            return False
    except (OSError, ValueError, TypeError):
        return False
    sample = range(0, len(paths), max(1, len(paths) // SAMPLED))
    found = _decoded([paths[i] for i in sample], read)
    return all([reason, content_hash] == results[i] for i, (_, reason, content_hash) in zip(sample, found, strict=True))
