"""The base of every method: one training step for all, counted in images seen."""

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
MIN_LOSS_SCALE = 2.0**-14  # of fp16 losses; torch begins with 2**16 and halves it at each overflow


class NonFiniteLoss(UserError):
    """A loss or a gradient has become infinite or not a number; the message names it and the images seen."""


class PhaseLosses(NamedTuple):
    """The terms of a phase's loss in one of its moves."""

    images_seen: int  # after that step
    phase: Phase
    names: list[str]
    values: Tensor


class Method(FastSetattrModule):
    """Networks with their losses, trained by manual optimization.

    A method with one loss defines `losses` and `configure_optimizers`. One whose networks alternate defines `phases`, and in
    `shared_forward` what several of them need; what it has of `modules.training.ema.EMA` and `modules.training.image_pool.ImagePool`
    is kept up. All else of a training step
    stands here. Progress is counted in images seen by all processes together, so that a schedule means the same for any
    batch size and any number of devices.

    Args:
        total_images: training budget, in images (patches) seen; the run stops there.
        learning_rate: its highest value.
        warmup: images over which the learning rate rises linearly from zero; it then falls to zero along a half cosine.
        seed: of the noise in training.
    """

    double_backward_networks: ClassVar[Sequence[str]] = ()  # names of networks under a gradient penalty

    def __init__(self, total_images: int, learning_rate: float, warmup: int = 0, seed: int = 0) -> None:
        super().__init__()
        if total_images < 1:
            raise UserError(f"model.total_images: {total_images} is not a budget, at least 1 image is needed")
        self.automatic_optimization = False
        self.total_images = total_images
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.seed = seed
        self.accumulate_grad_batches = 1  # chunks that a process cuts its share of a batch into
        self.images_seen = 0
        self.active_phases: list[ActivePhase] = []
        self.fsdp_modules: list[FSDPModule] = []  # networks divided among processes, see modules/training/fsdp.py
        self.pending_losses: list[PhaseLosses] = []
        self.restored_losses: list[list[Any]] = []

    # What a method says

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss on one batch, by name; their sum is minimised."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def phases(self) -> Sequence[Phase]:
        """The moves of a training step, in their order."""
        return [Phase("", [self], lambda _: self.configure_optimizers(), self.losses, lambda n: {"lr": self.schedule(n)})]

    def configure_optimizers(self) -> Any:
        """An optimizer a phase."""
        return [phase.optimizer(phase.parameters) for phase in self.phases()]

    def shared_forward(self, batch: Batch) -> Batch:
        """What more than one phase needs, computed once for all of them (the fakes of a step); it joins the batch.

        It holds until a network that it comes from has moved: then no later phase may differentiate through it, and only one
        phase may at all. A phase that moves several times, and each part of an accumulated batch, gets it computed anew,
        unless the networks that it comes from have moved: later phases then get what the moved one has seen.
        """
        return {}

    def schedule(self, images_seen: int) -> float:
        """The learning rate after that many images."""
        if images_seen < self.warmup:
            return self.learning_rate * (images_seen + 1) / self.warmup
        progress = min(1.0, (images_seen - self.warmup) / max(1, self.total_images - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def stage_starts(self) -> list[int]:
        """The images seen at which training enters a new stage; a check replays the first steps of each."""
        return [0, self.warmup] if self.warmup else [0]

    def batch_noise(self, batch: Batch, stream: str, size: int, kind: str = "normal") -> Tensor:
        """A batch's noise, (N, size): each sample's is a function of its position, on whichever process it is.

        Args:
            batch: as `losses` and `shared_forward` get it.
            stream: what it is for; different streams are independent.
            size: draws a sample.
            kind: "normal", with mean 0 and deviation 1; "fast-normal", the same in single precision, from other draws; or
                "uniform", in (0, 1).
        """
        values = NOISE_SAMPLERS[kind](self.seed, f"train/{stream}/{batch['repetition']}", batch["positions"], size)
        made = torch.from_numpy(values).to(self.dtype)
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made.to(self.device)

    # The training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Every phase whose turn it is moves once or more, on one batch."""
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
                parts = self._update_phase(active, micro_batches, [] if repeat_index else batches_with_shared, repeat_index)
                if not repeat_index:
                    batches_with_shared = batches_with_shared or parts
        for part in self.children():
            if isinstance(part, EMA | ImagePool):
                part.update(batch_size)

        increment_global_step(self.trainer)
        self.images_seen += batch_size
        if self.images_seen >= self.total_images:
            self.trainer.should_stop = True
        # Reading a loss makes the host wait for the device, so it is done only when it is logged.
        every = log_every_n_steps(self.trainer)
        if self.trainer.should_stop or (every and (batch_idx + 1) % every == 0):
            self._log()

    def _update_phase(
        self, active: ActivePhase, micro_batches: list[Batch], batches_with_shared: list[Batch], repeat_index: int
    ) -> list[Batch]:
        """One step of a player's optimizer.

        Args:
            active: who moves.
            micro_batches: the batch, in parts.
            batches_with_shared: the same with what the phases share, if that holds for this move.
            repeat_index: how often it has moved in this training step.

        Returns:
            The chunks with what the phases share, to look at alone, if it came from networks that have now moved; else none.
        """
        phase, optimizer = active.phase, active.optimizer
        for group in optimizer.param_groups:
            group.update(phase.schedule(self.images_seen))
        for parameter in active.parameters:  # zero_grad also tells a profiler, which takes a tenth of a millisecond
            parameter.grad = None
        detached_batches: list[Batch] = []
        with train_only([active], self.active_phases):
            updates = []
            for i, micro_batch in enumerate(micro_batches):
                batch = batches_with_shared[i] if batches_with_shared else self._with_shared(micro_batch, repeat_index)
                terms = phase.losses(batch)
                values = torch.stack(list(terms.values()))
                backward(self.trainer, values.sum() if len(micro_batches) == 1 else values.sum() / len(micro_batches))
                updates.append(values.detach())
                if not batches_with_shared and any(
                    isinstance(value, Tensor) and value.requires_grad for value in batch.values()
                ):
                    detached_batches.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in batch.items()})
            optimizer_step(self.trainer, optimizer, active.parameters, phase.max_grad_norm)
            update_grad_scaler(self.trainer)
        for unit in self.fsdp_modules:
            unit.reshard()
        images_seen = self.images_seen + len(micro_batches) * batch_size_of(micro_batches[0]) * self.trainer.world_size
        mean = updates[0] if len(updates) == 1 else torch.stack(updates).mean(0)
        self.pending_losses.append(PhaseLosses(images_seen, phase, list(terms), mean))
        return detached_batches

    def _with_shared(self, micro_batch: Batch, repeat_index: int) -> Batch:
        batch = {**micro_batch, "repetition": repeat_index}
        return {**batch, **self.shared_forward(batch)}

    def _cast(self, value: Any) -> Any:
        """Data made on the device after Lightning's own conversion, in the precision of the weights."""
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _log(self) -> None:
        """Log the newest terms, after a look at all since the last time."""
        metrics = self._check_finite_losses()
        self.pending_losses = []
        for active in self.active_phases:
            name = f"learning_rate/{active.phase.name}" if active.phase.name else "learning_rate"
            metrics[name] = active.optimizer.param_groups[0]["lr"]
            self._check_finite_grad(active)
        for logger in self.trainer.loggers:  # not self.log, which repeats a figure until there is a newer one
            logger.log_metrics({**metrics, "images": self.images_seen}, step=self.trainer.fit_loop.total_batch_idx)

    def _check_finite_losses(self) -> dict[str, float]:
        """The newest value of each term since the last log, by its name in logs.

        Raises:
            NonFiniteLoss: the first that is not finite.
        """
        self._all_reduce_losses()
        metrics: dict[str, float] = {}
        for terms in self.pending_losses:
            for name, value in zip(terms.names, terms.values.tolist(), strict=True):
                metrics[f"train/{terms.phase.prefix}{name}"] = value
                if not math.isfinite(value):  # every process sees the same value, and all of them stop
                    raise self._non_finite_error(f"loss '{terms.phase.prefix}{name}' is {value}", terms.images_seen)
        return metrics

    def _all_reduce_losses(self) -> None:
        """Make each term since the last log the mean of all processes, and bring it to the host, all in one go."""
        if not self.pending_losses:
            return
        values = torch.cat([terms.values.to(self.device) for terms in self.pending_losses])
        if self.trainer.world_size > 1:  # shares are equal: the mean is the whole batch's
            dist.all_reduce(values)
            values /= self.trainer.world_size
        parts = values.cpu().split([len(terms.names) for terms in self.pending_losses])
        self.pending_losses = [terms._replace(values=part) for terms, part in zip(self.pending_losses, parts, strict=True)]

    def _check_finite_grad(self, active: ActivePhase) -> None:
        """Refuse a gradient that is not finite; under fp16, where the scaler skips such a step, one that never is."""
        of_phase = f" of '{active.phase.name}'" if active.phase.name else ""
        if (scaler := grad_scaler(self.trainer)) is not None:
            if scaler.get_scale() < MIN_LOSS_SCALE:
                raise self._non_finite_error(f"the gradient{of_phase} overflows in fp16 at any scale", self.images_seen)
            return
        gradients = [parameter.grad for parameter in active.parameters if parameter.grad is not None]
        if not (norm := gather_full_tensors(nn.utils.get_total_norm(gradients))).isfinite():
            raise self._non_finite_error(f"the gradient's norm{of_phase} is {norm.item()}", self.images_seen)

    def _non_finite_error(self, what: str, images_seen: int) -> NonFiniteLoss:
        return NonFiniteLoss(f"{what} after {images_seen} images; lower model.learning_rate (now {self.learning_rate})")

    # Around it

    def on_train_start(self) -> None:
        """A step does what it must; a run that has seen all its images takes none."""
        patch_training_loop(self.trainer)
        optimizers: list[Optimizer] = self.trainer.optimizers
        self.active_phases = [ActivePhase(*pair) for pair in zip(self.phases(), optimizers, strict=True)]
        self.fsdp_modules = fsdp_modules(self)
        phases = {active.phase.name: active.phase for active in self.active_phases}
        if len(phases) < len(self.active_phases):
            raise TypeError(
                f"{type(self).__name__} has two phases of one name: {', '.join(p.phase.name for p in self.active_phases)}"
            )
        trained = {parameter for active in self.active_phases for parameter in active.parameters}
        for parameter in self.parameters():  # a network that no phase trains, such as one whose features are compared
            parameter.requires_grad = parameter in trained
        self.pending_losses = [
            PhaseLosses(images_seen, phases[name], *rest) for images_seen, name, *rest in self.restored_losses
        ]
        self.trainer.should_stop = self.images_seen >= self.total_images

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The logged step is the batch, in a resumed run too; dropout and the like draw as they would in any run."""
        sync_logger_step(self.trainer)
        seed = derive_seed(self.seed, f"step/{self.images_seen}/{self.trainer.global_rank}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for a GPU that is not there
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_validation_start(self) -> None:
        """All processes measure the same network, and none that has broken since the last log."""
        if self.trainer.world_size > 1:
            broadcast_buffers(self)
        if self.trainer.state.fn == "fit":
            self._check_finite_losses()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The images seen travel with the weights, and what else a run must share to be the same run bit for bit."""
        checkpoint["images_seen"] = self.images_seen
        checkpoint["world_size"] = self.trainer.world_size
        checkpoint["precision"] = str(self.trainer.precision)
        self._all_reduce_losses()  # this hook runs in every process
        checkpoint["pending_losses"] = [[terms.images_seen, terms.phase.name, *terms[2:]] for terms in self.pending_losses]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        self.images_seen, self.restored_losses = checkpoint["images_seen"], checkpoint["pending_losses"]

    def compile_networks(self) -> None:
        """Let torch compile the networks in place; names in checkpoints stay as they are.

        Those named in `double_backward_networks` are left out: torch cannot do that through compiled code.
        """
        for name, network in self.named_children():
            if not isinstance(network, EMA) and name not in self.double_backward_networks:
                network.compile()
