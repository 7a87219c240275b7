"""Colorful image colorization: colors as classes, with rebalanced frequencies.

R. Zhang, P. Isola, A. A. Efros. Colorful Image Colorization. ECCV 2016. arXiv:1603.08511.

Paper and released code (richzhang/colorization, branch caffe) differ. Each of these differences is an argument:

1. The soft encoding has 5 bins in the paper and 10 in the code (`neighbors`).
2. The code gives images without colors the weight zero (`mask_gray`).
3. The learning rate falls to 1/3 and 1/10 in the paper, and at other steps to 1/10 and 1/100 in the code
   (`learning_rate_steps`).
4. The temperature is 0.38 in the paper, 0.384 in the Caffe code and 1 in the authors' PyTorch code (`temperature`).

Differences from both, with reasons:

1. The input is L - 50 in Caffe, and a hundredth of it here and in the authors' PyTorch code, for which the weights exist.
2. The weights start with He's initialization. The authors compute them from images (Kraehenbuehl et al.).
3. The frequencies of the colors are those of the training photographs. The files that circulate are those of ImageNet, and one
   of them does not match the order of the bins.
4. The running statistics of batch normalization have torch's momentum; Caffe averages over about 1,000 batches.
5. The output of the regression is a and b over 110, as in the authors' PyTorch code.
6. Training crops come from photographs whose shorter side has 256 pixels. The authors distort them to 256 x 256 pixels.
7. Evaluation crops are the central squares of 256 pixels, and `predict` computes colors at this shorter side.
8. The uniform distribution of eq. 4 is over all bins, in the authors' code over those with a frequency above zero.
"""

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.io.paths import file_hash, find_file
from datamodules.transforms.ab_bins import BINS, annealed_mean, nearest_bins, rebalancing_weights, smooth, soft_encode
from datamodules.transforms.lab import rgb_to_lab
from modules.losses.precision import full_precision, to_float32
from modules.networks.pretrained import find_or_download
from modules.networks.weights import check_shapes, read_weights
from modules.tasks.colorization import ColorizationMethod
from modules.training.method import Batch
from modules.training.schedules import step_schedule
from modules.training.stages import Stage

RELEASED_URL = "https://colorizers.s3.us-east-2.amazonaws.com/colorization_release_v2-9b330a0b.pth"
AB_SCALE = 110.0  # the output of the regression is in units of it
TARGET_STRIDE = 4  # the output has a quarter of the resolution
GRAY_LIMIT = 5.0  # images whose a and b are nowhere larger are gray


