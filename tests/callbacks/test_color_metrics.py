"""Metrics of colorized photographs against independent implementations."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from callbacks.metrics.color_metrics import MAX_ERROR, ColorMetrics
from datamodules.io.image_io import read_image
from datamodules.transforms.ab_bins import BINS
from datamodules.transforms.lab import rgb_to_lab
from modules.colorization_baselines import GrayColorization


@pytest.fixture
def outputs(photos):
    """Return the outputs of three photographs; the predictions are the colors with noise, and 8-bit images with other colors."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for path in [path for path in sorted(photos.iterdir()) if "camera" not in path.name][:3]:
        image = read_image(path)[None].double() / 255
        ab = rgb_to_lab(image)[:, 1:] + 30 * torch.randn(1, 2, *image.shape[-2:], generator=generator, dtype=torch.float64)
        prediction = (image + 0.1 * torch.randn(image.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
        results.append({"image": image, "prediction": prediction, "ab": ab})
    return results


def metrics_of(outputs):
    metric = ColorMetrics()
    return metric.compute([metric.update(output, 0) for output in outputs], None)


def pixels_of(image):
    return image[0].permute(1, 2, 0).numpy()


def test_auc_is_the_mean_over_pixels_with_the_weight_of_their_color(outputs):
    colors = np.concatenate([rgb2lab(pixels_of(output["image"]))[..., 1:].reshape(-1, 2) for output in outputs])
    predicted = np.concatenate([pixels_of(output["ab"]).reshape(-1, 2) for output in outputs])
    areas = np.clip(1 - np.linalg.norm(colors - predicted, axis=1) / 150, 0, None)
    bins = BINS.numpy()
    nearest = np.array([np.argmin(((bins - color) ** 2).sum(1)) for color in colors])
    frequencies = np.bincount(nearest, minlength=313) / len(nearest)
    smoothed = np.array([(frequencies * np.exp(-((bins - center) ** 2).sum(1) / (2 * 5**2))).sum() for center in bins])
    weights = 1 / smoothed[nearest]
    metrics = metrics_of(outputs)
    assert metrics["auc/raw"] == pytest.approx(100 * areas.mean(), rel=1e-5)
    assert metrics["auc/rebalanced"] == pytest.approx(100 * (weights * areas).sum() / weights.sum(), rel=1e-4)


def test_psnr_is_that_of_skimage(outputs):
    rgb, lab = [], []
    for output in outputs:
        target = pixels_of(output["image"])
        result = np.round(pixels_of(output["prediction"]) * 255) / 255
        rgb.append(peak_signal_noise_ratio(target, result, data_range=1))
        lab.append(peak_signal_noise_ratio(rgb2lab(target), rgb2lab(result), data_range=100))
    metrics = metrics_of(outputs)
    assert metrics["psnr-rgb"] == pytest.approx(np.mean(rgb), rel=1e-6)
    assert metrics["psnr-lab"] == pytest.approx(np.mean(lab), rel=1e-4)


def test_colorfulness_is_that_of_the_definition(outputs):
    """Hasler and Suesstrunk, 2003: sigma + 0.3 mu of rg = R - G and yb = (R + G) / 2 - B."""
    values = []
    for output in outputs:
        red, green, blue = np.round(255 * pixels_of(output["prediction"])).transpose(2, 0, 1)
        rg, yb = red - green, 0.5 * (red + green) - blue
        values.append(np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))
    metrics = metrics_of(outputs)
    assert metrics["colorfulness"] == pytest.approx(np.mean(values), rel=1e-6)
    gray = metrics_of([{**output, "prediction": output["prediction"][:, :1].expand(-1, 3, -1, -1)} for output in outputs])
    assert gray["colorfulness"] == pytest.approx(0, abs=1e-9)
    assert gray["colorfulness-real"] == pytest.approx(metrics["colorfulness-real"])


def test_gray_has_the_mean_distance_of_the_colors_from_gray(outputs):
    method = GrayColorization()
    batches = [{"image": output["image"], "name": ["a"], "dataset": ["b"]} for output in outputs]
    metrics = metrics_of([method.validation_step(batch, 0) for batch in batches])
    chroma = np.concatenate([np.hypot(*rgb2lab(pixels_of(output["image"]))[..., 1:].reshape(-1, 2).T) for output in outputs])
    assert metrics["auc/raw"] == pytest.approx(100 * (1 - chroma.mean() / MAX_ERROR), rel=1e-5)
    assert metrics["colorfulness"] < 0.5  # of 255; 8-bit gray has no color


def test_psnr_of_equal_images_is_limited():
    """A gray photograph has no colors to predict; infinity or rounding would dominate the mean."""
    image = torch.full((1, 3, 8, 8), 100 / 255)
    metrics = metrics_of([GrayColorization().validation_step({"image": image, "name": ["a"], "dataset": ["b"]}, 0)])
    assert metrics["psnr-rgb"] == metrics["psnr-lab"] == 100
