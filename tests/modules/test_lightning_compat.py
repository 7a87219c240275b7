"""Lightning's private API behaves as `modules.training.lightning_compat` assumes."""

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


def test_is_validation_due_predicts_validations():
    events = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, *args):
            events.append(is_validation_due(trainer))

        def on_validation_end(self, trainer, *args):
            events.append("validated")

    run(Recorder(), max_steps=-1, max_epochs=1, val_check_interval=4, check_val_every_n_epoch=None)
    assert events == [False, False, False, True, "validated"] * 3


def test_sync_logger_step_counts_batches_after_a_restore():
    steps = []

    class Recorder(Callback):
        def on_train_batch_start(self, trainer, *args):
            if len(steps) == 5:
                trainer.fit_loop.epoch_loop._batches_that_stepped += 7  # as after restoring a checkpoint
            sync_logger_step(trainer)
            steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    run(Recorder(), max_epochs=1)
    assert steps == list(range(12))


def test_trainer_uses_the_given_profiler_and_log_interval():
    trainer = run(Callback(), max_epochs=1, profiler=NoProfiler(), log_every_n_steps=3)
    assert isinstance(trainer.profiler, NoProfiler)
    assert log_every_n_steps(trainer) == 3


def test_increment_global_step_counts_batches():
    class Count(Callback):
        def on_train_batch_end(self, trainer, *args):
            increment_global_step(trainer)

    assert run(Count(), max_epochs=1).global_step == 12
    assert run(Count(), max_epochs=-1, max_steps=5).fit_loop.total_batch_idx == 4


def test_patched_loop_builds_the_same_arguments():
    arguments = []

    class Patch(Callback):
        def on_train_start(self, trainer, *args):
            loop = trainer.fit_loop.epoch_loop
            expected = loop._build_kwargs(OrderedDict(), "batch", 3)
            assert callable(loop._broadcast_sigterm_tensor)
            patch_training_loop(trainer)
            arguments.append((expected, loop._build_kwargs(OrderedDict(), "batch", 3)))

    run(Patch(), max_epochs=1)
    assert arguments[0][0] == arguments[0][1]


def test_fast_setattr_module_registers_parameters():
    module = Tiny()
    assert {name for name, _ in module.named_parameters()} == {"layer_.weight", "layer_.bias"}
    module._current_fx_name = "training_step"
    assert LightningModule.__dict__.get("_current_fx_name") is None
    assert module.__dict__["_current_fx_name"] == "training_step"


def test_manual_ddp_is_the_default_for_several_devices():
    for strategy in ("auto", "ddp"):
        trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
        assert type(trainer.strategy) is ManualDDPStrategy


def test_grad_scaler_returns_the_fp16_scaler():
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    assert grad_scaler(SimpleNamespace(precision_plugin=plugin)) is scaler
    assert grad_scaler(SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))) is None
    assert grad_scaler(run(Callback(), max_epochs=1)) is None
