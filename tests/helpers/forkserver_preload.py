"""Modules that the server of `tests/helpers/subprocess_helpers.py` imports once for all runs."""

import importlib

import torch

for name in (
    "pytorch_optimizer",
    "experiments.bench.bench",
    "experiments.run.demo",
    "experiments.results.reproduce",
    "modules.smp",
    "tests.helpers.method_contract",
):
    importlib.import_module(name)
torch.set_num_threads(1)
