"""What the server of `tests/forked.py` imports once for all runs."""

import importlib

import torch

for name in (
    "pytorch_optimizer",
    "experiments.bench",
    "experiments.demo",
    "experiments.reproduce",
    "modules.encoder_decoder",
    "tests.contract",
):
    importlib.import_module(name)
torch.set_num_threads(1)