class ColorfulColorization(ColorizationMethod):
    """Section 2: classification of the color of each pixel, and the annealed mean of its distribution.

    Args:
        loss: "classification", or "regression" of a and b with the squared error ("Ours (L2)").
        uniform_weight: lambda of eq. 4; with 1, all colors have the same weight ("Ours (class)").
        frequency_images: photographs from which the frequencies of colors are computed and in which gray ones are counted, a
            random subset; null for all.
        neighbors: bins of the soft encoding; 5 in the paper, 10 in the code.
        temperature: T of eq. 5.
        mask_gray: give crops without colors the weight zero.
        base_channels: width of the network; 64 in the paper.
        affine: scales and shifts in batch normalization, as in the authors' PyTorch code.
        initial_weights: checkpoint or weights file of a network from which the training starts, see `find_file` and
            `load_network` ("Ours (L2, ft)"); null for random weights.
        released: use the authors' weights, converted by them from Caffe to PyTorch, if there is no training; see
            `rename_weights`. They require `affine`.
        weight_decay: of Adam.
        learning_rate_steps: learning rate after a number of images; null for a half cosine to zero.
        total_images: training budget; 18,000,000 in the paper.
        learning_rate: Adam learning rate at the start.
        seed: seed of the training.
    """

    training_only_modules = ("frequencies",)

    def __init__(
        self,
        loss: Literal["classification", "regression"] = "classification",
        uniform_weight: float = 0.5,
        frequency_images: PositiveInt | None = None,
        neighbors: PositiveInt = 5,
        temperature: PositiveFloat = 0.38,
        mask_gray: bool = False,
        base_channels: PositiveInt = 64,
        affine: bool = False,
        initial_weights: str | None = None,
        released: bool = False,
        weight_decay: NonNegativeFloat = 1e-3,
        learning_rate_steps: dict[int, PositiveFloat] | None = None,
        total_images: int = 18_000_000,
        learning_rate: PositiveFloat = 3e-5,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, learning_rate, seed)
        self.save_hyperparameters()
        if not 0 < uniform_weight <= 1:  # with 0, absent colors would have infinite weights
            raise UserError(f"model.uniform_weight: {uniform_weight} is not in (0, 1]. Use 0.5, as in the paper")
        if neighbors > len(BINS):
            raise UserError(f"model.neighbors: {neighbors} is more than the {len(BINS)} bins. Use 5 or 10")
        self.is_classification = loss == "classification"
        self.uniform_weight, self.frequency_images, self.neighbors = uniform_weight, frequency_images, neighbors
        self.temperature, self.mask_gray, self.weight_decay = temperature, mask_gray, weight_decay
        self.initial_weights, self.is_released = initial_weights, released
        self.initial_hash = ""  # sha256 of the initial weights
        self.learning_rate_steps = dict(sorted((learning_rate_steps or {}).items()))
        self.network = colorization_network(base_channels, len(BINS) if self.is_classification else 2, affine)
        self.frequencies = ColorFrequencies()

    # Network (Figure 2 and its table in the supplement)

    def forward(self, lightness: Tensor) -> Tensor:
        """Compute the logits of the bins, or a and b over 110, from L (N, 1, H, W) in [0, 100]: (N, 313 or 2, H / 4, W / 4)."""
        return self.network(scale_lightness(lightness))

    # Sections 2.1 and 2.2: objective

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the cross entropy with the soft encoding (eq. 2), or the squared error of a and b (eq. 1).

        Both are sums over the pixels of the output, and means over the images.
        """
        lightness, ab = rgb_to_lab(batch["image"]).split([1, 2], dim=1)
        output = to_float32(self(lightness))
        target = ab[..., ::TARGET_STRIDE, ::TARGET_STRIDE]  # (N, 2, h, w)
        if self.is_classification:
            loss = self.cross_entropy(output, target)
        else:
            loss = (AB_SCALE * output - target).square().sum(1) / 2  # (N, h, w)
        if self.mask_gray:
            loss = loss * is_colored(target)[:, None, None]
        return {"cross_entropy" if self.is_classification else "squared_error": loss.sum((1, 2)).mean()}

    def cross_entropy(self, logits: Tensor, ab: Tensor) -> Tensor:
        """Compute the weighted cross entropy of each pixel, (N, h, w), from logits (N, 313, h, w) and colors (N, 2, h, w)."""
        bins, weights = soft_encode(ab.permute(0, 2, 3, 1).flatten(0, 2), self.neighbors)  # (N h w, neighbors)
        shape = (*ab[:, 0].shape, self.neighbors)
        bins, weights = (values.view(shape).permute(0, 3, 1, 2) for values in (bins, weights))  # (N, neighbors, h, w)
        entropy = torch.logsumexp(logits, dim=1) - (weights * logits.gather(1, bins)).sum(1)
        return self.frequencies.weights[bins[:, 0]] * entropy

    def inspect_data(self, data: Any) -> None:
        """Compute the weights of the colors from the training photographs (eq. 4), in a new run.

        Raises:
            UserError: the frequencies in the checkpoint of a resumed run are those of other photographs.
        """
        name, fingerprint = data.train_fingerprint()
        if not self.frequencies.fingerprint:
            numbers = data.photograph_subset(self.frequency_images)
            rank, world_size = data.rank_and_world_size
            counts, gray = count_all_colors(data.training_photograph, numbers[rank::world_size])
            if world_size > 1:
                totals = torch.cat([counts, torch.tensor([gray])]).to(self.device)
                dist.all_reduce(totals)
                counts, gray = totals[:-1].cpu(), int(totals[-1])
            self.frequencies.fit(counts, self.uniform_weight)
            self.frequencies.fingerprint.fill_(int(fingerprint, 16))
            if gray and not rank:
                excluded = "their crops are excluded from the loss"
                advice = excluded if self.mask_gray else "--model.mask_gray true excludes their crops from the loss"
                print(f"{name}: {gray} of {len(numbers)} photographs are gray; {advice}")
        if (saved := f"{int(self.frequencies.fingerprint):012x}") != fingerprint:
            raise UserError(
                f"data.train: the run was started with the color frequencies of other photographs ({saved}) than those of "
                f"{name} ({fingerprint}). Restore them, or start a new run"
            )

    # Section 2.3: from class probabilities to colors

    def predict_ab(self, lightness: Tensor, batch: Batch) -> Tensor:
        """Predict the annealed mean of the color distributions, enlarged by bilinear interpolation."""
        output = to_float32(self(lightness.to(self.dtype)))
        with full_precision():
            ab = annealed_mean(output, self.temperature) if self.is_classification else output * AB_SCALE
            return F.interpolate(ab, scale_factor=TARGET_STRIDE, mode="bilinear")

    # Weights of the authors

    def authors_weights(self) -> Path | None:
        """Return the authors' weights, downloaded if they are missing; None unless `released` is set.

        Raises:
            UserError: the download failed.
        """
        return find_or_download("the authors' network", RELEASED_URL, None) if self.is_released else None

    def rename_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of the authors' PyTorch code; return others unchanged."""
        return rename_authors_weights(weights)

    # Section 3.1: training

    def setup(self, stage: str) -> None:
        """Load the initial weights before training.

        Raises:
            UserError: the file is missing, or belongs to another network.
        """
        super().setup(stage)
        if stage == "fit" and self.initial_weights is not None:
            path = find_file(self.initial_weights, "model.initial_weights")
            load_network(self.network, path)
            self.initial_hash = file_hash(path)

    def file_hashes(self) -> dict[str, str]:
        """Return the hash of the initial weights."""
        return {**super().file_hashes(), **({"initial weights": self.initial_hash} if self.initial_weights else {})}

    def configure_optimizers(self) -> Any:
        """Create Adam."""
        return torch.optim.Adam(
            self.network.parameters(), self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate: the last step of `learning_rate_steps`, or a half cosine to zero."""
        if not self.learning_rate_steps:
            return super().schedule(images_seen)
        return step_schedule(self.learning_rate, self.learning_rate_steps, images_seen)

    def stages(self) -> list[Stage]:
        """Return a stage for each learning rate."""
        return [Stage(), *(Stage(start) for start in self.learning_rate_steps)]


def scale_lightness(lightness: Tensor) -> Tensor:
    """Scale L in [0, 100] to the input of the network, in [-0.5, 0.5]."""
    return (lightness - 50) / 100


def colorization_network(width: int, outputs: int, affine: bool) -> nn.Sequential:
    """Build the network: eight blocks of convolutions, of which the fifth and the sixth are dilated.

    Args:
        width: channels of the first block; 64 in the paper.
        outputs: output channels.
        affine: scales and shifts in batch normalization.
    """
    widths = [1, width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width, 8 * width]
    strides = [2, 2, 2, 1, 1, 1, 1]  # of the last convolution
    counts = [2, 2, 3, 3, 3, 3, 3]  # of convolutions
    blocks = [
        block(before, after, count, stride, 2 if number in (5, 6) else 1, affine)
        for number, ((before, after), count, stride) in enumerate(zip(pairwise(widths), counts, strides, strict=True), start=1)
    ]
    last = 4 * width
    enlarge = nn.Sequential(nn.ConvTranspose2d(8 * width, last, 4, stride=2, padding=1), nn.ReLU(inplace=True))
    for _ in range(2):
        enlarge.extend([nn.Conv2d(last, last, 3, padding=1), nn.ReLU(inplace=True)])
    network = nn.Sequential(*blocks, enlarge, nn.Conv2d(last, outputs, 1))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fan_in = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.weight.shape[0] * 4  # 2 x 2 of 4 x 4
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_in))
    for name, values in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(values)
    return network


def load_network(network: nn.Sequential, path: Path) -> None:
    """Load the network of a colorization method from a checkpoint or weights file, or its first blocks.

    Args:
        network: network of `colorization_network`, or its first blocks. The last convolution keeps its weights if the file has
            another number of outputs, such as that of a regression.
        path: see `read_weights`.

    Raises:
        UserError: the file belongs to another network; the message names the first difference.
    """
    weights = {
        name.removeprefix("network."): value
        for name, value in rename_authors_weights(read_weights(path)).items()
        if name.startswith("network.")
    }
    expected = network.state_dict()
    last = {name: value for name, value in expected.items() if name.startswith("8.")}
    if any(name in weights and weights[name].shape != value.shape for name, value in last.items()):
        weights |= last
    later_blocks = tuple(f"{number}." for number in range(len(network), 9))
    weights = {name: value for name, value in weights.items() if not name.startswith(later_blocks)}
    check_shapes(path, weights, expected)
    network.load_state_dict(weights)


def rename_authors_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the authors' PyTorch code, where the blocks are model1 ... model8; return others unchanged."""
    if "model1.0.weight" not in weights:
        return weights
    renamed = {}
    for name, value in weights.items():
        if name == "model_out.weight":  # the bins, which are constant
            continue
        name = re.sub(r"^model8\.6\.", "network.8.", name)  # the last convolution
        renamed[re.sub(r"^model([1-8])\.", lambda match: f"network.{int(match[1]) - 1}.", name)] = value
    for name in [name for name in renamed if name.endswith(".running_mean")]:  # old files have no counters
        renamed.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return renamed


def block(before: int, after: int, count: int, stride: int, dilation: int, affine: bool) -> nn.Sequential:
    """Build 3 x 3 convolutions, each followed by ReLU, and batch normalization at the end."""
    layers = nn.Sequential()
    for number in range(count):
        step = stride if number == count - 1 else 1
        layers.append(nn.Conv2d(before if number == 0 else after, after, 3, step, dilation, dilation))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.BatchNorm2d(after, affine=affine))
    return layers


