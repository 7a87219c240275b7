"""Run records for tests."""

from typing import Any

from experiments.results.records import metadata
from experiments.run.recipes import find_recipe


def a_record(recipe: str = "bicubic/x3", **changes: Any) -> dict[str, Any]:
    """Return a record of one dataset, with changed keys."""
    result = {"mean": 30.0, "images": {"bird": 31.0, "head": 29.0}}
    start = metadata(find_recipe(recipe), [])
    record = {**start, "commit": "abcdef0", "seed": 0, "config": start["content"], "data": {}}
    return {**record, "metrics": {"set5": {"m": result}}, **changes}
