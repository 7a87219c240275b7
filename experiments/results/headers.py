"""The time in the header of a recipe, from its record."""

import re
from typing import Any

from experiments.results.records import committed_records
from experiments.run.recipes import Recipe

COUNTS = {1: "one core", 2: "two cores"}


def write_time(recipe: Recipe) -> None:
    """Write the time of a recipe's record into the header of its file, if it has one."""
    text = recipe.path.read_text()
    if (new := with_time(recipe, text)) != text:
        recipe.path.write_text(new)


def with_time(recipe: Recipe, text: str) -> str:
    """Return the text of a recipe with the training time of its first record.

    Remarks after the time, such as those on other programs or on the paper, are kept: ", while another run used the machine".
    """
    records, _ = committed_records(recipe.name)
    if not records or "seconds" not in records[0]:
        return text
    time = training_time(records[0])
    return re.sub(r"^# Time: [^,;\n]*", f"# Time: {time}", text, count=1, flags=re.MULTILINE)


def training_time(record: dict[str, Any]) -> str:
    """Return the training time of a record with its hardware: "27 min on one core of an AMD EPYC"."""
    hardware = record["hardware"]
    name = re.sub(r"\(R\)| Processor", "", hardware["accelerator"])
    where = f"an {name}"
    if not name.startswith("NVIDIA"):
        cores = hardware["threads"] * hardware["processes"]
        where = f"{COUNTS.get(cores, f'{cores} cores')} of an {name}"
    return f"{duration(record['seconds'])} on {where}"


def duration(seconds: float) -> str:
    """Return a time in seconds below two minutes, in minutes below two hours, else in hours and minutes."""
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
