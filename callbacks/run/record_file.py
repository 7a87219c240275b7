"""Files of run records: JSON with a checksum. Nothing heavy is imported here."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.errors import UserError


class BrokenRecord(UserError):
    """A record cannot be used; the message names the file and what is wrong with it."""


def checksum(record: Mapping[str, Any]) -> str:
    """sha256 over a record's content, whatever the order of its keys."""
    content = {key: value for key, value in record.items() if key not in ("checksum", "file")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record with its checksum, so that `path` is at every moment the old record or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in record.items() if key not in ("checksum", "file")}
    tmp_path = path.with_suffix(".part")
    text = json.dumps({**content, "checksum": checksum(content)}, indent=1, ensure_ascii=False, allow_nan=False)
    tmp_path.write_text(text + "\n")
    tmp_path.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        BrokenRecord: it is not one, was changed after it was written, or contradicts itself.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeError, ValueError, RecursionError) as error:
        raise BrokenRecord(f"{path}: cannot be read as a record: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise BrokenRecord(f"{path}: not a record")
    if "checksum" not in record:
        raise BrokenRecord(f"{path}: has no checksum")
    if record["checksum"] != checksum(record):
        raise BrokenRecord(f"{path}: was changed after it was written: its checksum differs")
    return record
