"""Cache of decoded images on disk: memory-mapped, and shared by all processes, runs and trials on a machine."""

import errno
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import PIL.Image
import torch
from filelock import FileLock
from torch import Tensor

from datamodules.io.image_io import InvalidImage
from datamodules.io.paths import cache_dir
from datamodules.transforms.ragged_buffer import RaggedImageBuffer

VERSION = 2  # of the entries; a change in how Darkroom reads or resizes images increases it
MIN_IMAGES = 1000  # smaller sets are decoded at each start, in about a second
SAMPLED = 8  # files whose content is compared with the cache when it is used
CHUNK = 256  # files that are decoded before the next are begun, which bounds the memory; then the free space is compared
FREE_BYTES = 2**30  # that remain free on the disk
MAX_WAIT_S = 1200  # for a process that decodes the same images; other processes of a run wait half an hour
# Pages in memory only, which nobody writes. Linux reserves no memory for them, so that a set can be larger than the memory.
PRIVATE = MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)  # MAP_NORESERVE, which Python 3.13 names
ReadFn = Callable[[int], tuple[Tensor, str]]


class DecodedFile(NamedTuple):
    """A decoded file: its pixels, None if it is unusable; the reason for that, otherwise empty; the hash of its content."""

    pixels: Tensor | None
    reason: str
    content_hash: str


class DecodedImages(NamedTuple):
    """Decoded files.

    Args:
        results: for each file, the reason why it is unusable (empty if it is usable), and the hash of its content.
        shapes: shape of the pixels of each usable file, (usable files, 3).
        pixels: those of all usable files, one after the other, uint8 (total,).
    """

    results: list[tuple[str, str]]
    shapes: np.ndarray
    pixels: Tensor

    def images(self) -> list[Tensor]:
        """Return the pixels of each usable file; they are views."""
        parts = self.pixels.split(self.shapes.prod(1).tolist())
        return [part.view(shape) for part, shape in zip(parts, self.shapes.tolist(), strict=True)]

    def buffer(self) -> RaggedImageBuffer:
        """Return a buffer of the images, whose pixels are (H, W, C) each; they are views."""
        heights, widths, channels = self.shapes.T.tolist()
        return RaggedImageBuffer.from_pixels(self.pixels.view(-1, channels[0]), heights, widths)


def decode_images(files: Sequence[str | Path], settings: str, read: ReadFn) -> DecodedImages:
    """Decode image files, or map those of an earlier start into memory.

    Sets of at least `MIN_IMAGES` files are written to the cache folder. They are identified by the settings and by the path,
    the size and the time of modification of each file; a few files, and all that were unusable, are read again and compared.
    The first process that needs the images decodes them; others wait. Without space or permission for the cache, they are
    decoded into memory.

    Args:
        files: image files.
        settings: everything else on which the pixels, the reasons and the hashes depend.
        read: function that returns the pixels, uint8 of any size, and the content hash of the file with a number, or raises
            `InvalidImage`.
    """
    if len(files) < MIN_IMAGES:
        return _in_memory(len(files), read)
    folder = cache_dir() / "decoded"
    path = folder / f"{_key(files, settings)}.bin"
    try:
        if found := _current(path, len(files), read):  # without the lock, so that processes do not wait for each other
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=MAX_WAIT_S):
            return _current(path, len(files), read) or _write(path, len(files), read)
    except OSError:  # not writable, full, or in use by another process for a long time
        pass  # the exception holds the threads that decode
    return _in_memory(len(files), read)


def _key(files: Sequence[str | Path], settings: str) -> str:
    folder = "" if all(map(os.path.isabs, files)) else Path.cwd()  # of relative paths
    limit = PIL.Image.MAX_IMAGE_PIXELS  # larger images are unusable
    lines = [repr((VERSION, torch.__version__, PIL.__version__, limit, settings, folder))]
    for file in files:
        try:
            status = os.stat(file)
            lines.append(f"{file} {status.st_size} {status.st_mtime_ns}")
        except OSError:
            lines.append(f"{file} is unreadable")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _decoded(numbers: Sequence[int], read: ReadFn) -> Iterator[DecodedFile]:
    """Decode the files with these numbers on all cores."""

    def attempt(number: int) -> DecodedFile:
        try:
            pixels, content_hash = read(number)
        except InvalidImage as error:
            return DecodedFile(None, str(error), "")
        return DecodedFile(pixels, "", content_hash)

    chunks: Iterable[Sequence[int]] = [numbers[first : first + CHUNK] for first in range(0, len(numbers), CHUNK)]
    with ThreadPoolExecutor() as pool:
        found = (file for chunk in chunks for file in pool.map(attempt, chunk))
        if len(numbers) >= MIN_IMAGES:
            from rich.console import Console
            from rich.progress import track

            console = Console(stderr=True)
            yield from track(found, f"decoding {len(numbers):,} images", len(numbers), console=console, transient=True)
        else:
            yield from found


