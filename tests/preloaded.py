"""What the server of `tests/forked.py` imports once for all runs."""

import pytorch_optimizer  # noqa: F401
import torch

import experiments.bench
import experiments.demo
import experiments.reproduce  # noqa: F401
import tests.contract  # noqa: F401

torch.set_num_threads(1)
