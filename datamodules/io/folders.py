"""List the image files of a folder, with the standard library only."""

import os
import stat
from pathlib import Path

from datamodules.errors import UserError

SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
UNREADABLE = {".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jxl", ".nef", ".psd", ".raf", ".rw2", ".svg"}
LEFT_OUT = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "thumbs.db"}  # folders of thumbnails and of deleted files


def list_images(folder: str | Path, broken_links: bool = False) -> list[Path]:
    """List the image files of a folder and its subfolders, sorted by path.

    Linked folders are followed. Hidden files and folders are left out, and folders of thumbnails.

    Args:
        folder: the folder.
        broken_links: list links whose file does not exist, too; it cannot be opened.

    Raises:
        UserError: a subfolder cannot be read, or an image is a broken link.
    """
    return [path for path in _files(folder, SUFFIXES) if _is_file(path, broken_links)]


def list_unreadable(folder: str | Path) -> list[Path]:
    """List the files of a folder and its subfolders that are images in formats which cannot be read, such as HEIC."""
    return _files(folder, UNREADABLE)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out."""
    return name.startswith(".") or name.lower() in LEFT_OUT


def _files(folder: str | Path, suffixes: set[str]) -> list[Path]:
    """List the files with these suffixes; their parts are sorted as tuples, which is the order of paths, only faster."""
    found, visited = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        if (target := os.path.realpath(root)) in visited:  # a link to a folder that was listed before, such as a parent
            folders.clear()
            continue
        visited.add(target)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        parent = Path(root)
        found += [
            ((*parent.parts, name), parent, name)
            for name in files
            if not is_hidden(name) and "." in name and f".{name.rpartition('.')[2].lower()}" in suffixes
        ]
    return [parent / name for _, parent, name in sorted(found)]


def _is_file(path: Path, broken_links: bool) -> bool:
    """Return whether a path is a file; a broken link is one, if it is allowed."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        if broken_links:
            return True
        raise UserError(f"{path}: a broken link. Remove it, or restore the file {os.path.realpath(path)}") from None


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # an absent folder has no images
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}. Change its permissions, or move it")
