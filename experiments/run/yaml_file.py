"""Reading of YAML files: recipes, searches, configurations of runs and tables. This module does not import torch."""

from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is part of most installations, and is seven times as fast
MAX_DEPTH = 50
MAX_VALUES = 100_000  # of the file, with the values that aliases repeat


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: the file cannot be read, is not UTF-8, is not YAML, has a key twice in one map, is nested more than
            `MAX_DEPTH` deep, or contains more than `MAX_VALUES` values.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, byte {error.start}: not UTF-8. Save the file as UTF-8") from None
    try:
        _check(path, text)
        return LOADER(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


class _Collection:
    """A map or list that is being read: its anchor, the number of its values, and the keys of a map."""

    def __init__(self, anchor: str | None, is_map: bool) -> None:
        self.anchor, self.is_map = anchor, is_map
        self.values, self.children = 1, 0
        self.keys: set[str] = set()

    @property
    def expects_key(self) -> bool:
        return self.is_map and self.children % 2 == 0


def _check(path: Path, text: str) -> None:
    """Check the events of a file without building its content, see `read_yaml`."""
    open_collections: list[_Collection] = [_Collection(None, False)]
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=LOADER):
        parent = open_collections[-1]
        assert event.start_mark is not None
        where = f"{path}, line {event.start_mark.line + 1}"
        size = 0
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            open_collections.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_collections) > MAX_DEPTH:
                raise UserError(f"{where}: nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            closed = open_collections.pop()
            parent, size = open_collections[-1], closed.values
            if closed.anchor:
                sizes[closed.anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            if parent.expects_key:
                if event.value in parent.keys:
                    raise UserError(f"{where}: the key '{event.value}' occurs twice. Remove one of the two")
                parent.keys.add(event.value)
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        if size:
            parent.values += size
            parent.children += 1
            if parent.values > MAX_VALUES:
                raise UserError(f"{where}: the file contains more than {MAX_VALUES:,} values, with those that aliases repeat")
