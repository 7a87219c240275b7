"""Base class of detection methods: batches of images of different sizes, and detections at the size of the image."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

from datamodules.batches import DetectionEvalBatch, DetectionOutputs
from datamodules.transforms.draw_objects import draw_objects
from datamodules.transforms.objects import decode_masks
from modules.training.lightning_compat import datamodule
from modules.training.method import Batch, Method

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for RGB values in [0, 1]
SIZE_DIVISOR = 32  # of the sides of a batch
MASK_THRESHOLD = 0.5  # Section 3.1
PASTED_MASKS = 16  # masks that are enlarged at a time, to limit memory
PREVIEW_SCORE = 0.5  # lowest score of a detection in a preview

Detections = dict[str, Tensor]  # see `DetectionOutputs`


class DetectionMethod(Method, ABC):
    """Method that predicts boxes with classes and scores, and optionally masks and keypoints.

    Args:
        aligned: see `to_image_size`.
        min_size: shorter side of the network's input in evaluations; None for the size of the image.
        max_size: maximum of its longer side.
        total_images, learning_rate, seed: see `Method`.
    """

    def __init__(
        self,
        aligned: bool,
        min_size: int | None,
        max_size: int,
        total_images: int,
        learning_rate: float,
        warmup: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, learning_rate, warmup, seed)
        self.aligned, self.min_size, self.max_size = aligned, min_size, max_size

    @abstractmethod
    def detect(self, images: ImageList) -> list[Detections]:
        """Detect objects; "masks" are probabilities (M, 1, m, m) inside of the boxes."""

    def predict(self, image: list[Tensor]) -> list[Detections]:
        """Detect objects in images (3, H, W) in [0, 1]; coordinates and masks refer to these images."""
        inputs = [self.resize(picture) for picture in image]
        detections = self.detect(batch_images(inputs))
        return [
            to_image_size(found, small.shape[-2:], picture.shape[-2:], self.aligned)
            for found, small, picture in zip(detections, inputs, image, strict=True)
        ]

    def resize(self, image: Tensor) -> Tensor:
        """Resize an image (3, H, W) to the size of evaluations."""
        if self.min_size is None:
            return image
        sides = image.shape[-2:]
        factor = min(self.min_size / min(sides), self.max_size / max(sides))
        return F.interpolate(image[None], scale_factor=factor, mode="bilinear", recompute_scale_factor=True)[0]

    def validation_step(self, batch: DetectionEvalBatch, batch_idx: int) -> DetectionOutputs:
        """Add the detections as "prediction"; callbacks compute the metrics."""
        return {**batch, "prediction": self.predict([image.to(self.dtype) for image in batch["image"]])}

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Add the detections as "prediction"."""
        return {**batch, "prediction": self.predict([image.to(self.dtype) for image in batch["image"]])}

    preview_limit = 4

    def preview(self, outputs: Batch) -> Tensor:
        """Draw the annotated objects, and the detections with a score of at least 0.5."""
        image, true, found = outputs["image"][0], outputs["annotations"][0], outputs["prediction"][0]
        height, width = image.shape[-2:]
        annotated = {
            "boxes": torch.as_tensor(true["boxes"]),
            "labels": torch.as_tensor(true["labels"]),
            "masks": decode_masks(true["masks"], height, width).bool(),
            "keypoints": torch.as_tensor(true["keypoints"]),
        }
        confident = {name: values[found["scores"] >= PREVIEW_SCORE] for name, values in found.items()}
        data = datamodule(self.trainer)
        names = data.class_names if len(data.class_names) > 2 else ()  # a single class needs no name
        drawings = [draw_objects(image, objects, names, data.skeleton) for objects in (annotated, confident)]
        return torch.cat([drawings[0], torch.ones(3, height, 4), drawings[1]], dim=2)[None]


def batch_images(images: Sequence[Tensor]) -> ImageList:
    """Normalize images (3, H, W) in [0, 1], and pad them with zeros at the right and at the bottom to one size."""
    mean, std = (images[0].new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    height, width = (math.ceil(max(image.shape[dim] for image in images) / SIZE_DIVISOR) * SIZE_DIVISOR for dim in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
    return ImageList(batch, [(image.shape[1], image.shape[2]) for image in images])


def to_image_size(found: Detections, network_size: Sequence[int], image_size: Sequence[int], aligned: bool) -> Detections:
    """Scale detections from the size of the network's input to that of the image, and enlarge and threshold their masks.

    Args:
        found: detections with masks (M, 1, m, m).
        network_size, image_size: heights and widths.
        aligned: see `paste_aligned`; otherwise as in the paper's code and in torchvision, which round the boxes.
    """
    scale = found["boxes"].new_tensor([new / old for old, new in zip(network_size, image_size, strict=True)]).flip(0)  # x, y
    scaled: dict[str, Any] = {**found, "boxes": found["boxes"] * scale.repeat(2)}
    if "masks" in found:
        parts = zip(found["masks"].split(PASTED_MASKS), scaled["boxes"].split(PASTED_MASKS), strict=True)
        size, paste = (int(image_size[0]), int(image_size[1])), paste_aligned if aligned else paste_masks_in_image
        scaled["masks"] = torch.cat([paste(masks, boxes, size)[:, 0] > MASK_THRESHOLD for masks, boxes in parts])
    if "keypoints" in found:
        scaled["keypoints"] = torch.cat([found["keypoints"][..., :2] * scale, found["keypoints"][..., 2:]], dim=-1)
    return scaled


def paste_aligned(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate masks (M, 1, m, m), whose values are at the centers of the cells of boxes (M, 4), at the centers of pixels.

    Returns:
        (M, 1, *size); zeros outside of the boxes.
    """
    if not len(masks):
        return masks.new_zeros(0, 1, *size)
    x, y = (torch.arange(length, device=boxes.device, dtype=boxes.dtype) + 0.5 for length in reversed(size))
    left, top, right, bottom = (end[:, None] for end in boxes.unbind(1))
    columns = 2 * (x - left) / (right - left) - 1  # (M, W), in [-1, 1] inside of the box
    rows = 2 * (y - top) / (bottom - top) - 1
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)  # (M, H, W, 2)
    inside = (grid.abs() <= 1).all(-1)[:, None]
    return F.grid_sample(masks, grid.to(masks), padding_mode="border", align_corners=False) * inside
