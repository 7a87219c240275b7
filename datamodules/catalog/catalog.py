"""The data sets of `catalog.yaml`: which are here, where they lie, how they are had, and whether they are intact.

Only the standard library and YAML are imported at the top: `darkroom list` answers from here.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError
from datamodules.io.folders import list_images

HERE = Path(__file__).parent
MANIFESTS = HERE / "manifests"


class DatasetNotFound(UserError):
    """A data set that is asked for is not here; the message says how to get it."""


def data_root() -> Path:
    """Where data sets lie: the environment variable DARKROOM_DATA, else `data` in the current folder."""
    return Path(os.environ.get("DARKROOM_DATA", "data"))


@dataclass(frozen=True)
class CatalogEntry:
    """One entry of the catalogue; `catalog.yaml` explains the fields."""

    name: str
    title: str
    origin: str
    licence: str
    source: str
    instructions: str = ""
    url: str = ""
    folder: str = ""
    images: str = ""
    splits: dict[str, Any] = field(default_factory=dict)
    scales: tuple[int, ...] = ()
    count: dict[str, int] = field(default_factory=dict)
    arrays: str = ""
    treat_equal_rgb_as_grey: bool = False
    manifest_from: str = ""
    masks: dict[str, Any] = field(default_factory=dict)
    skip_file_count: bool = False

    @property
    def path(self) -> Path:
        """The set's folder under the data root."""
        return data_root() / self.folder

    def files(self, split: str | None = None, scale: int | None = None) -> list[Path]:
        """The set's picture files that are here, sorted; empty if the set is absent.

        Args:
            split: one of `splits`; all of them if not given.
            scale: for sets that keep one version per scale; all of them if not given.

        Raises:
            Refused: the set has no such split, or is not made of picture files.
            MissingData: the set has no pictures for that scale.
        """
        if self.arrays:
            raise UserError(f"{self.name} is not a set of picture files")
        if split is not None and split not in self.splits:
            raise UserError(f"{self.name} has no split '{split}'" + (f": {', '.join(self.splits)}" if self.splits else ""))
        if self.scales and scale is not None and scale not in self.scales:
            raise DatasetNotFound(f"{self.name} has no pictures for scale {scale}: {', '.join(map(str, self.scales))}")
        if self.source == "embedded":
            return sorted({path for part in self._parts(split) for path in _embedded(part)})
        return sorted({path for pattern in self._patterns(split, scale) for path in self.path.glob(pattern)})

    def expected_count(self, split: str | None = None, scale: int | None = None) -> int:
        """How many files belong to the set, a split or a scale of it; 0 if that is not known."""
        if self.source == "embedded":
            return len(self.files(split))
        if self.count:
            return self.count[split] if split else sum(self.count.values())
        patterns = self._patterns(split, scale)
        return sum(any(fnmatch(name, pattern) for pattern in patterns) for name in self.manifest())

    def _parts(self, split: str | None) -> list[Any]:
        if self.arrays:  # whose splits are no patterns
            return [self.images]
        parts = [self.splits[split]] if split else list(self.splits.values()) or [self.images]
        return [pattern for part in parts for pattern in (part if isinstance(part, list) else [part])]

    def _patterns(self, split: str | None, scale: int | None) -> list[str]:
        scales = [scale] if scale is not None else (self.scales or [None])
        return [part.replace("{scale}", str(s)) for part in self._parts(split) for s in scales]

    def manifest_name(self, path: Path) -> str:
        """A file's name in the manifest."""
        return path.name if self.source == "embedded" else path.relative_to(self.path).as_posix()

    def manifest(self) -> dict[str, tuple[str, str]]:
        """What the set must hold: file name to (sha256 of its decoded pixels, sha256 of the file or '-')."""
        path = MANIFESTS / f"{self.manifest_from or self.name}.txt"
        if not path.exists():
            return {}
        rows = (line.split(maxsplit=2) for line in path.read_text().splitlines() if not line.startswith("#"))
        return {name: (pixels, whole) for pixels, whole, name in rows}

    def status(self) -> str:
        """In a word whether the set is here: 'here', 'absent', or '201 of 400' files."""
        if self.source == "embedded" and self.arrays:
            return "here" if importlib.util.find_spec(self.arrays.split(".")[0]) else "absent"
        if self.skip_file_count or self.arrays:
            first = next((path for pattern in self._patterns(None, None) for path in self.path.glob(pattern)), None)
            return "here" if first else "absent"
        found, wanted = len(self.files()), self.expected_count()
        return "absent" if not found else "here" if found >= wanted else f"{found} of {wanted}"

    def install_hint(self) -> str:
        """How to get the set, in one line."""
        if self.source == "embedded":
            return "with the installed packages"
        if self.source in ("files", "torchvision"):
            return f"darkroom data get {self.name}"
        return f"by hand, below {data_root()}: {self.instructions}"


def _embedded(packages: dict[str, list[str]]) -> list[Path]:
    paths = []
    for package, names in packages.items():
        top, _, rest = package.partition(".")
        spec = importlib.util.find_spec(top)  # the top package alone, so that nothing heavy is imported
        if spec is None or spec.origin is None:
            raise DatasetNotFound(f"the package {top} is not installed: pip install -e .")
        paths += [Path(spec.origin).parent.joinpath(*rest.split("."), name) for name in names]
    return paths


@cache
def catalog() -> dict[str, CatalogEntry]:
    """All known data sets by name."""
    entries = yaml.safe_load((HERE / "catalog.yaml").read_text())
    return {
        name: CatalogEntry(name=name, **{**entry, "scales": tuple(entry.get("scales", ()))}) for name, entry in entries.items()
    }


def get_dataset(name: str) -> CatalogEntry:
    """The data set of that name.

    Raises:
        Refused: no such set; the message names the nearest.
    """
    from difflib import get_close_matches

    if name not in catalog():
        near = get_close_matches(name, catalog(), n=1, cutoff=0)
        raise UserError(f"no data set '{name}'; did you mean '{near[0]}'?")
    return catalog()[name]


def resolve_images(spec: str, scale: int | None = None) -> list[Path]:
    """The picture files that a recipe's data key names.

    Args:
        spec: a set of the catalogue ("set5"), one split of it ("photographs/test"), or a folder of one's own.
        scale: see `CatalogEntry.files`.

    Raises:
        MissingData: the set is absent or not complete, or the folder holds no pictures.
        Refused: neither a folder nor a known set.
    """
    if is_folder(spec):
        if not (found := list_images(spec)):
            raise DatasetNotFound(f"{spec}: no pictures in this folder")
        return found
    name, _, split = spec.partition("/")
    if name not in catalog() and (Path(spec).is_absolute() or spec.startswith(".")):
        raise DatasetNotFound(f"no folder {spec}")
    data_set = get_dataset(name)
    if not (found := data_set.files(split or None, scale)):
        raise DatasetNotFound(f"{spec} is not here: {data_set.install_hint()}")
    wanted = data_set.expected_count(split or None, scale)
    if len(found) < wanted:
        raise DatasetNotFound(
            f"{spec} has {len(found)} of its {wanted} files (darkroom data verify {name}): {data_set.install_hint()}"
        )
    return found


def is_folder(spec: str) -> bool:
    """Whether a data key is a folder of one's own and not a name of the catalogue."""
    return spec.partition("/")[0] not in catalog() and Path(spec).is_dir()
