"""Lightning's private parts are what the adapter takes them for."""

from collections import OrderedDict
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from modules.training.ddp import ManualDDPStrategy
from modules.training.lightning_compat import (
    FastSetattrModule,
    NoProfiler,
    grad_scaler,
    increment_global_step,
    is_validation_due,
    log_every_n_steps,
    patch_training_loop,
    sync_logger_step,
)


class Tiny(FastSetattrModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer_ = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("x", float(batch_idx))

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(callback, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=options.pop("logger", False),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    loader = DataLoader(torch.zeros(12, 1), batch_size=1)
    trainer.fit(Tiny(), loader, DataLoader(torch.zeros(1, 1)))
    return trainer


def test_a_due_validation_is_foreseen():
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(is_validation_due(trainer))

        def on_validation_end(self, trainer, *args):
            seen.append("validated")

    run(Watch(), max_steps=-1, max_epochs=1, val_check_interval=4, check_val_every_n_epoch=None)
    assert seen == [False, False, False, True, "validated"] * 3


def test_the_logged_step_is_the_batch_whatever_was_restored():
    steps = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            if len(steps) == 5:
                trainer.fit_loop.epoch_loop._batches_that_stepped += 7  # as a checkpoint might bring it back
            sync_logger_step(trainer)
            steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    run(Watch(), max_epochs=1)
    assert steps == list(range(12))


def test_profiler_and_log_interval():
    trainer = run(Callback(), max_epochs=1, profiler=NoProfiler(), log_every_n_steps=3)
    assert isinstance(trainer.profiler, NoProfiler)
    assert log_every_n_steps(trainer) == 3


def test_the_step_counts_batches_whatever_steps_in_them():
    class Count(Callback):
        def on_train_batch_end(self, trainer, *args):
            increment_global_step(trainer)

    assert run(Count(), max_epochs=1).global_step == 12
    assert run(Count(), max_epochs=-1, max_steps=5).fit_loop.total_batch_idx == 4


def test_a_lean_loop_passes_what_lightnings_own_does():
    passed = []

    class Lean(Callback):
        def on_train_start(self, trainer, *args):
            loop = trainer.fit_loop.epoch_loop
            theirs = loop._build_kwargs(OrderedDict(), "batch", 3)
            assert callable(loop._broadcast_sigterm_tensor)
            patch_training_loop(trainer)
            passed.append((theirs, loop._build_kwargs(OrderedDict(), "batch", 3)))

    run(Lean(), max_epochs=1)
    assert passed[0][0] == passed[0][1]


def test_a_lean_module_is_a_module():
    module = Tiny()
    assert {name for name, _ in module.named_parameters()} == {"layer_.weight", "layer_.bias"}
    module._current_fx_name = "training_step"
    assert LightningModule.__dict__.get("_current_fx_name") is None
    assert module.__dict__["_current_fx_name"] == "training_step"


def test_lightning_takes_our_replicas_for_several_devices():
    for strategy in ("auto", "ddp"):
        trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
        assert type(trainer.strategy) is ManualDDPStrategy


def test_where_the_scaler_of_fp16_is():
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    assert grad_scaler(SimpleNamespace(precision_plugin=plugin)) is scaler
    assert grad_scaler(SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))) is None
    assert grad_scaler(run(Callback(), max_epochs=1)) is None
