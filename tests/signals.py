"""A callback for tests: sends this process a signal after a step."""

import os
import signal
from typing import Any

from lightning.pytorch.callbacks import Callback


class SignalAt(Callback):
    """Sends the signal named in DARKROOM_TEST_SIGNAL ("SIGKILL@32@0": after 32 images, on rank 0)."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        name, images, rank = os.environ.get("DARKROOM_TEST_SIGNAL", "SIGKILL@-1@0").split("@")
        if pl_module.images_seen == int(images) and trainer.global_rank == int(rank):
            os.kill(os.getpid(), getattr(signal, name))
