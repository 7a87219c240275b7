"""Base classes of metrics: over the images of a dataset, and over a set of generated samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.metrics.ranks import gather, on_rank_zero
from datamodules.errors import UserError
from modules.losses.precision import full_precision

Results = dict[str, dict[str, dict[str, float]]]  # values by dataset, image and protocol


class Metric(Callback, ABC):
    """Base class of all metrics, with the evaluation schedule and the logging of results.

    `required_outputs` lists the outputs of the method's steps that a metric needs. They are checked in the sanity check before
    training and at the first batch of each evaluation.

    Metrics are computed in full precision: without autocast and TF32. What all images of a set determine is computed once, on
    rank 0.

    `results` is {dataset: {image: {protocol: value}}} after each evaluation. A metric of a full set has the image name "all".
    The mean over images is logged as `<dataset>/<protocol>`. `image_results` has the values of single images, in the same form,
    also of a metric of a full set whose states have a value of their own.
    """

    required_outputs: ClassVar[tuple[str, ...]] = ()
    evaluator_hash = ""  # hash of the weights, if a network computes the metric

    def __init__(self, on_validation: bool) -> None:
        self.on_validation = on_validation
        self.results: Results = {}
        self.image_results: Results = {}

    def _require_outputs(self, outputs: dict[str, Any], pl_module: Any, batch_idx: int) -> None:
        """Check the outputs of the first batch.

        Raises:
            UserError: an output is missing.
        """
        if not batch_idx and (missing := [name for name in self.required_outputs if name not in outputs]):
            raise UserError(
                f"{type(self).__name__}: needs the outputs {', '.join(self.required_outputs)}, but {type(pl_module).__name__} "
                f"has no {', '.join(missing)} on these data. Remove the metric from trainer.callbacks"
            )

    def _log_results(self, trainer: Any, pl_module: Any) -> None:
        """Log the mean over the images of each dataset, in the order of their names."""
        means = {
            f"{dataset}/{protocol}": sum(images[name][protocol] for name in sorted(images)) / len(images)
            for dataset, images in self.results.items()
            for protocol in next(iter(images.values()))
        }
        images_seen = {"images": float(pl_module.images_seen)} if trainer.state.fn == "fit" else {}
        pl_module.log_dict({**means, **images_seen}, sync_dist=False)


class ImageMetric(Metric):
    """A metric over validation and test images.

    Required outputs: "name" and "dataset", N strings each. The state of an image depends on that image alone. It is stored
    under the name of the image and sent to rank 0. The results are therefore the same for any batch size and any
    number of ranks. (torchmetrics gathers one state at a time, and each rank must have it; with a small dataset, some ranks
    have none.)

    Args:
        on_validation: evaluate at validations too, otherwise only at tests.

    Attributes:
        set_protocols: prefixes of the protocols that have a value for a set of images only, and none for a single image; None
            for all protocols.
    """

    set_protocols: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, on_validation: bool = True) -> None:
        super().__init__(on_validation)
        self.state: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def update(self, outputs: dict[str, Any], i: int) -> Any:
        """Return the state of image `i` of a batch, on the CPU."""

    def store(self, dataset: str, image: str, state: Any) -> None:
        """Store the state of an image until the end of the evaluation."""
        self.state.setdefault(dataset, {})[image] = state

    def merge(self, states: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """Return the states by dataset and image from those of all ranks, on rank 0."""
        merged: dict[str, dict[str, Any]] = {}
        for state in states:
            for dataset, images in state.items():
                merged.setdefault(dataset, {}).update(images)
        return merged

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return a dataset's metrics by protocol, from the states of its images in the order of their names."""
        raise TypeError(f"{type(self).__name__} does not implement `compute` or `compute_images`")

    def compute_images(self, states: dict[str, Any], trainer: Any) -> dict[str, dict[str, float]]:
        """Return the metrics by image and protocol, from the states by image name; by default {"all": `compute`}."""
        return {"all": self.compute([states[name] for name in sorted(states)], trainer)}

    def compute_image(self, state: Any, trainer: Any) -> dict[str, float]:
        """Return the values of one image by protocol, for a metric of a full set: `compute`, without `set_protocols`."""
        if self.set_protocols is None:
            return {}
        values = self.compute([state], trainer)
        return {name: value for name, value in values.items() if not name.startswith(self.set_protocols)}

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Discard earlier states, including those of the sanity check."""
        self.state = {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate each image of a batch."""
        self._require_outputs(outputs, pl_module, batch_idx)
        if self._is_inactive(trainer):
            return
        with full_precision():
            for i, (dataset, image) in enumerate(zip(outputs["dataset"], outputs["name"], strict=True)):
                self.store(dataset, image, self.update(outputs, i))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Gather the states of all ranks, compute the metrics, and log them."""
        if self._is_inactive(trainer):
            return
        states = gather(self.state, trainer.world_size)
        self.state = {}
        with full_precision():
            self.results, self.image_results = on_rank_zero(
                lambda: self._compute_all(self.merge(states), trainer), trainer.world_size
            )
        self._log_results(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    def _compute_all(self, merged: dict[str, dict[str, Any]], trainer: Any) -> tuple[Results, Results]:
        """Return `results` and `image_results` from the states by dataset and image."""
        results = {dataset: self.compute_images(images, trainer) for dataset, images in sorted(merged.items())}
        if trainer.state.fn != "test":
            return results, {}
        return results, {
            dataset: results[dataset]
            if "all" not in results[dataset]
            else {name: self.compute_image(images[name], trainer) for name in sorted(images)}
            for dataset, images in sorted(merged.items())
        }

    def _is_inactive(self, trainer: Any) -> bool:
        return trainer.state.fn == "fit" and not self.on_validation


class SampleStates:
    """States of samples, all of which are kept."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def store(self, index: Tensor, values: Tensor) -> None:
        """Store the states (N, ...) of the samples with these indices, (N,)."""
        self.parts.append((index, values))

    @classmethod
    def merge(cls, states: Sequence["SampleStates"]) -> Tensor:
        """Return the states of all ranks in the order of the indices, each index once."""
        return merge_sorted([state.parts for state in states])


