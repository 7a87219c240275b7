"""Pooling of regions of interest: RoIAlign and RoIPool, on one or more levels of a feature pyramid."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool
from torchvision.ops.poolers import LevelMapper

from modules.losses.precision import to_float32

RoILayer = Literal["align", "align_max", "pool"]
SAMPLES = 2  # per side of a bin in RoIAlign (Section 3)


class RoIPooler(nn.Module):
    """Pools features of fixed size from boxes of any size.

    The level of a box with the sides w and h is floor(4 + log2(sqrt(w h) / 224)) (Feature Pyramid Networks, eq. 1).

    Args:
        layer: "align" for RoIAlign with the mean of its four samples, "align_max" with their maximum, or "pool" for RoIPool
            (Fast R-CNN), which rounds the coordinates to the grid of the features.
        output_size: side of the output.
        strides: strides of the levels.
        aligned: RoIAlign takes features as values at the centers of their cells, as in Detectron2. In the paper's code and in
            torchvision, its samples are shifted by half a cell.
    """

    def __init__(self, layer: RoILayer, output_size: int, strides: Sequence[int], aligned: bool) -> None:
        super().__init__()
        self.layer, self.output_size, self.level_strides, self.aligned = layer, output_size, strides, aligned
        self.level_of = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Pool features.

        Args:
            features: levels by name, see `Backbone`.
            boxes: boxes of each image in pixels, (R_i, 4).
            image_shapes: not used; torchvision infers the strides from them.

        Returns:
            (R, C, output_size, output_size) for the R boxes of all images.
        """
        numbers = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([numbers, torch.cat(boxes)], dim=1)  # (R, 5)
        if len(self.level_strides) == 1:
            return self.pool(features["0"], rois, self.level_strides[0])
        levels = self.level_of(boxes)
        first = features["0"]
        pooled = to_float32(first.new_zeros(len(rois), first.shape[1], self.output_size, self.output_size))
        for level, stride in enumerate(self.level_strides):
            index = torch.where(levels == level)[0]
            pooled[index] = self.pool(features[str(level)], rois[index], stride)
        return pooled

    def pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Pool from one level: (N, C, h, w) and (R, 5) to (R, C, output_size, output_size); in float32 under autocast."""
        features, scale = to_float32(features), 1 / stride
        if self.layer == "pool":
            return roi_pool(features, rois, self.output_size, scale)
        if self.layer == "align_max":
            samples = roi_align(features, rois, SAMPLES * self.output_size, scale, sampling_ratio=1, aligned=self.aligned)
            return F.max_pool2d(samples, SAMPLES)
        return roi_align(features, rois, self.output_size, scale, sampling_ratio=SAMPLES, aligned=self.aligned)
