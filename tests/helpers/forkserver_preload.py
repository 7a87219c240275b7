"""Import modules, parse the code and read the digits once for all runs, in the server of `subprocess_helpers.py`."""

import gc
import hashlib
import importlib
import os
from functools import cache
from pathlib import Path

import torch

from datamodules.catalog.array_readers import READERS
from datamodules.catalog.catalog import catalog
from experiments import ROOT
from experiments.results import fingerprint
from experiments.run.recipes import recipes

for name in (
    "pytorch_optimizer",
    "sklearn.cluster",
    "experiments.bench.bench",
    "experiments.run.demo",
    "experiments.search.report",
    "modules.smp",
    "tests.helpers.method_contract",
    "tests.experiments.test_cli_options",  # functions of these modules run in children
    "tests.experiments.test_detection_recipes",
    "tests.experiments.test_recipes",
    "tests.experiments.test_search_spec",
):
    importlib.import_module(name)
hash_of_classes = fingerprint._hash_of_classes
own_classes = [name for recipe in recipes() for name in fingerprint._classes(recipe.content)]
test_modules = [f"tests.modules.{path.stem}" for path in (ROOT / "tests/modules").glob("test_*.py")]
fingerprint._files([*(name.rpartition(".")[0] for name in own_classes), *test_modules])  # parses them


def shared_hash_of_classes(classes: list[str]) -> str:
    """Look up the hash in the folder DARKROOM_TEST_HASHES, which all test processes share. It takes half a second of a run."""
    files = fingerprint._files([name.rpartition(".")[0] for name in classes])
    sources = sorted((name, file.source) for name, file in files.items())
    path = Path(os.environ["DARKROOM_TEST_HASHES"], hashlib.sha256(repr(sources).encode()).hexdigest())
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(hash_of_classes(classes))
        part.replace(path)
    return path.read_text()


fingerprint._hash_of_classes = shared_hash_of_classes
READERS["digits"] = cache(READERS["digits"])  # a run reads this file six times, 0.1 s each
READERS["digits"]("all")
catalog()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
gc.freeze()  # a run collects only its own garbage