class SampleSetMetric(Metric):
    """A metric that compares the samples of a validation or test with the reference sets of the datamodule.

    Required outputs: {"prediction": (N, C, H, W) in [0, 1], "index": (N,)}. The datamodule must have `reference_sets`, uint8
    images by the name of their set. Samples are sorted by index first, so that results do not depend on the batch size and
    the number of ranks.

    Args:
        on_validation: evaluate at validations too, otherwise only at tests.
        max_samples: number of samples that are used at most, those with the smallest indices; None for all.
    """

    required_outputs = ("prediction", "index")

    def __init__(self, on_validation: bool = False, max_samples: int | None = None) -> None:
        super().__init__(on_validation)
        self.max_samples = max_samples
        self.state = self.new_state()

    def new_state(self) -> Any:
        """Return an object without samples that has the methods of `SampleStates`."""
        return SampleStates()

    @abstractmethod
    def update(self, images: Tensor) -> Tensor:
        """Return the state of images (N, C, H, W) in [0, 1], on the CPU: (N, ...)."""

    def prepare(self, real: Tensor, trainer: Any) -> Any:
        """Return what `compute` needs of the real images, uint8 (N, C, H, W); all ranks call it. By default the images."""
        return real

    @abstractmethod
    def compute(self, samples: Tensor, real: Any, trainer: Any) -> dict[str, float]:
        """Return the metrics by protocol, on rank 0.

        Args:
            samples: states of all samples, (N, ...), or what `merge` of another `new_state` returns.
            real: result of `prepare`.
            trainer: Lightning trainer, for the datamodule and the device.
        """

    def _compute_all(self, states: list[Any], references: dict[str, Any], trainer: Any) -> Results:
        samples = type(states[0]).merge(states)
        return {name: {"all": self.compute(samples, real, trainer)} for name, real in references.items()}

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Discard earlier samples, including those of the sanity check."""
        self.state = self.new_state()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the state of a batch of samples."""
        self._require_outputs(outputs, pl_module, batch_idx)
        if self._is_inactive(trainer):
            return
        index, prediction = outputs["index"].cpu(), outputs["prediction"].detach()
        if self.max_samples is not None:
            used = index < self.max_samples
            index, prediction = index[used], prediction[used.to(prediction.device)]
        if len(index):
            with full_precision():
                self.state.store(index, self.update(prediction.float()))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Gather the samples of all ranks, compute the metrics, and log them."""
        if self._is_inactive(trainer):
            return
        states, reference_sets = gather(self.state, trainer.world_size), trainer.datamodule.reference_sets
        self.state = self.new_state()
        with full_precision():
            references = {name: self.prepare(real.pixels, trainer) for name, real in reference_sets.items()}
            self.results = on_rank_zero(lambda: self._compute_all(states, references, trainer), trainer.world_size)
        self._log_results(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    def _is_inactive(self, trainer: Any) -> bool:
        return trainer.sanity_checking or (trainer.state.fn != "test" and not self.on_validation)


def merge_sorted(parts_by_rank: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """Return the values of the parts (indices, values) of all ranks in the order of the indices, each index once."""
    parts = [part for rank in parts_by_rank for part in rank]
    _, first = np.unique(torch.cat([part[0] for part in parts]).numpy(), return_index=True)
    return torch.cat([part[1] for part in parts])[torch.from_numpy(first)]


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits, as in an image file: uint8 of the same shape."""
    return (images * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)
