"""The methods with Adam, for tests that compare runs whose rounding differs.

SOAP's first preconditioner has a null space whose basis rounding decides: two runs that differ by 1e-16 take different,
equally good steps. Adam's large epsilon keeps its steps smooth where a gradient is nearly zero.
"""

import torch

from modules.espcn import ESPCN
from modules.srcnn import SRCNN


class SteadyESPCN(ESPCN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


class SteadySRCNN(SRCNN):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)