def is_colored(ab: Tensor) -> Tensor:
    """Return whether a or b of any pixel of an image is larger than `GRAY_LIMIT`: (N, 2, H, W) to (N,)."""
    return (ab.abs() > GRAY_LIMIT).flatten(1).any(1)


class ColorFrequencies(nn.Module):
    """Frequencies of the colors in the training photographs, and the weights of the bins (eq. 4), as buffers.

    Attributes:
        weights: (313,).
        fingerprint: first digits of the fingerprint of the photographs, as a number.
    """

    weights: Tensor
    fingerprint: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(len(BINS)))
        self.register_buffer("fingerprint", torch.tensor(0))

    def fit(self, counts: Tensor, uniform_weight: float) -> None:
        """Compute the weights.

        Args:
            counts: number of pixels nearest to each bin, (313,).
            uniform_weight: lambda of eq. 4.
        """
        self.weights.copy_(rebalancing_weights(smooth(counts.double()), uniform_weight))


def count_all_colors(photograph: Callable[[int], Tensor], numbers: Sequence[int]) -> tuple[Tensor, int]:
    """Count the colors of the pixels that are targets of the training, every fourth one, in threads.

    Args:
        photograph: function from a number to a photograph, uint8 (3, H, W); several threads call it.
        numbers: numbers of the photographs.

    Returns:
        The number of pixels nearest to each bin, int64 (313,), and the number of gray photographs.
    """
    counts, gray = torch.zeros(len(BINS), dtype=torch.int64), 0
    with ThreadPoolExecutor() as pool:
        for colors, is_gray in pool.map(lambda number: count_colors(photograph(number)), numbers):
            counts += colors
            gray += int(is_gray)
    return counts, gray


def count_colors(photograph: Tensor) -> tuple[Tensor, bool]:
    """Count the pixels nearest to each bin, int64 (313,), and return whether the photograph, uint8 (3, H, W), is gray."""
    ab = rgb_to_lab(photograph[None, :, ::TARGET_STRIDE, ::TARGET_STRIDE].float() / 255)[:, 1:]
    bins = nearest_bins(ab[0].flatten(1).T, 1)[0][:, 0]
    return torch.bincount(bins, minlength=len(BINS)), not is_colored(ab)
