"""List the image files of a folder, with the standard library only."""

import os
import stat
from collections.abc import Iterator
from operator import attrgetter
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
    return [Path(name) for name in list_image_names(folder, broken_links)]


def list_image_names(folder: str | Path, broken_links: bool = False) -> list[str]:
    """List the paths of `list_images` as strings, without the time that `Path` objects take."""
    found = ((_path(entry), entry) for entry in _entries(str(Path(folder)), SUFFIXES, set()))
    return [path for path, entry in found if entry.is_file(follow_symlinks=False) or _is_file(path, broken_links)]


def list_unreadable(folder: str | Path) -> list[Path]:
    """List the files of a folder and its subfolders that are images in formats which cannot be read, such as HEIC."""
    return [Path(entry.path) for entry in _entries(str(Path(folder)), UNREADABLE, set())]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out."""
    return name.startswith(".") or name.lower() in LEFT_OUT


def _entries(folder: str, suffixes: set[str], visited: set[str]) -> Iterator[os.DirEntry[str]]:
    """Yield the files with these suffixes in a folder and its subfolders, in the order of paths, which is that of their parts.

    Args:
        folder: the folder.
        suffixes: suffixes in lower case.
        visited: folders that were listed before, to which the folder is added; a link may lead to one of them.
    """
    if (target := os.path.realpath(folder)) in visited:
        return
    visited.add(target)
    try:
        with os.scandir(folder) as content:
            entries = sorted((entry for entry in content if not is_hidden(entry.name)), key=attrgetter("name"))
    except (FileNotFoundError, NotADirectoryError):  # an absent folder has no images
        return
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}. Change its permissions, or move it") from None
    for entry in entries:
        if _is_folder(entry):
            yield from _entries(entry.path, suffixes, visited)
        elif "." in entry.name and f".{entry.name.rpartition('.')[2].lower()}" in suffixes:
            yield entry


def _path(entry: os.DirEntry[str]) -> str:
    """Return a path as `Path` prints it: without the current folder."""
    return entry.path.removeprefix(f"{os.curdir}{os.sep}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _is_file(path: str, broken_links: bool) -> bool:
    """Return whether a path is a file; a broken link is one, if it is allowed."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        if broken_links:
            return True
        raise UserError(f"{path}: a broken link. Remove it, or restore the file {os.path.realpath(path)}") from None
