"""Base class of all methods: the training step, with progress counted in images seen."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.random.noise import derive_seed, normal, uniform
from modules.training.ema import EMA
from modules.training.fsdp import fsdp_modules, gather_full_tensors
from modules.training.gradients import backward, broadcast_buffers, optimizer_step, update_grad_scaler
from modules.training.image_pool import ImagePool
from modules.training.lightning_compat import (
    FastSetattrModule,
    grad_scaler,
    increment_global_step,
    log_every_n_steps,
    patch_training_loop,
    sync_logger_step,
)
from modules.training.phases import ActivePhase, Batch, Phase, batch_size_of, split_micro_batches, train_only

NOISE_SAMPLERS: dict[str, Callable[..., np.ndarray]] = {
    "normal": normal,
    "fast-normal": partial(normal, dtype=np.float32),
    "uniform": uniform,
}
MIN_LOSS_SCALE = 2.0**-14  # fp16 loss scale; torch starts at 2**16 and halves it at each overflow


class NonFiniteLoss(UserError):
    """A loss or a gradient is infinite or NaN; the message names it and the images seen."""


class PhaseLosses(NamedTuple):
    """Loss terms of one optimizer update of a phase."""

    images_seen: int  # after the update
    phase: Phase
    names: list[str]
    values: Tensor


class Method(FastSetattrModule):
    """Networks with their losses, trained by manual optimization.

    A method with one loss defines `losses` and `configure_optimizers`. A method with alternating networks defines `phases`,
    and `shared_forward` for tensors that several phases need. The base class runs the training step and updates the `EMA` and
    `ImagePool` submodules. Progress is counted in images seen by all ranks together, so schedules are independent of the batch
    size and the number of devices.

    Args:
        total_images: training budget, in images (patches) seen.
        learning_rate: maximum learning rate.
        warmup: images over which the learning rate rises linearly from zero; it then falls to zero along a half cosine.
        seed: seed of the noise in training.

    Raises:
        UserError: `total_images` is less than 1.
    """

    double_backward_networks: ClassVar[Sequence[str]] = ()  # names of networks under a gradient penalty

    def __init__(self, total_images: int, learning_rate: float, warmup: int = 0, seed: int = 0) -> None:
        super().__init__()
        if total_images < 1:
            raise UserError(f"model.total_images: {total_images} must be at least 1")
        self.automatic_optimization = False
        self.total_images = total_images
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.seed = seed
        self.accumulate_grad_batches = 1  # micro-batches per local batch
        self.images_seen = 0
        self.active_phases: list[ActivePhase] = []
        self.fsdp_modules: list[FSDPModule] = []  # sharded networks, see modules/training/fsdp.py
        self.pending_losses: list[PhaseLosses] = []
        self.restored_losses: list[list[Any]] = []

    # To be overridden by methods

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms on one batch, by name; their sum is minimised."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def phases(self) -> Sequence[Phase]:
        """Phases of a training step, in order."""
        return [Phase("", [self], lambda _: self.configure_optimizers(), self.losses, lambda n: {"lr": self.schedule(n)})]

    def configure_optimizers(self) -> Any:
        """Create one optimizer per phase."""
        return [phase.optimizer(phase.parameters) for phase in self.phases()]

    def shared_forward(self, batch: Batch) -> Batch:
        """Compute tensors that several phases need, such as the fakes of a step; they are added to the batch.

        Valid until a network that produced them is updated; later phases use them without gradients. Only one phase may
        backpropagate through them. They are recomputed for each micro-batch and each repeated update of a phase. Once their
        networks have been updated, later phases get the detached tensors of that update instead.
        """
        return {}

    def schedule(self, images_seen: int) -> float:
        """Learning rate after `images_seen` images."""
        if images_seen < self.warmup:
            return self.learning_rate * (images_seen + 1) / self.warmup
        progress = min(1.0, (images_seen - self.warmup) / max(1, self.total_images - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def stage_starts(self) -> list[int]:
        """Images seen at the start of each training stage; `darkroom reproduce --check` replays the first steps of each."""
        return [0, self.warmup] if self.warmup else [0]

    def batch_noise(self, batch: Batch, stream: str, size: int, kind: str = "normal") -> Tensor:
        """Sample noise (N, size) for a batch; each row depends only on the sample's id, not on the rank.

        Args:
            batch: batch passed to `losses` or `shared_forward`.
            stream: name of the random stream; different streams are independent.
            size: number of values per sample.
            kind: "normal", with mean 0 and standard deviation 1; "fast-normal", the same in single precision, with other
                values; or "uniform", in (0, 1).
        """
        values = NOISE_SAMPLERS[kind](self.seed, f"train/{stream}/{batch['repeat_index']}", batch["sample_ids"], size)
        noise = torch.from_numpy(values).to(self.dtype)
        return noise.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else noise.to(self.device)

    # The training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the phases that are due, each with one or more optimizer updates, on one batch."""
        local_batch_size = batch_size_of(batch)
        batch_size = local_batch_size * self.trainer.world_size
        step_index = self.images_seen // batch_size + 1
        due = [active for active in self.active_phases if not step_index % active.phase.interval]
        batch = {key: self._cast(value) for key, value in batch.items()}
        micro_batches = split_micro_batches(
            batch, self.accumulate_grad_batches, self.images_seen + self.trainer.global_rank * local_batch_size
        )
        batches_with_shared: list[Batch] = []
        if len(micro_batches) == 1:
            with train_only(due, self.active_phases):
                batches_with_shared = [self._with_shared(micro_batches[0], 0)]
        for active in due:
            for repeat_index in range(active.phase.n_updates):
                chunks = self._update_phase(active, micro_batches, [] if repeat_index else batches_with_shared, repeat_index)
                if not repeat_index:
                    batches_with_shared = batches_with_shared or chunks
        for item in self.children():
            if isinstance(item, EMA | ImagePool):
                item.update(batch_size)

        increment_global_step(self.trainer)
        self.images_seen += batch_size
        if self.images_seen >= self.total_images:
            self.trainer.should_stop = True
        # Losses are read only when they are logged, because reading one makes the host wait for the device.
        log_interval = log_every_n_steps(self.trainer)
        if self.trainer.should_stop or (log_interval and (batch_idx + 1) % log_interval == 0):
            self._log()

    def _update_phase(
        self, active: ActivePhase, micro_batches: list[Batch], batches_with_shared: list[Batch], repeat_index: int
    ) -> list[Batch]:
        """Run one optimizer update of a phase.

        Args:
            active: phase to update.
            micro_batches: micro-batches of the step.
            batches_with_shared: micro-batches with valid shared tensors; empty to compute them here.
            repeat_index: number of earlier updates of this phase in the training step.

        Returns:
            The micro-batches with detached shared tensors if they were computed here with gradients, otherwise an empty list.
        """
        phase, optimizer = active.phase, active.optimizer
        for group in optimizer.param_groups:
            group.update(phase.schedule(self.images_seen))
        for parameter in active.parameters:  # faster than zero_grad, which calls a profiler (0.1 ms)
            parameter.grad = None
        detached_batches: list[Batch] = []
        with train_only([active], self.active_phases):
            detached_losses = []
            for i, micro_batch in enumerate(micro_batches):
                batch = batches_with_shared[i] if batches_with_shared else self._with_shared(micro_batch, repeat_index)
                terms = phase.losses(batch)
                values = torch.stack(list(terms.values()))
                backward(self.trainer, values.sum() if len(micro_batches) == 1 else values.sum() / len(micro_batches))
                detached_losses.append(values.detach())
                if not batches_with_shared and any(
                    isinstance(value, Tensor) and value.requires_grad for value in batch.values()
                ):
                    detached_batches.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in batch.items()})
            optimizer_step(self.trainer, optimizer, active.parameters, phase.max_grad_norm)
            update_grad_scaler(self.trainer)
        for unit in self.fsdp_modules:
            unit.reshard()
        images_seen = self.images_seen + len(micro_batches) * batch_size_of(micro_batches[0]) * self.trainer.world_size
        mean = detached_losses[0] if len(detached_losses) == 1 else torch.stack(detached_losses).mean(0)
        self.pending_losses.append(PhaseLosses(images_seen, phase, list(terms), mean))
        return detached_batches

    def _with_shared(self, micro_batch: Batch, repeat_index: int) -> Batch:
        batch = {**micro_batch, "repeat_index": repeat_index}
        return {**batch, **self.shared_forward(batch)}

    def _cast(self, value: Any) -> Any:
        """Cast data to the dtype of the weights; Lightning does not convert data created on the device."""
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _log(self) -> None:
        """Check all losses since the last log, and log the newest values."""
        metrics = self._check_finite_losses()
        self.pending_losses = []
        for active in self.active_phases:
            name = f"learning_rate/{active.phase.name}" if active.phase.name else "learning_rate"
            metrics[name] = active.optimizer.param_groups[0]["lr"]
            self._check_finite_grad(active)
        for logger in self.trainer.loggers:  # not self.log, which repeats a value until there is a newer one
            logger.log_metrics({**metrics, "images": self.images_seen}, step=self.trainer.fit_loop.total_batch_idx)

    def _check_finite_losses(self) -> dict[str, float]:
        """Return the newest value of each loss term since the last log, by log name.

        Raises:
            NonFiniteLoss: a value since the last log is not finite.
        """
        self._all_reduce_losses()
        metrics: dict[str, float] = {}
        for terms in self.pending_losses:
            for name, value in zip(terms.names, terms.values.tolist(), strict=True):
                metrics[f"train/{terms.phase.prefix}{name}"] = value
                if not math.isfinite(value):  # the value is the same on all ranks, so all of them stop
                    raise self._non_finite_error(f"loss '{terms.phase.prefix}{name}' is {value}", terms.images_seen)
        return metrics

    def _all_reduce_losses(self) -> None:
        """Average the loss terms since the last log over all ranks and copy them to the host, in one reduction."""
        if not self.pending_losses:
            return
        values = torch.cat([terms.values.to(self.device) for terms in self.pending_losses])
        if self.trainer.world_size > 1:  # local batches have equal sizes
            dist.all_reduce(values)
            values /= self.trainer.world_size
        chunks = values.cpu().split([len(terms.names) for terms in self.pending_losses])
        self.pending_losses = [terms._replace(values=item) for terms, item in zip(self.pending_losses, chunks, strict=True)]

    def _check_finite_grad(self, active: ActivePhase) -> None:
        """Raise if a gradient is not finite; under fp16, where the scaler skips such steps, if it overflows at any scale."""
        suffix = f" of '{active.phase.name}'" if active.phase.name else ""
        if (scaler := grad_scaler(self.trainer)) is not None:
            if scaler.get_scale() < MIN_LOSS_SCALE:
                raise self._non_finite_error(f"the gradient{suffix} overflows in fp16 at any scale", self.images_seen)
            return
        gradients = [parameter.grad for parameter in active.parameters if parameter.grad is not None]
        if not (norm := gather_full_tensors(nn.utils.get_total_norm(gradients))).isfinite():
            raise self._non_finite_error(f"the gradient's norm{suffix} is {norm.item()}", self.images_seen)

    def _non_finite_error(self, problem: str, images_seen: int) -> NonFiniteLoss:
        return NonFiniteLoss(f"{problem} after {images_seen} images; lower model.learning_rate (now {self.learning_rate})")

    # Lightning hooks

    def on_train_start(self) -> None:
        """Set up the phases, freeze untrained parameters, and stop at once if the budget is used up."""
        patch_training_loop(self.trainer)
        optimizers: list[Optimizer] = self.trainer.optimizers
        self.active_phases = [ActivePhase(*pair) for pair in zip(self.phases(), optimizers, strict=True)]
        self.fsdp_modules = fsdp_modules(self)
        phases = {active.phase.name: active.phase for active in self.active_phases}
        if len(phases) < len(self.active_phases):
            raise TypeError(
                f"{type(self).__name__} has two phases with one name: {', '.join(p.phase.name for p in self.active_phases)}"
            )
        trained_parameters = {parameter for active in self.active_phases for parameter in active.parameters}
        for parameter in self.parameters():  # others belong to fixed networks, such as feature extractors
            parameter.requires_grad = parameter in trained_parameters
        self.pending_losses = [
            PhaseLosses(images_seen, phases[name], *rest) for images_seen, name, *rest in self.restored_losses
        ]
        self.trainer.should_stop = self.images_seen >= self.total_images

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the loggers' step, and seed torch by the images seen, so that a resumed run repeats dropout exactly."""
        sync_logger_step(self.trainer)
        seed = derive_seed(self.seed, f"step/{self.images_seen}/{self.trainer.global_rank}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slower without a GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_validation_start(self) -> None:
        """Synchronize the buffers of all ranks and check the losses since the last log."""
        if self.trainer.world_size > 1:
            broadcast_buffers(self)
        if self.trainer.state.fn == "fit":
            self._check_finite_losses()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the images seen, the pending losses, and the settings that a bit-identical resumed run must share."""
        checkpoint["images_seen"] = self.images_seen
        checkpoint["world_size"] = self.trainer.world_size
        checkpoint["precision"] = str(self.trainer.precision)
        self._all_reduce_losses()  # this hook runs on every rank
        checkpoint["pending_losses"] = [[terms.images_seen, terms.phase.name, *terms[2:]] for terms in self.pending_losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the images seen and the pending losses."""
        self.images_seen, self.restored_losses = checkpoint["images_seen"], checkpoint["pending_losses"]

    def compile_networks(self) -> None:
        """Compile the networks in place; checkpoint names do not change.

        Networks in `double_backward_networks` are skipped: compiled code does not support double backward passes.
        """
        for name, network in self.named_children():
            if not isinstance(network, EMA) and name not in self.double_backward_networks:
                network.compile()
