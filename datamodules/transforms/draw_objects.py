"""Drawings of objects over an image: masks, boxes, names with scores, and skeletons."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from datamodules.transforms.overlays import COLORS

MASK_OPACITY = 0.5
KEYPOINT_COLOR = (255, 255, 0)


def draw_objects(
    image: Tensor, objects: dict[str, Tensor], names: Sequence[str] = (), skeleton: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """Draw objects over an image.

    Args:
        image: (3, H, W) in [0, 1].
        objects: "boxes", "labels" and optionally "scores", "masks" (M, H, W) and "keypoints" (M, K, 3), see `DetectionOutputs`.
        names: names of the classes by label; empty for no text.
        skeleton: pairs of indices of keypoints that are connected.

    Returns:
        (3, H, W) in [0, 1] on the CPU.
    """
    canvas = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    objects = {name: values.detach().cpu() for name, values in objects.items()}
    count = len(objects["boxes"])
    if not count:
        return canvas.float() / 255
    colors = [tuple((255 * COLORS[i % len(COLORS)]).int().tolist()) for i in range(count)]
    if "masks" in objects and objects["masks"].numel():
        canvas = draw_segmentation_masks(canvas, objects["masks"].bool(), alpha=MASK_OPACITY, colors=colors)
    captions = None
    if names:
        scores = objects["scores"].tolist() if "scores" in objects else [None] * count
        texts = [names[label] if label < len(names) else str(label) for label in objects["labels"].tolist()]
        captions = [text if s is None else f"{text} {s:.2f}" for text, s in zip(texts, scores, strict=True)]
    canvas = draw_bounding_boxes(
        canvas,
        objects["boxes"].float(),
        captions,
        colors,
        label_colors="black",
        label_background_colors=colors,
        fill_labels=True,
    )
    if "keypoints" in objects and objects["keypoints"].numel():
        points = objects["keypoints"].float()
        canvas = draw_keypoints(
            canvas, points[..., :2], list(skeleton) or None, KEYPOINT_COLOR, radius=2, visibility=points[..., 2] > 0
        )
    return canvas.float() / 255
