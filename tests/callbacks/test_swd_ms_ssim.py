"""Compare the sliced Wasserstein distance and MS-SSIM with scipy, skimage and closed forms."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity
from torch.backends import cudnn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from callbacks.metrics import swd
from callbacks.metrics.ms_ssim import WEIGHTS, MultiScaleSSIM, ms_ssim, ssim
from datamodules.io.image_io import read_image
from datamodules.io.image_set import random_order


@pytest.fixture(scope="module")
def images(photos):
    """Return crops of photographs: uint8 (8, 3, 64, 64)."""
    crops = [read_image(path) for path in sorted(photos.iterdir())]
    return torch.stack([image.expand(3, -1, -1)[:, :64, :64] for image in crops])


def test_pyramid_levels_match_scipy(images):
    image = images[0, 0].double()
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    half_size = ndimage.convolve(image.numpy(), kernel, mode="mirror")[::2, ::2]
    upsampled = np.zeros((64, 64))
    upsampled[::2, ::2] = half_size
    expected = image.numpy() - ndimage.convolve(upsampled, 4 * kernel, mode="mirror")
    levels = swd.laplacian_pyramid(images[:1].double())
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    assert levels[0][0, 0].numpy() == pytest.approx(expected)


def test_pyramid_reconstructs_its_images(images):
    fine, middle, coarse = swd.laplacian_pyramid(images.double())
    assert torch.allclose(fine + swd.pyr_up(middle + swd.pyr_up(coarse)), images.double())


def test_distance_is_the_mean_of_scipy_distances_over_directions(images, monkeypatch):
    monkeypatch.setattr(swd, "DIRECTIONS", 3)
    generated, real = images[:4], images[4:]
    distances = swd.sliced_wasserstein(generated, real)
    generator = torch.Generator().manual_seed(0)
    patches = [swd.sample_patches(group, 64, generator) for group in (generated, real)]
    for side, distance in distances.items():
        a, b = (swd.normalize_patches(set_patches[side]).double() for set_patches in patches)
        directions = torch.randn(147, 3, generator=generator)
        directions = (directions / directions.norm(dim=0)).double()
        expected = np.mean([wasserstein_distance(a @ direction, b @ direction) for direction in directions.T])
        assert distance == pytest.approx(expected, rel=1e-4)


def test_patches_are_crops_of_their_images():
    images = torch.arange(2 * 16 * 16).view(2, 1, 16, 16).float()
    patches = swd.sample_patches(images, 64, torch.Generator().manual_seed(0))[16]
    assert patches.shape == (2 * 128, 1, 7, 7)
    corner = patches[:, :, :1, :1]
    offsets = 16 * torch.arange(7).view(7, 1) + torch.arange(7)
    assert torch.equal(patches, corner + offsets)
    assert (corner[:128] < 256).all()
    assert (corner[128:] >= 256).all()


def test_halves_of_a_set_are_closer_than_a_modified_set(images):
    shifted = torch.cat([images.roll(shift, dims=3) for shift in range(0, 32, 4)])
    split_half = swd.sliced_wasserstein(shifted[:32], shifted[32:])
    noise = torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 128
    modified = swd.sliced_wasserstein(shifted[:32], (shifted[32:].float() * 0.5 + noise).byte())
    assert all(split_half[side] < modified[side] for side in split_half)


def test_metric_names_its_count_and_compares_halves_of_the_real_images(images):
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    samples, real = images[:3], images[2:]
    values = swd.SlicedWasserstein(split_half=True).compute(samples, real, trainer)
    order = random_order(6)
    assert sorted(order.tolist()) == list(range(6))
    first, second = (real[items.sort().values] for items in order.split(3))
    for name, left, right in (("swd", samples, first), ("swd-split-half", first, second)):
        expected = swd.sliced_wasserstein(left, right)
        assert {side: values[f"{name}/{side}-3"] for side in expected} == {
            side: pytest.approx(1000 * distance) for side, distance in expected.items()
        }
        assert values[f"{name}/mean-3"] == pytest.approx(1000 * np.mean(list(expected.values())))
    assert swd.SlicedWasserstein().compute(samples, real, trainer).keys() == {
        name for name in values if name.startswith("swd/")
    }


def evaluate(metric, images):
    """Evaluate a metric on samples that arrive in any order."""
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        state=SimpleNamespace(fn="test"),
        sanity_checking=False,
        world_size=1,
        datamodule=SimpleNamespace(reference_sets={"set": SimpleNamespace(pixels=images)}),
    )
    module = SimpleNamespace(images_seen=0, log_dict=lambda *args, **kwargs: None)
    for index in ([5, 2], [0, 7], [1, 3], [6, 4]):
        outputs = {"index": torch.tensor(index), "prediction": images[index].float() / 255}
        metric.on_test_batch_end(trainer, module, outputs, None, 1)
    metric.on_test_epoch_end(trainer, module)
    return metric.results["set"]["all"]


def test_metric_is_computed_in_full_precision(images, monkeypatch):
    """Neither autocast nor TF32, the default of torch in convolutions on a GPU, changes the metric."""
    allowed = []
    monkeypatch.setattr(swd, "pyr_down", lambda batch, fn=swd.pyr_down: allowed.append(cudnn.allow_tf32) or fn(batch))
    expected = evaluate(swd.SlicedWasserstein(), images)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(swd.SlicedWasserstein(), images) == expected
    assert set(allowed) == {False}
    assert cudnn.allow_tf32  # afterwards


def test_metric_flips_every_second_real_image(images):
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    flipped = images.clone()
    flipped[1::2] = flipped[1::2].flip(3)
    values = swd.SlicedWasserstein(flip_real=True).compute(flipped, images, trainer)
    assert values["swd/mean-8"] == swd.SlicedWasserstein().compute(flipped, flipped, trainer)["swd/mean-8"]


@pytest.mark.parametrize("metric", [swd.SlicedWasserstein(images=4), MultiScaleSSIM(pairs=2)])
def test_metric_uses_at_most_its_number_of_samples(images, metric):
    """Those with the smallest indices are used."""
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    values = evaluate(metric, images)
    assert values == metric.compute(images[:4], images, trainer)
    assert all(name.endswith(("-4", "/2-pairs")) for name in values)


def test_ssim_at_one_scale_matches_skimage(images):
    mean, _ = ssim(images[:1].double(), images[1:2].double())
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    x, y = (image.permute(1, 2, 0).numpy() for image in images[:2])
    _, full = structural_similarity(x, y, channel_axis=2, full=True, **settings)
    assert mean.item() == pytest.approx(full[5:-5, 5:-5].mean(), rel=1e-6)


def test_ms_ssim_matches_a_direct_computation(images):
    """The reference uses scipy's two-dimensional convolutions."""
    x, y = (image.permute(1, 2, 0).double().numpy() for image in images[:2])
    expected = 1.0
    for i, weight in enumerate(WEIGHTS):
        size = min(11, x.shape[0])
        positions = np.arange(size) - (size - 1) / 2
        kernel = np.exp(-(positions[:, None] ** 2 + positions**2) / (2 * (1.5 * size / 11) ** 2))[..., None]
        kernel /= kernel.sum()
        mean = partial(signal.fftconvolve, in2=kernel, mode="valid")
        mx, my = mean(x), mean(y)
        contrast = (2 * (mean(x * y) - mx * my) + 58.5225) / (mean(x * x) - mx**2 + mean(y * y) - my**2 + 58.5225)
        luminance = (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025)
        expected *= max(0, (contrast * (luminance if i == 4 else 1)).mean()) ** weight
        x, y = (image.reshape(image.shape[0] // 2, 2, -1, 2, 3).mean((1, 3)) for image in (x, y))
    assert ms_ssim(images[:1], images[1:2]).item() == pytest.approx(expected, rel=1e-6)


def test_ms_ssim_is_close_to_torchmetrics_despite_different_borders(photos):
    x, y = (read_image(path).expand(3, -1, -1)[None, :, :88, :88].float() for path in sorted(photos.iterdir())[4:6])
    x, y = (torch.nn.functional.interpolate(image, (192, 192), mode="bilinear").round() for image in (x, y))
    reference = multiscale_structural_similarity_index_measure(x, y, data_range=255.0, normalize="relu")
    assert ms_ssim(x, y).item() == pytest.approx(reference.item(), abs=0.02)


def test_ms_ssim_of_identical_images_is_1(images):
    assert ms_ssim(images, images).tolist() == pytest.approx([1.0] * 8)
