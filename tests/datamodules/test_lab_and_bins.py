"""Lab and the bins of colors against scikit-image, the authors' file and full searches."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.color import lab2rgb, rgb2lab

from datamodules.transforms.ab_bins import BINS, annealed_mean, nearest_bins, rebalancing_weights, smooth, soft_encode
from datamodules.transforms.lab import fit_gamut, lab_to_rgb, rgb_to_lab

BINS_HASH = "2a39983ed60d5b52b717842d56d5f766982289e6d5a609582155f437cecc1045"  # int64, row by row


# Lab


def test_lab_matches_skimage():
    image = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    image[0, :, :10] *= 0.02  # the linear parts of both curves
    lab = rgb_to_lab(image)
    assert lab.permute(0, 2, 3, 1).numpy() == pytest.approx(rgb2lab(image.permute(0, 2, 3, 1).double().numpy()), abs=1e-4)
    assert torch.allclose(lab_to_rgb(lab), image, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*negative Z values")
def test_colors_outside_of_srgb_are_clipped_as_in_skimage_or_reduced_to_its_border():
    generator = torch.Generator().manual_seed(0)
    lab = torch.rand(3, 60, 60, generator=generator, dtype=torch.float64) * torch.tensor([100, 220, 220]).view(3, 1, 1)
    lab[1:] -= 110
    assert lab_to_rgb(lab).permute(1, 2, 0).numpy() == pytest.approx(lab2rgb(lab.permute(1, 2, 0).numpy()), abs=1e-6)
    fitted = fit_gamut(lab)
    back = rgb_to_lab(lab_to_rgb(fitted))
    assert torch.allclose(back[0], lab[0], atol=0.01)  # L does not change
    assert torch.allclose(fitted[1] * lab[2], fitted[2] * lab[1], atol=1e-9)  # nor the hue
    assert ((fitted[1:] * lab[1:]).sum(0) >= 0).all()
    inside = (lab_to_rgb(lab) - lab_to_rgb(fitted)).abs().amax(0) < 1e-6
    assert 0.05 < inside.double().mean() < 0.9
    assert torch.equal(fitted[:, inside], lab[:, inside])


# Bins


def test_bins_are_those_of_the_authors():
    """The hash is that of the array in the authors' pts_in_hull.npy; with DARKROOM_DATA, the file is compared as well."""
    assert BINS.shape == (313, 2)
    assert hashlib.sha256(BINS.to(torch.int64).numpy().tobytes()).hexdigest() == BINS_HASH
    _, counts = BINS[:, 0].unique(return_counts=True)
    assert counts.tolist() == [5, 8, 10, 12, 14, 15, 16, 16, 17, 18, 18, 18, 19, 20, 19, 20, 20, 19, 19, 10]
    file = Path(os.environ.get("DARKROOM_DATA", ""), "colorization/pts_in_hull.npy")
    if file.exists():
        assert np.array_equal(np.load(file), BINS.numpy())


@pytest.mark.parametrize("count", [1, 5, 10])
def test_nearest_bins_are_those_of_a_full_search(count):
    ab = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0)) * 240 - 120
    indices, distances = nearest_bins(ab, count)
    expected = (ab[:, None].double() - BINS.double()).square().sum(-1).topk(count, largest=False).values
    assert torch.allclose(distances.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose((ab[:, None] - BINS[indices]).square().sum(-1), distances, rtol=1e-4, atol=1e-3)


def test_soft_encoding_and_its_mean_return_the_color():
    """The annealed mean at T = 1 of the soft encoding of 10 bins is near the color."""
    ab = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 60 - 30  # far from the border of the bins
    bins, weights = soft_encode(ab, 10)
    assert torch.allclose(weights.sum(1), torch.ones(2000))
    logits = torch.full((2000, 313), -1e4).scatter(1, bins, weights.log())
    decoded = annealed_mean(logits[:, :, None, None], 1.0)[..., 0, 0]
    assert (decoded - ab).norm(dim=1).max() < 2.5  # a quarter of the spacing
    mode = annealed_mean(logits[:, :, None, None], 1e-3)[..., 0, 0]
    clear = weights[:, 0] > weights[:, 1] + 0.05
    assert torch.allclose(mode[clear], BINS[bins[clear, 0]], atol=1e-3)
    assert torch.allclose(annealed_mean(logits[:, :, None, None], 1e-40)[clear, :, 0, 0], BINS[bins[clear, 0]], atol=1e-3)


def test_weights_of_colors_have_an_expectation_of_one():
    counts = torch.zeros(313, dtype=torch.float64)
    center = int((BINS.abs().sum(1) == 0).nonzero())
    counts[center] = 90
    counts[0] = 10
    distribution = smooth(counts)
    expected = sum(
        share * np.exp(-((BINS[:, 0] - BINS[bin_, 0]) ** 2 + (BINS[:, 1] - BINS[bin_, 1]) ** 2).numpy() / 50)
        for share, bin_ in ((0.9, center), (0.1, 0))
    )
    assert distribution.numpy() == pytest.approx(expected / expected.sum(), rel=1e-5)
    for uniform_weight in (0.0, 0.5, 1.0):
        weights = rebalancing_weights(distribution, uniform_weight)
        assert weights.isfinite().all()
        assert float((distribution * weights).sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(rebalancing_weights(distribution, 1.0), torch.ones(313, dtype=torch.float64))
    half = rebalancing_weights(distribution, 0.5)
    assert float(half[0] / half[center]) == pytest.approx(
        float((distribution[center] + 1 / 313) / (distribution[0] + 1 / 313)), rel=1e-6
    )
