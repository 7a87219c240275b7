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

from datamodules.errors import Refused
from datamodules.random.noise import normal, number, uniform
from modules.training.ema import Average
from modules.training.fsdp import units, whole
from modules.training.gradients import backward, end_of_step, share_buffers, step
from modules.training.image_pool import Pool
from modules.training.lightning_compat import LeanModule, align_log_axis, count_step, grad_scaler, lean_loop, log_every
from modules.training.phases import Batch, Phase, Player, chunks_of, only, size_of

DRAWS: dict[str, Callable[..., np.ndarray]] = {
    "normal": normal,
    "fast-normal": partial(normal, dtype=np.float32),
    "uniform": uniform,
}
SMALLEST_SCALE = 2.0**-14  # of fp16 losses; torch begins with 2**16 and halves it at each overflow


class NonFiniteLoss(Refused):
    """A loss or a gradient has become infinite or not a number; the message names it and the images seen."""


class Terms(NamedTuple):
    """The terms of a phase's loss in one of its moves."""

    images: int  # seen after that step
    phase: Phase
    names: list[str]
    values: Tensor


class Method(LeanModule):
    """Networks with their losses, trained by manual optimization.

    A method with one loss defines `losses` and `configure_optimizers`. One whose networks alternate defines `phases`, and in
    `shared` what several of them need; what it has of `modules.training.ema.Average` and `modules.training.image_pool.Pool`
    is kept up. All else of a training step
    stands here. Progress is counted in images seen by all processes together, so that a schedule means the same for any
    batch size and any number of devices.

    Args:
        images: training budget, in images (patches) seen; the run stops there.
        learning_rate: its highest value.
        warmup: images over which the learning rate rises linearly from zero; it then falls to zero along a half cosine.
        seed: of the noise in training.
    """

    differentiated_twice: ClassVar[Sequence[str]] = ()  # names of networks under a gradient penalty

    def __init__(self, images: int, learning_rate: float, warmup: int = 0, seed: int = 0) -> None:
        super().__init__()
        if images < 1:
            raise Refused(f"model.images: {images} is not a budget, at least 1 image is needed")
        self.automatic_optimization = False
        self.images = images
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.seed = seed
        self.accumulate = 1  # chunks that a process cuts its share of a batch into
        self.images_seen = 0
        self.players: list[Player] = []
        self.units: list[FSDPModule] = []  # networks divided among processes, see modules/training/fsdp.py
        self.since_log: list[Terms] = []
        self.resumed_terms: list[list[Any]] = []

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

    def shared(self, batch: Batch) -> Batch:
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
        progress = min(1.0, (images_seen - self.warmup) / max(1, self.images - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def noise(self, batch: Batch, stream: str, size: int, kind: str = "normal") -> Tensor:
        """A batch's noise, (N, size): each sample's is a function of its position, on whichever process it is.

        Args:
            batch: as `losses` and `shared` get it.
            stream: what it is for; different streams are independent.
            size: draws a sample.
            kind: "normal", with mean 0 and deviation 1; "fast-normal", the same in single precision, from other draws; or
                "uniform", in (0, 1).
        """
        values = DRAWS[kind](self.seed, f"train/{stream}/{batch['repetition']}", batch["positions"], size)
        made = torch.from_numpy(values).to(self.dtype)
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made.to(self.device)

    # The training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Every phase whose turn it is moves once or more, on one batch."""
        share = size_of(batch)
        images = share * self.trainer.world_size
        turn = self.images_seen // images + 1
        moving = [player for player in self.players if not turn % player.phase.every]
        batch = {key: self._cast(value) for key, value in batch.items()}
        chunks = chunks_of(batch, self.accumulate, self.images_seen + self.trainer.global_rank * share)
        joined: list[Batch] = []
        if len(chunks) == 1:
            with only(moving, self.players):
                joined = [self._joined(chunks[0], 0)]
        for player in moving:
            for repetition in range(player.phase.times):
                parts = self._move(player, chunks, [] if repetition else joined, repetition)
                if not repetition:
                    joined = joined or parts
        for part in self.children():
            if isinstance(part, Average | Pool):
                part.update(images)

        count_step(self.trainer)
        self.images_seen += images
        if self.images_seen >= self.images:
            self.trainer.should_stop = True
        # Reading a loss makes the host wait for the device, so it is done only when it is logged.
        every = log_every(self.trainer)
        if self.trainer.should_stop or (every and (batch_idx + 1) % every == 0):
            self._log()

    def _move(self, player: Player, chunks: list[Batch], joined: list[Batch], repetition: int) -> list[Batch]:
        """One step of a player's optimizer.

        Args:
            player: who moves.
            chunks: the batch, in parts.
            joined: the same with what the phases share, if that holds for this move.
            repetition: how often it has moved in this training step.

        Returns:
            The chunks with what the phases share, to look at alone, if it came from networks that have now moved; else none.
        """
        phase, optimizer = player.phase, player.optimizer
        for group in optimizer.param_groups:
            group.update(phase.schedule(self.images_seen))
        for parameter in player.parameters:  # zero_grad also tells a profiler, which takes a tenth of a millisecond
            parameter.grad = None
        before: list[Batch] = []
        with only([player], self.players):
            moves = []
            for i, chunk in enumerate(chunks):
                batch = joined[i] if joined else self._joined(chunk, repetition)
                terms = phase.losses(batch)
                values = torch.stack(list(terms.values()))
                backward(self.trainer, values.sum() if len(chunks) == 1 else values.sum() / len(chunks))
                moves.append(values.detach())
                if not joined and any(isinstance(value, Tensor) and value.requires_grad for value in batch.values()):
                    before.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in batch.items()})
            step(self.trainer, optimizer, player.parameters, phase.clip)
            end_of_step(self.trainer)
        for unit in self.units:
            unit.reshard()
        images = self.images_seen + len(chunks) * size_of(chunks[0]) * self.trainer.world_size
        mean = moves[0] if len(moves) == 1 else torch.stack(moves).mean(0)
        self.since_log.append(Terms(images, phase, list(terms), mean))
        return before

    def _joined(self, chunk: Batch, repetition: int) -> Batch:
        batch = {**chunk, "repetition": repetition}
        return {**batch, **self.shared(batch)}

    def _cast(self, value: Any) -> Any:
        """Data made on the device after Lightning's own conversion, in the precision of the weights."""
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _log(self) -> None:
        """Log the newest terms, after a look at all since the last time."""
        figures = self._look_at_terms()
        self.since_log = []
        for player in self.players:
            name = f"learning_rate/{player.phase.name}" if player.phase.name else "learning_rate"
            figures[name] = player.optimizer.param_groups[0]["lr"]
            self._check_gradient(player)
        for logger in self.trainer.loggers:  # not self.log, which repeats a figure until there is a newer one
            logger.log_metrics({**figures, "images": self.images_seen}, step=self.trainer.fit_loop.total_batch_idx)

    def _look_at_terms(self) -> dict[str, float]:
        """The newest value of each term since the last log, by its name in logs.

        Raises:
            NonFiniteLoss: the first that is not finite.
        """
        self._share_terms()
        figures: dict[str, float] = {}
        for terms in self.since_log:
            for name, value in zip(terms.names, terms.values.tolist(), strict=True):
                figures[f"train/{terms.phase.prefix}{name}"] = value
                if not math.isfinite(value):  # every process sees the same value, and all of them stop
                    raise self._not_finite(f"loss '{terms.phase.prefix}{name}' is {value}", terms.images)
        return figures

    def _share_terms(self) -> None:
        """Make each term since the last log the mean of all processes, and bring it to the host, all in one go."""
        if not self.since_log:
            return
        values = torch.cat([terms.values.to(self.device) for terms in self.since_log])
        if self.trainer.world_size > 1:  # shares are equal: the mean is the whole batch's
            dist.all_reduce(values)
            values /= self.trainer.world_size
        parts = values.cpu().split([len(terms.names) for terms in self.since_log])
        self.since_log = [terms._replace(values=part) for terms, part in zip(self.since_log, parts, strict=True)]

    def _check_gradient(self, player: Player) -> None:
        """Refuse a gradient that is not finite; under fp16, where the scaler skips such a step, one that never is."""
        of_phase = f" of '{player.phase.name}'" if player.phase.name else ""
        if (scaler := grad_scaler(self.trainer)) is not None:
            if scaler.get_scale() < SMALLEST_SCALE:
                raise self._not_finite(f"the gradient{of_phase} overflows in fp16 at any scale", self.images_seen)
            return
        gradients = [parameter.grad for parameter in player.parameters if parameter.grad is not None]
        if not (norm := whole(nn.utils.get_total_norm(gradients))).isfinite():
            raise self._not_finite(f"the gradient's norm{of_phase} is {norm.item()}", self.images_seen)

    def _not_finite(self, what: str, images: int) -> NonFiniteLoss:
        return NonFiniteLoss(f"{what} after {images} images; lower model.learning_rate (now {self.learning_rate})")

    # Around it

    def on_train_start(self) -> None:
        """A step does what it must; a run that has seen all its images takes none."""
        lean_loop(self.trainer)
        optimizers: list[Optimizer] = self.trainer.optimizers
        self.players = [Player(*pair) for pair in zip(self.phases(), optimizers, strict=True)]
        self.units = units(self)
        phases = {player.phase.name: player.phase for player in self.players}
        if len(phases) < len(self.players):
            raise TypeError(
                f"{type(self).__name__} has two phases of one name: {', '.join(p.phase.name for p in self.players)}"
            )
        trained = {parameter for player in self.players for parameter in player.parameters}
        for parameter in self.parameters():  # a network that no phase trains, such as one whose features are compared
            parameter.requires_grad = parameter in trained
        self.since_log = [Terms(images, phases[name], *rest) for images, name, *rest in self.resumed_terms]
        self.trainer.should_stop = self.images_seen >= self.images

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The logged step is the batch, in a resumed run too; dropout and the like draw as they would in any run."""
        align_log_axis(self.trainer)
        seed = number(self.seed, f"step/{self.images_seen}/{self.trainer.global_rank}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for a GPU that is not there
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_validation_start(self) -> None:
        """All processes measure the same network, and none that has broken since the last log."""
        if self.trainer.world_size > 1:
            share_buffers(self)
        if self.trainer.state.fn == "fit":
            self._look_at_terms()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The images seen travel with the weights, and what else a run must share to be the same run bit for bit."""
        checkpoint["images_seen"] = self.images_seen
        checkpoint["processes"] = self.trainer.world_size
        checkpoint["precision"] = str(self.trainer.precision)
        self._share_terms()  # this hook runs in every process
        checkpoint["terms"] = [[terms.images, terms.phase.name, *terms[2:]] for terms in self.since_log]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        self.images_seen, self.resumed_terms = checkpoint["images_seen"], checkpoint["terms"]

    def compile_networks(self) -> None:
        """Let torch compile the networks in place; names in checkpoints stay as they are.

        Those named in `differentiated_twice` are left out: torch cannot do that through compiled code.
        """
        for name, network in self.named_children():
            if not isinstance(network, Average) and name not in self.differentiated_twice:
                network.compile()
