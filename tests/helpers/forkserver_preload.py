"""Import modules, hash the code and read the digits once for all runs, in the server of `subprocess_helpers.py`."""

import gc
import importlib
import os
from functools import cache

import torch

from datamodules.catalog.array_readers import READERS
from experiments.results.fingerprint import code_fingerprint
from experiments.run.recipes import recipes

for name in (
    "pytorch_optimizer",
    "sklearn.cluster",
    "experiments.bench.bench",
    "experiments.run.demo",
    "experiments.search.report",
    "modules.smp",
    "tests.helpers.method_contract",
):
    importlib.import_module(name)
for recipe in recipes():
    code_fingerprint(recipe)
READERS["digits"] = cache(READERS["digits"])  # a run reads this file six times, 0.1 s each
READERS["digits"]("all")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
gc.freeze()  # a run collects only its own garbage
