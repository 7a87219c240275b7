"""Evaluation by two ranks: rank 0 computes, and both have the results."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.metrics.base import ImageMetric, SampleSetMetric
from callbacks.metrics.ranks import gather, on_rank_zero
from datamodules.errors import UserError
from tests.helpers.subprocess_helpers import assert_on_two_ranks


def gathers_and_computes(rank: int) -> None:
    assert gather({"rank": rank}, 2) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
    assert on_rank_zero(lambda: f"from {rank}", 2) == "from 0"
    with pytest.raises(UserError, match=r"^data.test: 3 are too few$"):
        on_rank_zero(lambda: refuse(rank), 2)


def refuse(rank: int) -> None:
    assert rank == 0  # rank 1 does not call it
    raise UserError("data.test: 3 are too few")


def test_rank_zero_computes_and_errors_reach_all_ranks():
    assert_on_two_ranks(gathers_and_computes)


class Mean(ImageMetric):
    """Mean of the images; only rank 0 may compute it."""

    rank = 0

    def update(self, outputs: dict[str, Any], i: int) -> float:
        return outputs["image"][i].mean().item()

    def compute(self, states: list[float], trainer: Any) -> dict[str, float]:
        assert self.rank == 0
        return {"mean": sum(states) / len(states)}


class MeanOfSamples(SampleSetMetric):
    """Mean of the samples by position; only rank 0 may compute it."""

    rank = 0

    def update(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).mean(1)

    def compute(self, samples: torch.Tensor, real: torch.Tensor, trainer: Any) -> dict[str, float]:
        assert self.rank == 0
        return {"mean": (samples * torch.arange(len(samples))).sum().item()}


def evaluates_once(rank: int) -> None:
    """Rank 0 has the images 0, 2 and 4, rank 1 the images 1 and 3, and 4 again."""
    logged: dict[str, float] = {}
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="test"),
        sanity_checking=False,
        world_size=2,
        datamodule=SimpleNamespace(reference_sets={"real": SimpleNamespace(pixels=torch.zeros(1))}),
    )
    module = SimpleNamespace(log_dict=lambda values, sync_dist: logged.update(values))
    image_metric, sample_metric = Mean(), MeanOfSamples()
    for metric in (image_metric, sample_metric):
        metric.rank = rank
    for index in ([0, 2, 4], [1, 3, 4])[rank]:
        image = torch.full((1, 1, 2, 2), float(index))
        outputs = {
            "dataset": ["set"],
            "name": [f"{index}"],
            "image": image,
            "prediction": image,
            "index": torch.tensor([index]),
        }
        for metric in (image_metric, sample_metric):
            metric.on_test_batch_end(trainer, module, outputs, None, 0)
    for metric in (image_metric, sample_metric):
        metric.on_test_epoch_end(trainer, module)
    assert logged == {"set/mean": 2.0, "real/mean": 0 + 1 + 4 + 9 + 16}


def test_metrics_are_computed_once():
    assert_on_two_ranks(evaluates_once)
