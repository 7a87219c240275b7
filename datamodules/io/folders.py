"""List the image files of a folder, with the standard library only."""

from pathlib import Path

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def list_images(folder: str | Path) -> list[Path]:
    """List the image files of a folder and its subfolders, sorted by path, without hidden files."""
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
