"""The datasets of `catalog.yaml`: availability, location, installation and manifests.

Only the standard library and YAML are imported at the top, so that `darkroom list` starts fast.
"""

import importlib.util
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError
from datamodules.io.folders import list_image_names
from datamodules.io.paths import data_root

HERE = Path(__file__).parent
MANIFESTS = HERE / "manifests"
HELD_OUT = "held-out"  # name of the images that a datamodule holds out, in place of a dataset


class DatasetNotFound(UserError):
    """A dataset is not installed; the message explains how to obtain it."""


@dataclass(frozen=True)
class CatalogEntry:
    """An entry of the catalog; `catalog.yaml` documents the fields."""

    name: str
    title: str
    origin: str
    license: str
    source: str
    instructions: str = ""
    url: str = ""
    folder: str = ""
    images: str = ""
    splits: dict[str, Any] = field(default_factory=dict)
    scales: tuple[int, ...] = ()
    count: dict[str, int] = field(default_factory=dict)
    arrays: str = ""
    treat_equal_rgb_as_gray: bool = False
    manifest_from: str = ""
    masks: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    skip_file_count: bool = False

    @property
    def path(self) -> Path:
        """The dataset's folder below the data root."""
        return data_root() / self.folder

    def files(self, split: str | None = None, scale: int | None = None) -> list[Path]:
        """List the installed image files, sorted; empty if the dataset is absent.

        Args:
            split: one of `splits`; all if None.
            scale: for datasets with one version per scale; all if None.

        Raises:
            UserError: the dataset has no such split, or does not consist of image files.
            DatasetNotFound: the dataset has no images for that scale.
        """
        if self.arrays:
            raise UserError(f"{self.name} does not consist of image files. Use a dataset that does (darkroom data list)")
        if split is not None and split not in self.splits:
            raise UserError(
                f"{self.name} has no split '{split}'. "
                + (f"Use one of: {', '.join(self.splits)}" if self.splits else "Use it without a split")
            )
        if self.scales and scale is not None and scale not in self.scales:
            raise DatasetNotFound(
                f"{self.name} has no images for scale {scale}. Use one of: {', '.join(map(str, self.scales))}"
            )
        if self.source == "embedded":
            return sorted({path for split_value in self._parts(split) for path in _package_files(split_value)})
        found = {path for pattern in self._patterns(split, scale) for path in self.path.glob(pattern)}
        return sorted(found, key=lambda path: path.parts)  # the order of paths, computed faster

    def expected_count(self, split: str | None = None, scale: int | None = None) -> int:
        """Return the number of files of the complete dataset, split or scale; 0 if unknown."""
        if self.source == "embedded":
            return len(self.files(split))
        if self.count:
            return self.count[split] if split else sum(self.count.values())
        patterns = self._patterns(split, scale)
        return sum(any(fnmatch(name, pattern) for pattern in patterns) for name in self.manifest())

    def _parts(self, split: str | None) -> list[Any]:
        if self.arrays:  # their splits are not patterns
            return [self.images]
        split_values = [self.splits[split]] if split else list(self.splits.values()) or [self.images]
        return [
            pattern
            for split_value in split_values
            for pattern in (split_value if isinstance(split_value, list) else [split_value])
        ]

    def _patterns(self, split: str | None, scale: int | None) -> list[str]:
        scales = [scale] if scale is not None else (self.scales or [None])
        return [split_value.replace("{scale}", str(s)) for split_value in self._parts(split) for s in scales]

    def manifest_name(self, path: Path) -> str:
        """Return the name of a file in the manifest."""
        return path.name if self.source == "embedded" else path.relative_to(self.path).as_posix()

    def manifest(self) -> dict[str, tuple[str, str]]:
        """Return the expected contents: file name -> (sha256 of the decoded pixels, sha256 of the file or '-')."""
        path = MANIFESTS / f"{self.manifest_from or self.name}.txt"
        if not path.exists():
            return {}
        rows = (line.split(maxsplit=2) for line in path.read_text().splitlines() if not line.startswith("#"))
        return {name: (pixel_hash, file_hash) for pixel_hash, file_hash, name in rows}

    def status(self) -> str:
        """Return the state of the installation: 'installed', 'absent', or a number of files such as '201 of 400'."""
        if self.source == "embedded" and self.arrays:
            return "installed" if importlib.util.find_spec(self.arrays.split(".")[0]) else "absent"
        if self.skip_file_count or self.arrays:
            first = next((path for pattern in self._patterns(None, None) for path in self.path.glob(pattern)), None)
            return "installed" if first else "absent"
        available, expected = len(self.files()), self.expected_count()
        return "absent" if not available else "installed" if available >= expected else f"{available} of {expected}"

    def install_hint(self) -> str:
        """Return one-line instructions for obtaining the dataset."""
        if self.source == "embedded":
            return "pip install -e ."
        if self.source in ("files", "torchvision"):
            return f"darkroom data get {self.name}"
        return f"manually, in {data_root()}: {self.instructions}"


