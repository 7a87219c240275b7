"""Times and values in the headers of recipes are those of their records."""

import re

import pytest

from experiments.results.headers import duration, training_time, with_time
from experiments.results.records import committed_records
from experiments.run.recipes import recipes

WITH_RECORDS = [recipe for recipe in recipes() if committed_records(recipe.name)[0]]


@pytest.mark.parametrize("recipe", WITH_RECORDS, ids=lambda recipe: recipe.name)
def test_header_states_time_and_value_of_the_record(recipe):
    text = recipe.path.read_text()
    assert with_time(recipe, text) == text, "darkroom reproduce METHOD --write"
    (line,) = (line for line in recipe.header if line.startswith("Expected: "))
    if not (number := re.search(r"\d+\.\d+", line)):
        return
    digits = len(number[0].partition(".")[2])
    values: dict[str, list[float]] = {}
    for record in committed_records(recipe.name)[0]:
        for dataset, protocols in record["metrics"].items():
            for protocol, result in protocols.items():
                values.setdefault(f"{dataset}/{protocol}", []).append(float(result["mean"]))
        if record["best"]["value"] is not None if "best" in record else False:
            values.setdefault("best", []).append(float(record["best"]["value"]))
    known = [value for of_seeds in values.values() for value in (*of_seeds, sum(of_seeds) / len(of_seeds))]
    stated = float(number[0])
    assert any(abs(abs(scale * value) - stated) <= 0.505 * 10**-digits for value in known for scale in (1, 100)), line


def test_time_names_duration_and_hardware():
    record = {"seconds": 2093.7, "hardware": {"accelerator": "AMD EPYC", "threads": 1, "processes": 1}}
    assert training_time(record) == "35 min on one core of an AMD EPYC"
    record["hardware"] = {"accelerator": "NVIDIA H200", "threads": 1, "processes": 1}
    assert training_time(record) == "35 min on an NVIDIA H200"
    record["hardware"] = {"accelerator": "Intel(R) Xeon(R) Processor", "threads": 2, "processes": 2}
    assert training_time(record) == "35 min on 4 cores of an Intel Xeon"
    assert [duration(value) for value in (37.4, 119.4, 119.9, 7100, 7810.6)] == [
        "37 s",
        "119 s",
        "2 min",
        "118 min",
        "2 h 10 min",
    ]
