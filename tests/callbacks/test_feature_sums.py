"""Compare the sums of features with numpy and torch-fidelity on all features, and two ranks with one process."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from callbacks.metrics.feature_sums import FeatureSums, frechet_distance_of_statistics
from callbacks.metrics.fid_kid_is import FeatureMetrics
from callbacks.metrics.ranks import gather
from callbacks.metrics.translation_fid import TranslationFID
from datamodules.errors import UserError
from tests.helpers.subprocess_helpers import assert_on_two_ranks

WIDTH = 48  # features


def features(count: int, seed: int = 0) -> torch.Tensor:
    """Return correlated features like those of a network after ReLU, some of which are constant: float32 (count, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / torch.arange(1, WIDTH + 1)
    values = (torch.randn(count, WIDTH, generator=generator) @ mixing + 0.1 * seed).relu()
    values[:, :2] = torch.tensor([0.0, 0.3])
    return values


def sums(values: torch.Tensor, start: int = 0, batch_size: int = 7) -> FeatureSums:
    """Return the sums of features whose indices begin at `start`."""
    result = FeatureSums()
    for indices in torch.arange(len(values)).split(batch_size):
        result.store(indices + start, values[indices])
    return result


def reference(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Return torch-fidelity's distance for all features in float64."""
    statistics = [fid_features_to_statistics(values.double()) for values in (samples, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("count", [2, WIDTH, WIDTH + 1, 10 * WIDTH + 5])
def test_statistics_match_numpy(count):
    """Sums of x x^T about the origin would have errors of about 1e-16 * (mean / standard deviation)^2 = 1e-10."""
    values = (1000 + torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))).float()
    statistics = sums(values).statistics()
    assert statistics["mu"] == pytest.approx(values.double().numpy().mean(0), rel=1e-14)
    assert statistics["sigma"] == pytest.approx(np.cov(values.double().numpy(), rowvar=False), rel=1e-12, abs=1e-13)
    assert np.array_equal(statistics["sigma"], statistics["sigma"].T)


def exact(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Return the distance from the features, without covariances: the roots are singular values of a product of features."""
    samples, real = samples.double(), real.double()
    difference = samples.mean(0) - real.mean(0)
    left, right = ((values - values.mean(0)) / (len(values) - 1) ** 0.5 for values in (samples, real))
    roots = torch.linalg.svdvals(left @ right.T)
    return (difference.square().sum() + left.square().sum() + right.square().sum() - 2 * roots.sum()).item()


@pytest.mark.parametrize("real_count", [20, 700])
@pytest.mark.parametrize("count", [2, 12, WIDTH - 1, WIDTH + 2, 500])
def test_distance_matches_torch_fidelity(count, real_count):
    samples, real = features(count), features(real_count, seed=1)
    distance = frechet_distance_of_statistics(sums(samples).statistics(), sums(real).statistics())
    assert distance == pytest.approx(reference(samples, real), rel=1e-6)
    assert distance == pytest.approx(exact(samples, real), rel=1e-9)


@pytest.mark.parametrize("count", [30, 600])
def test_distance_is_exact_if_covariances_are_nearly_singular(count):
    """The variances of independent directions decrease to 1e-14 of the largest, less than rounding errors resolve."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)).Q
    scaled = rotation * 0.7 ** torch.arange(WIDTH)[:, None]
    samples, real = (
        (factor * torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) @ scaled).float()
        for factor, n in ((1, count), (1.2, 700))
    )
    distance = frechet_distance_of_statistics(sums(samples).statistics(), sums(real).statistics())
    assert distance == pytest.approx(exact(samples, real), rel=1e-9)
    assert distance == pytest.approx(reference(samples, real), rel=1e-5)


def test_size_does_not_depend_on_the_number_of_samples():
    """A rank sends one triangle of the matrix, the mean, and the indices of the samples."""
    sent = {count: len(pickle.dumps(sums(features(count)))) for count in (WIDTH, 20 * WIDTH, 40 * WIDTH)}
    assert sent[40 * WIDTH] - sent[20 * WIDTH] < 20 * WIDTH * 8
    assert sent[20 * WIDTH] < WIDTH * (WIDTH + 3) / 2 * 8 + 20 * WIDTH * 8 + 1000
    assert sent[WIDTH] < 2 * WIDTH * WIDTH * 4 + 10_000  # few samples: their features


@pytest.mark.parametrize("count", [0, 1])
def test_covariance_of_less_than_two_samples_is_refused(count):
    sums = FeatureSums()
    sums.store(torch.arange(count), torch.ones(count, 8))
    with pytest.raises(UserError, match=f"FID: {count} images, but a covariance needs at least two"):
        sums.statistics()


def test_samples_count_once():
    values, real = features(4 * WIDTH), sums(features(700, seed=1)).statistics()
    expected = sums(values)
    repeated = sums(values)
    repeated.store(torch.arange(5), values[:5])
    rank_with_a_copy = sums(values[:100])  # in the sums
    few_copies = sums(values[30:35], start=30)
    distance = exact(values, features(700, seed=1))
    for parts in ([repeated], [expected, rank_with_a_copy], [few_copies, expected, FeatureSums()]):
        merged = FeatureSums.merge(parts)
        assert len(merged.seen) == len(values)
        assert frechet_distance_of_statistics(merged.statistics(), real) == pytest.approx(distance, rel=1e-9)
    with pytest.raises(UserError, match=r"^FID: two processes evaluated sample 80, and each also others"):
        FeatureSums.merge([sums(values[:100]), sums(values[80:], start=80)])


class Pixels:
    """Network whose features are the pixels."""

    name = "pixels"

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": images.float().flatten(1) / 255, "logits": images.float().flatten(1)[:, :3]}


def images(count: int, seed: int) -> torch.Tensor:
    """Return uint8 images (count, 1, 6, 8) whose pixels are correlated."""
    return (features(count, seed).clamp(0, 1) * 255).byte().view(-1, 1, 6, 8)


# Samples of both ranks: many; few; on one rank only; the same on both
INDICES_BY_CASE = {
    "many": [range(0, 400, 2), range(1, 400, 2)],
    "fewer than features": [range(0, 30, 2), range(1, 30, 2)],
    "one rank without samples": [range(300), range(0)],
    "copies on one rank": [range(300), range(100)],
    "a copy of the only sample batch": [range(9), range(9)],
}


def evaluates_fid_on_two_ranks(rank: int) -> None:
    """The real images are split into batches of 100 by `FeatureMetrics`."""
    one_process = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True)
    two_ranks = SimpleNamespace(world_size=2, global_rank=rank, is_global_zero=rank == 0)
    for i, indices in enumerate(INDICES_BY_CASE.values()):
        real, results = images(650, seed=i + 1), []
        for trainer, own in ((one_process, [*indices[0], *indices[1]]), (two_ranks, indices[rank])):
            metric = FeatureMetrics(["fid"])
            metric.network, metric.extractor_id = Pixels(), f"{rank} {trainer.world_size}"
            trainer.state, trainer.sanity_checking = SimpleNamespace(fn="test"), False
            trainer.datamodule = SimpleNamespace(reference_sets={"real": SimpleNamespace(pixels=real)})
            trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
            module = SimpleNamespace(log_dict=lambda values, sync_dist: None)
            for batch_idx, batch in enumerate(torch.tensor(own, dtype=torch.int64).split(50)):
                outputs = {"prediction": images(400, seed=0)[batch] / 255, "index": batch}
                metric.on_test_batch_end(trainer, module, outputs, None, batch_idx)
            metric.on_test_epoch_end(trainer, module)
            results.append(metric.results["real"]["all"])
        assert results[0].keys() == results[1].keys() == {f"fid/pixels-{len({*indices[0], *indices[1]})}"}
        assert [*results[1].values()] == pytest.approx([*results[0].values()], rel=1e-9)


def test_two_ranks_compute_the_fid_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    assert_on_two_ranks(evaluates_fid_on_two_ranks)
    assert {path.stem.rpartition("-")[2] for path in (tmp_path / "cache").iterdir()} == {"statistics"}


def evaluates_translations_on_two_ranks(rank: int) -> None:
    """Rank 0 has the translations to B, and rank 1 those to A and the first one to B again."""
    generator = torch.Generator().manual_seed(0)
    pairs = {name: torch.rand(2, 3, 4, 4, generator=generator) for name in (f"{i}" for i in range(120))}
    metrics = [TranslationFID(), TranslationFID()]
    for metric in metrics:
        metric.features.network = Pixels()
    for name, pair in pairs.items():
        direction = "AtoB" if int(name) % 2 else "BtoA"
        outputs = {"image": pair[:1], "prediction": pair[1:], "direction": [direction]}
        metrics[0].store("set", name, metrics[0].update(outputs, 0))
        if (direction == "AtoB") == (rank == 0) or name == "1":
            metrics[1].store("set", name, metrics[1].update(outputs, 0))
    gathered = gather(metrics[1].state, 2)
    if rank == 0:
        expected, found = (
            metric.compute_images(metric.merge(states)["set"], None)["all"]
            for metric, states in zip(metrics, ([metrics[0].state], gathered), strict=True)
        )
        assert expected.keys() == found.keys() == {"fid/pixels-AtoB-60", "fid/pixels-BtoA-60"}
        assert found == pytest.approx(expected, rel=1e-9)


def test_two_ranks_compute_the_translation_fid_of_one_process():
    assert_on_two_ranks(evaluates_translations_on_two_ranks)