def _package_files(packages: dict[str, list[str]]) -> list[Path]:
    paths = []
    for package, names in packages.items():
        top, _, rest = package.partition(".")
        spec = importlib.util.find_spec(top)  # only the top-level package, so that no submodule is imported
        if spec is None or spec.origin is None:
            raise DatasetNotFound(f"the package {top} is not installed. Run pip install -e .")
        paths += [Path(spec.origin).parent.joinpath(*rest.split("."), name) for name in names]
    return paths


@cache
def catalog() -> dict[str, CatalogEntry]:
    """Return all known datasets by name."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast, and part of most installations
    entries = loader((HERE / "catalog.yaml").read_text()).get_single_data()
    return {
        name: CatalogEntry(name=name, **{**entry, "scales": tuple(entry.get("scales", ()))}) for name, entry in entries.items()
    }


def get_dataset(name: str) -> CatalogEntry:
    """Return the dataset with this name.

    Raises:
        UserError: unknown name; the message suggests the most similar one.
    """
    from difflib import get_close_matches

    if name not in catalog():
        matches = get_close_matches(name, catalog(), n=1, cutoff=0)
        raise UserError(f"no dataset '{name}'; did you mean '{matches[0]}'? (darkroom data list shows all)")
    return catalog()[name]


def resolve_images(spec: str, scale: int | None = None) -> list[Path]:
    """List the image files of a dataset or a folder.

    Args:
        spec: dataset of the catalog ("set5"), one of its splits ("photographs/test"), or a folder.
        scale: see `CatalogEntry.files`.

    Raises:
        DatasetNotFound: the dataset is absent or incomplete, or the folder contains no images.
        UserError: neither a folder nor a known dataset.
    """
    return [Path(name) for name in resolve_image_names(spec, scale)]


def resolve_image_names(spec: str, scale: int | None = None) -> list[str]:
    """List the paths of `resolve_images` as strings, which is faster for a large folder."""
    if (dataset := find_source(spec)) is None:
        if not (available := list_image_names(spec)):
            raise DatasetNotFound(f"{spec}: no images in this folder. Check the path")
        return available
    name, _, split = spec.partition("/")
    if not (available := [str(path) for path in dataset.files(split or None, scale)]):
        raise DatasetNotFound(f"{spec} is not installed. To install: {dataset.install_hint()}")
    expected = dataset.expected_count(split or None, scale)
    if len(available) < expected:
        raise DatasetNotFound(
            f"{spec} has {len(available)} of its {expected} files (darkroom data verify {name}). "
            f"To install: {dataset.install_hint()}"
        )
    return available


def find_source(spec: str) -> CatalogEntry | None:
    """Return the dataset of the catalog to which `spec` belongs, or None for a folder; see `resolve_images`."""
    if is_folder(spec):
        return None
    name = spec.partition("/")[0]
    if name not in catalog() and (Path(spec).is_absolute() or spec.startswith(".")):
        raise DatasetNotFound(f"{spec}: no such folder. Check the path")
    return get_dataset(name)


def is_folder(spec: str) -> bool:
    """Return whether `spec` is an existing folder and not a dataset of the catalog."""
    return spec.partition("/")[0] not in catalog() and Path(spec).is_dir()
