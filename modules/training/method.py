"""Base class of all methods: the training step, with progress counted in images seen."""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.random.device_noise import noise_on_device
from datamodules.random.noise import derive_seed
from modules.training.ema import EMA
from modules.training.fsdp import check_reduced, fsdp_modules, reduce_gradients, reshard
from modules.training.gradients import backward, broadcast_buffers, gradient_problem, optimizer_step, update_grad_scaler
from modules.training.image_pool import ImagePool
from modules.training.lightning_compat import (
    datamodule,
    increment_global_step,
    log_every_n_steps,
    patch_training_loop,
    schedule_validation,
    sync_logger_step,
)
from modules.training.loss_log import LossLog, non_finite
from modules.training.phases import (
    Batch,
    BoundPhase,
    Phase,
    add_averagers,
    batch_size_of,
    bind_phases,
    detach_tensors,
    expect_dict,
    has_gradients,
    map_tensors,
    split_micro_batches,
    train_only,
)
from modules.training.references import ModuleWithReferences
from modules.training.stages import Stage, StagePlan


class Method(ModuleWithReferences):
    """Networks with their losses, trained by manual optimization.

    A method with one loss defines `losses` and `configure_optimizers`. A method with networks that are trained in turn defines
    `phases` and `make_optimizers`, and `shared_forward` for tensors that several phases need. The base class runs the training
    step and updates the `EMA` and `ImagePool` submodules. Progress is counted in images seen by all ranks together, so
    schedules are independent of the batch size and the number of devices.

    Args:
        total_images: training budget, in images (patches) seen.
        learning_rate: maximum learning rate.
        warmup: images over which the learning rate rises linearly from zero; it then falls to zero along a half cosine.
        seed: seed of the noise and of dropout in training.

    Raises:
        UserError: `total_images` is less than 1.
    """

    training_only_modules: ClassVar[Sequence[str]] = ()  # names of submodules that committed weights exclude
    double_backward_networks: ClassVar[Sequence[str]] = ()  # names of networks under a gradient penalty
    compiled_losses: ClassVar[Sequence[str]] = ()  # names of loss functions that `--compile true` compiles with the networks

    def __init__(self, total_images: int, learning_rate: float, warmup: int = 0, seed: int = 0) -> None:
        super().__init__()
        if total_images < 1:
            raise UserError(f"model.total_images: {total_images} is too small. Use at least 1")
        self.automatic_optimization = False
        self.total_images, self.learning_rate, self.warmup, self.seed = total_images, learning_rate, warmup, seed
        self.constant_after_warmup = False  # the learning rate, see `schedule`
        self.accumulate_grad_batches = 1  # micro-batches per local batch
        self.images_seen = 0
        self.optimizer_names = [""]
        self.bound_phases: list[BoundPhase] = []
        self.stage_plan = StagePlan([Stage()], 1)
        self.fsdp_modules: list[FSDPModule] = []  # sharded networks, see modules/training/fsdp.py
        self.loss_log = LossLog()

    # To be overridden by methods

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss terms on one batch, by name; their sum is minimized."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def phases(self) -> Sequence[Phase]:
        """Return the phases of a training step, in order."""
        return [Phase("", self.losses)]

    def make_optimizers(self) -> dict[str, Optimizer]:
        """Create the optimizers, by name; `Phase.optimizer` refers to a name."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def configure_optimizers(self) -> Any:
        """Create the optimizers, in the order of `make_optimizers`; a method with one loss returns its own optimizer."""
        optimizers = self.make_optimizers()
        self.optimizer_names = list(optimizers)
        return list(optimizers.values())

    def shared_forward(self, batch: Batch) -> Batch:
        """Compute tensors that several phases need, such as the fakes of a step; they are added to the batch.

        The first update of each phase receives tensors from the weights at the start of the step. Each repeated update of a
        phase recomputes them. Only one phase may backpropagate through them; the other phases must detach them. Backpropagation
        is possible until a network that produced them is updated. With gradient accumulation, each phase recomputes the tensors
        of each micro-batch, until a network that produced them is updated. Later phases receive the detached tensors of that
        update.
        """
        return {}

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate after `images_seen` images: a linear warmup, then a half cosine to zero.

        It remains constant after the warmup if `self.constant_after_warmup` is set.
        """
        if images_seen < self.warmup:
            return self.learning_rate * (images_seen + 1) / self.warmup
        if self.constant_after_warmup:
            return self.learning_rate
        progress = min(1.0, (images_seen - self.warmup) / max(1, self.total_images - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def optimizer_settings(self, phase: Phase, images_seen: int) -> dict[str, float]:
        """Return the settings of the optimizer of a phase after `images_seen` images, such as "lr".

        Raises:
            TypeError: the schedule of the phase returns no dict.
        """
        if phase.schedule is None:
            return {"lr": self.schedule(images_seen)}
        return expect_dict(phase.schedule(images_seen), phase, "schedule", "settings of the optimizer")

    def stages(self) -> list[Stage]:
        """Return the stages of training; `darkroom reproduce --check` replays the first steps of each."""
        return [Stage(), Stage(self.warmup)] if self.warmup else [Stage()]

    preview_limit: ClassVar[int] = 0  # maximum number of previews of each group after a validation

    def preview_group(self, outputs: Batch) -> str:
        """Return the preview group of a validation batch, such as its direction; each group has its own previews."""
        return ""

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the outputs of a validation batch: one image (1, 3, H, W) in [0, 1] on the CPU."""
        raise TypeError(f"{type(self).__name__} has no preview")

    def batch_noise(self, batch: Batch, stream: str, size: int, kind: str = "normal") -> Tensor:
        """Sample noise (N, size) for a batch; a row depends on the sample's id, but not on the rank.

        Args:
            batch: batch passed to `losses` or `shared_forward`.
            stream: name of the random stream; different streams are independent.
            size: number of values per sample.
            kind: "normal", with mean 0 and standard deviation 1; "fast-normal", the same distribution in single precision, with
                different values; or "uniform", in (0, 1).

        Returns:
            (N, size), with the dtype and the device of the method.
        """
        assert isinstance(self.dtype, torch.dtype)  # Lightning declares a str as well
        stream = f"train/{stream}/{batch['repeat_index']}"
        return noise_on_device(kind, self.seed, stream, batch["sample_ids"], size, self.device, self.dtype)

    # The training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the phases that are due, each with one or more optimizer updates, on one batch."""
        local_batch_size = batch_size_of(batch)
        batch_size = local_batch_size * self.trainer.world_size
        step_index = self.stage_plan.steps(self.images_seen) + 1
        due = [bound for bound in self.bound_phases if not step_index % bound.phase.every_n_steps]
        batch = {key: self._cast(value) for key, value in batch.items()}
        micro_batches = split_micro_batches(
            batch, self.accumulate_grad_batches, self.images_seen + self.trainer.global_rank * local_batch_size
        )
        batches_with_shared: list[Batch] = []
        if len(micro_batches) == 1:
            with train_only(due, self.bound_phases):
                batches_with_shared = [self._with_shared(micro_batches[0], 0)]
        for bound in due:
            for repeat_index in range(bound.phase.n_updates):
                chunks = self._update_phase(bound, micro_batches, [] if repeat_index else batches_with_shared, repeat_index)
                if not repeat_index:
                    batches_with_shared = batches_with_shared or chunks
        for item in self.children():
            if isinstance(item, EMA | ImagePool):
                item.update(batch_size)

        increment_global_step(self.trainer)
        self.images_seen += batch_size
        if self.images_seen >= self.total_images:
            self.trainer.should_stop = True
        log_interval = log_every_n_steps(self.trainer)
        if self.trainer.should_stop or (log_interval and (batch_idx + 1) % log_interval == 0):
            self._log()

    def _update_phase(
        self, bound: BoundPhase, micro_batches: list[Batch], batches_with_shared: list[Batch], repeat_index: int
    ) -> list[Batch]:
        """Run one optimizer update of a phase.

        Args:
            bound: phase to update.
            micro_batches: micro-batches of the step.
            batches_with_shared: micro-batches with valid shared tensors; empty to compute them here.
            repeat_index: number of earlier updates of this phase in the training step.

        Returns:
            The micro-batches with detached shared tensors if they were computed here with gradients, otherwise an empty list.
        """
        phase = bound.phase
        for group in bound.optimizer.param_groups:
            group.update(self.optimizer_settings(phase, self.images_seen))
        for parameter in bound.parameters:  # faster than zero_grad, which calls a profiler (0.1 ms)
            parameter.grad = None
        detached_batches: list[Batch] = []
        with train_only([bound], self.bound_phases):
            detached_losses = []
            for i, micro_batch in enumerate(micro_batches):
                reduce_gradients(self.fsdp_modules, i == len(micro_batches) - 1)
                batch = batches_with_shared[i] if batches_with_shared else self._with_shared(micro_batch, repeat_index)
                terms = expect_dict(phase.losses(batch), phase, "losses", "loss terms")
                total = reduce(add, terms.values())  # its backward pass needs no operator
                loss = total if len(micro_batches) == 1 else total / len(micro_batches)
                backward(self.trainer, loss, bound.averager if i == len(micro_batches) - 1 else None)
                with torch.no_grad():
                    detached_losses.append(torch.stack(list(terms.values())))
                if not batches_with_shared and has_gradients(batch):
                    detached_batches.append(detach_tensors(batch))
            check_reduced(self.fsdp_modules)
            optimizer_step(self.trainer, bound)
            update_grad_scaler(self.trainer)
        reshard(self.fsdp_modules)
        images_seen = self.images_seen + len(micro_batches) * batch_size_of(micro_batches[0]) * self.trainer.world_size
        mean = detached_losses[0] if len(detached_losses) == 1 else torch.stack(detached_losses).mean(0)
        self.loss_log.append(images_seen, phase.prefix, list(terms), mean)
        return detached_batches

    def _with_shared(self, micro_batch: Batch, repeat_index: int) -> Batch:
        batch = {**micro_batch, "repeat_index": repeat_index}
        return {**batch, **self.shared_forward(batch)}

    def _cast(self, value: Any) -> Any:
        """Cast data to the dtype of the weights; Lightning does not convert data created on the device."""
        dtype = self.dtype

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor

        return map_tensors(value, cast)

    def _log(self) -> None:
        """Check all losses since the last log entry, and log the newest values.

        Raises:
            NonFiniteLoss: a loss or a gradient is not finite.
        """
        metrics = self._newest_losses()
        self.loss_log.pending = []
        for bound in self.bound_phases:
            name = f"learning_rate/{bound.phase.name}" if bound.phase.name else "learning_rate"
            metrics[name] = bound.optimizer.param_groups[0]["lr"]
            if problem := gradient_problem(self.trainer, bound):
                raise non_finite(problem, self.images_seen, self.learning_rate)
        for logger in self.trainer.loggers:  # not self.log, which repeats a value until there is a newer one
            logger.log_metrics({**metrics, "images": self.images_seen}, step=self.trainer.fit_loop.total_batch_idx)

    def _newest_losses(self) -> dict[str, float]:
        return self.loss_log.newest(self.trainer.world_size, self.device, self.learning_rate)

    # Lightning hooks

    def on_fit_start(self) -> None:
        """Plan the stages of training, and inspect the data."""
        self.plan_stages(datamodule(self.trainer))
        self.inspect_data(datamodule(self.trainer))

    def inspect_data(self, data: Any) -> None:
        """Compute what the losses need to know about the training data of a datamodule, before the first step.

        Results are buffers, so that a resumed run has those of its checkpoint, and are the same on all ranks.
        """

    def plan_stages(self, data: Any) -> StagePlan:
        """Plan the stages for a datamodule, and pass it the position in the data, the batch size and the image size."""
        self.stage_plan = StagePlan(self.stages(), data.batch_size)
        data.position, data.batch_size_at = lambda: self.images_seen, self.stage_plan.batch_size
        data.image_size_at = self.stage_plan.image_size
        return self.stage_plan

    def on_train_start(self) -> None:
        """Bind the phases to the optimizers, freeze untrained parameters, and stop if the training budget is used up."""
        patch_training_loop(self.trainer)
        self.bound_phases = bind_phases(self.phases(), dict(zip(self.optimizer_names, self.trainer.optimizers, strict=True)))
        add_averagers(self.bound_phases, self.trainer)
        self.fsdp_modules = fsdp_modules(self)
        trained_parameters = {parameter for bound in self.bound_phases for parameter in bound.parameters}
        for parameter in self.parameters():  # others belong to fixed networks, such as feature extractors
            parameter.requires_grad = parameter in trained_parameters
        last = self.stage_plan.batch_size(max(0, self.images_seen - 1))  # Lightning asks for it when a run is resumed
        self._schedule_validation(max(0, self.images_seen - last), self.images_seen)
        self.trainer.should_stop = self.images_seen >= self.total_images

    def _schedule_validation(self, first: int, end: int) -> None:
        """Validate after the batch of the images `first` ... `end` - 1 if it completes a multiple of the validation interval.

        Lightning counts the interval in batches, so this is only required if the batch size changes.
        """
        if len(set(self.stage_plan.batch_sizes)) > 1:
            interval = self.trainer.val_check_interval * datamodule(self.trainer).batch_size
            schedule_validation(self.trainer, first // interval < end // interval)

    def _reset_optimizers(self) -> None:
        """Clear the optimizer states at the first step of a stage, if the stage requires it."""
        index = self.stage_plan.index(self.images_seen)
        if self.images_seen != self.stage_plan.starts[index] or not self.stage_plan.stages[index].reset_optimizers:
            return
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Prepare the step, and seed torch from the images seen: a resumed run has the same dropout."""
        sync_logger_step(self.trainer)
        self._schedule_validation(self.images_seen, self.images_seen + self.stage_plan.batch_size(self.images_seen))
        self._reset_optimizers()
        seed = derive_seed(self.seed, f"step/{self.images_seen}/{self.trainer.global_rank}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slower without a GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_validation_start(self) -> None:
        """Synchronize the buffers of all ranks and check the losses since the last log entry.

        Raises:
            NonFiniteLoss: a loss is not finite.
        """
        if self.trainer.world_size > 1:
            broadcast_buffers(self)
        if self.trainer.state.fn == "fit":
            self._newest_losses()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the images seen, the pending losses, and the settings that must be equal for a bit-identical resumed run."""
        checkpoint["images_seen"] = self.images_seen
        checkpoint["world_size"] = self.trainer.world_size
        checkpoint["precision"] = str(self.trainer.precision)
        checkpoint["file_hashes"] = self.file_hashes()
        self.loss_log.all_reduce(self.trainer.world_size, self.device)  # this hook runs on every rank
        checkpoint["pending_losses"] = self.loss_log.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the images seen and the pending losses.

        Raises:
            UserError: a file of `file_hashes` has changed since the checkpoint.
        """
        saved = checkpoint.get("file_hashes", {})  # absent in checkpoints of older versions
        if changed := [name for name, value in self.file_hashes().items() if value and saved.get(name, value) != value]:
            raise UserError(f"{changed[0]}: the file has changed since the checkpoint. Restore it, or start a new run")
        self.images_seen = checkpoint["images_seen"]
        self.loss_log.load_state(checkpoint["pending_losses"])

    def compile_networks(self) -> None:
        """Compile the networks and `compiled_losses` in place; the names in checkpoints do not change.

        Networks in `double_backward_networks` are skipped: compiled code does not support double backward passes.
        """
        for name in self.compiled_losses:
            setattr(self, name, torch.compile(getattr(self, name)))
        for name, network in self.named_children():
            if not isinstance(network, EMA) and name not in self.double_backward_networks:
                is_list = isinstance(network, nn.ModuleList | nn.ModuleDict)  # which is never called, but its parts are
                for part in network.children() if is_list else [network]:
                    part.compile()
