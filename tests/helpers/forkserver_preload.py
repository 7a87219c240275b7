"""Import modules and hash the code once for all runs, in the server of `tests/helpers/subprocess_helpers.py`."""

import gc
import importlib
import os

import torch

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
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
gc.freeze()  # a run collects only its own garbage