def _store(decoded: Iterable[DecodedFile], file: IO[bytes]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Write the pixels of the usable files, and return the results and the shapes, see `DecodedImages`."""
    results, shapes = [], []
    for pixels, reason, content_hash in decoded:
        results.append((reason, content_hash))
        if pixels is not None:
            file.write(pixels.contiguous().numpy().data)
            shapes.append(pixels.shape)
    return results, np.array(shapes, dtype=np.int64).reshape(-1, 3)


def _in_memory(count: int, read: ReadFn) -> DecodedImages:
    content = io.BytesIO()
    results, shapes = _store(_decoded(range(count), read), content)
    return DecodedImages(results, shapes, _tensor(content.getbuffer()))


def _tensor(content: mmap | memoryview) -> Tensor:
    """Return a uint8 tensor of the bytes, which are not copied."""
    with torch.inference_mode(False):  # other threads, which are not in this mode, may write to the pixels
        return torch.frombuffer(content, dtype=torch.uint8) if len(content) else torch.empty(0, dtype=torch.uint8)


def _write(path: Path, count: int, read: ReadFn) -> DecodedImages:
    """Write the pixels, and then the results, which complete the entry, and map it into memory.

    Raises:
        OSError: there is no space or no permission.
    """
    part = path.with_suffix(".part")  # another process may have mapped the earlier file
    try:
        with part.open("wb") as file:
            results, shapes = _store(_while_space(_decoded(range(count), read), count, path.parent), file)
        part.replace(path)
        reasons = {number: reason for number, (reason, _) in enumerate(results) if reason}
        hashes = [content_hash for _, content_hash in results]
        distinct = shapes[:1] if (shapes == shapes[:1]).all() else shapes
        part.write_text(json.dumps({"reasons": reasons, "hashes": hashes, "shapes": distinct.tolist()}))
        part.replace(path.with_suffix(".json"))
    finally:
        part.unlink(missing_ok=True)
    return _mapped(path)


def _while_space(decoded: Iterable[DecodedFile], count: int, folder: Path) -> Iterator[DecodedFile]:
    """Yield decoded files while the disk has space for all; those to come are assumed to have the mean size of the others.

    Raises:
        OSError: less than `FREE_BYTES` would remain.
    """
    written = 0
    for number, file in enumerate(decoded, 1):
        yield file
        written += 0 if file.pixels is None else file.pixels.nbytes
        if number % CHUNK == 0 or number == count:
            needed = written * (count - number) // number + FREE_BYTES
            if shutil.disk_usage(folder).free < needed:
                raise OSError(errno.ENOSPC, f"{folder}: {needed:,} bytes are needed")


def _mapped(path: Path) -> DecodedImages:
    """Map an entry into memory.

    Raises:
        OSError, ValueError, TypeError, LookupError: it is absent or damaged.
    """
    content = json.loads(path.with_suffix(".json").read_text())
    results = [("", content_hash) for content_hash in content["hashes"]]
    for number, reason in content["reasons"].items():
        results[int(number)] = (reason, "")
    distinct = np.array(content["shapes"], dtype=np.int64).reshape(-1, 3)  # one row, if all are equal
    shapes = np.broadcast_to(distinct, (len(results) - len(content["reasons"]), 3))
    size = int(shapes.prod(1).sum())
    if path.stat().st_size != size:
        raise ValueError
    with path.open("rb") as file:  # `torch.from_file` would return a tensor that cannot be sent to processes
        content = mmap(file.fileno(), size, flags=PRIVATE, prot=PROT_READ | PROT_WRITE) if size else memoryview(b"")
    return DecodedImages(results, shapes, _tensor(content))


def _current(path: Path, count: int, read: ReadFn) -> DecodedImages | None:
    """Return the entry, or None if it is not there, not complete, or the content of a file has changed since it was written.

    A sample of the files is compared, and those that were unusable: their permissions may have changed.
    """
    try:
        entry = _mapped(path)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    if len(entry.results) != count:
        return None
    unusable = (number for number, (reason, _) in enumerate(entry.results) if reason)
    numbers = sorted({*range(0, count, -(-count // SAMPLED)), *unusable})
    found = _decoded(numbers, read)
    is_same = all(entry.results[number] == file[1:] for number, file in zip(numbers, found, strict=True))
    return entry if is_same else None
