"""Run record files: JSON with a checksum. This module has no slow imports."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.errors import UserError


class BrokenRecord(UserError):
    """A record cannot be used; the message names the file and the problem."""


def checksum(record: Mapping[str, Any]) -> str:
    """Return the sha256 of the content of a record, independent of the order of its keys."""
    content = {key: value for key, value in record.items() if key not in ("checksum", "file")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record with its checksum to a temporary file and move it to `path`, so that `path` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in record.items() if key not in ("checksum", "file")}
    tmp_path = path.with_suffix(".part")
    text = json.dumps({**content, "checksum": checksum(content)}, indent=1, ensure_ascii=False, allow_nan=False)
    tmp_path.write_text(text + "\n")
    tmp_path.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        BrokenRecord: the file is not a record, or was changed after it was written.
    """
    try:
        record = json.loads(path.read_text(), parse_constant=_reject_constant)
        expected = checksum(record) if isinstance(record, dict) else ""
    except (OSError, UnicodeError, ValueError, RecursionError) as error:
        raise BrokenRecord(f"{path}: cannot be read as a record: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise BrokenRecord(f"{path}: not a record. Restore or remove the file")
    if "checksum" not in record:
        raise BrokenRecord(f"{path}: has no checksum. Restore or remove the file")
    if record["checksum"] != expected:
        raise BrokenRecord(f"{path}: its checksum differs, because the file was changed after writing. Restore it")
    return record


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
