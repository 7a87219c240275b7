"""CIE Lab (D65 white point, 2 degree observer), as in scikit-image's rgb2lab and lab2rgb, on batches of images.

The computation is in float64: in float32, a and b would have errors above 1e-4.
"""

from functools import cache

import torch
from torch import Tensor

# Linear sRGB in [0, 1] to XYZ (IEC 61966-2-1), and the white point (ASTM E308).
_XYZ = torch.tensor(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ],
    dtype=torch.float64,
)
_WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
_THRESHOLD, _SLOPE = 0.2068966, 7.787  # of the curve, which is linear below the threshold; rounded as in scikit-image
GAMUT_STEPS = 12  # of the bisection in `fit_gamut`
TOLERANCE = 1e-6  # of linear RGB outside of [0, 1]


@cache
def _rgb_to_xyz(device: torch.device) -> Tensor:
    return (_XYZ / _WHITE[:, None]).to(device)


@cache
def _xyz_to_rgb(device: torch.device) -> Tensor:
    return (torch.linalg.inv(_XYZ) * _WHITE).to(device)


def rgb_to_lab(image: Tensor) -> Tensor:
    """Convert RGB (..., 3, H, W) in [0, 1] to Lab of the same shape: L in [0, 100], a and b about -110 ... 110."""
    rgb = image.double()
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("ij,...jhw->...ihw", _rgb_to_xyz(image.device), linear)
    curve = torch.where(xyz > 0.008856, xyz.clamp(min=0) ** (1 / 3), _SLOPE * xyz + 16 / 116)
    x, y, z = curve.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3).to(image.dtype)


def lab_to_linear_rgb(lab: Tensor) -> Tensor:
    """Convert Lab (..., 3, H, W) to linear RGB, float64, which is outside of [0, 1] for colors outside of sRGB."""
    lightness, a, b = lab.double().unbind(-3)
    y = (lightness + 16) / 116
    curve = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], dim=-3)
    xyz = torch.where(curve > _THRESHOLD, curve**3, (curve - 16 / 116) / _SLOPE)
    return torch.einsum("ij,...jhw->...ihw", _xyz_to_rgb(lab.device), xyz)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Convert Lab (..., 3, H, W) to RGB in [0, 1]; each channel of colors outside of sRGB is clipped."""
    linear = lab_to_linear_rgb(lab).clamp(0, 1)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.to(lab.dtype)


def fit_gamut(lab: Tensor) -> Tensor:
    """Reduce a and b of colors outside of sRGB by a common factor, so that they are inside; L and the hue do not change.

    Args:
        lab: (..., 3, H, W).

    Returns:
        Lab of the same shape. Clipping of the channels in `lab_to_rgb` would change L as well.
    """
    lightness, ab = lab.split([1, 2], dim=-3)
    low, high = torch.zeros_like(lightness), torch.ones_like(lightness)  # gray is inside

    def inside(factor: Tensor) -> Tensor:
        linear = lab_to_linear_rgb(torch.cat([lightness, factor * ab], dim=-3))
        return ((linear >= -TOLERANCE) & (linear <= 1 + TOLERANCE)).all(dim=-3, keepdim=True)

    unchanged = inside(high)
    for _ in range(GAMUT_STEPS):
        middle = (low + high) / 2
        is_inside = inside(middle)
        low, high = torch.where(is_inside, middle, low), torch.where(is_inside, high, middle)
    return torch.cat([lightness, torch.where(unchanged, ab, low * ab)], dim=-3)
