"""Drawings of objects over an image: masks, boxes, names with scores, and skeletons."""

from collections.abc import Sequence

import torch
from PIL import ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from datamodules.transforms.overlays import COLORS

MASK_OPACITY = 0.5
KEYPOINT_COLOR = (255, 255, 0)
CAPTION_MARGIN = 3  # pixels left of a caption in its box


def draw_objects(
    image: Tensor,
    objects: dict[str, Tensor],
    names: Sequence[str] = (),
    skeleton: Sequence[tuple[int, int]] = (),
    scale: int = 1,
) -> Tensor:
    """Draw objects over an image.

    Args:
        image: (3, H, W) in [0, 1].
        objects: "boxes", "labels" and optionally "scores", "masks" (M, H, W) and "keypoints" (M, K, 3), see `DetectionOutputs`.
        names: names of the classes by label; empty for no text.
        skeleton: pairs of indices of keypoints that are connected.
        scale: factor by which the image is enlarged before the drawing.

    Returns:
        (3, scale * H, scale * W) in [0, 1] on the CPU.
    """
    image = image.detach().float().cpu().clamp(0, 1)
    objects = {name: values.detach().cpu() for name, values in objects.items()}
    if scale > 1:
        image = interpolate(image[None], scale_factor=scale, mode="bilinear")[0].clamp(0, 1)
        objects = _enlarge(objects, scale)
    canvas = (image * 255).round().to(torch.uint8)
    count = len(objects["boxes"])
    if not count:
        return canvas.float() / 255
    colors = [tuple((255 * COLORS[i % len(COLORS)]).int().tolist()) for i in range(count)]
    if "masks" in objects and objects["masks"].numel():
        canvas = draw_segmentation_masks(canvas, objects["masks"].bool(), alpha=MASK_OPACITY, colors=colors)
    canvas = draw_bounding_boxes(canvas, objects["boxes"].float(), colors=colors)
    texts = dict(enumerate(_captions(objects, names)))
    if shown := [i for i, text in texts.items() if text]:
        backgrounds = [colors[i] for i in shown]
        canvas = draw_bounding_boxes(
            canvas,
            objects["boxes"][shown].float(),
            [texts[i] for i in shown],
            backgrounds,
            label_colors=["black" if sum(color) > 330 else "white" for color in backgrounds],
            label_background_colors=backgrounds,
            fill_labels=True,
        )
    if "keypoints" in objects and objects["keypoints"].numel():
        points = objects["keypoints"].float()
        canvas = draw_keypoints(
            canvas, points[..., :2], list(skeleton) or None, KEYPOINT_COLOR, radius=2, visibility=points[..., 2] > 0
        )
    return canvas.float() / 255


def _enlarge(objects: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    enlarged = {**objects, "boxes": objects["boxes"] * scale}
    if "masks" in objects:
        enlarged["masks"] = objects["masks"].repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    if "keypoints" in objects:
        enlarged["keypoints"] = objects["keypoints"] * torch.tensor([scale, scale, 1])
    return enlarged


def _captions(objects: dict[str, Tensor], names: Sequence[str]) -> list[str]:
    """Return the text of each object: name and score, or the longest part that is not wider than the box.

    The name of a single class is left out.
    """
    if not names:
        return [""] * len(objects["boxes"])
    labels = [names[label] if label < len(names) else str(label) for label in objects["labels"].tolist()]
    if "scores" in objects:
        scores = [f"{score:.2f}" for score in objects["scores"].tolist()]
        full = scores if len(names) == 2 else [f"{label} {score}" for label, score in zip(labels, scores, strict=True)]
    else:
        full = labels
    font = ImageFont.load_default()
    widths = (objects["boxes"][:, 2] - objects["boxes"][:, 0]).tolist()
    shorter = [""] * len(labels) if len(names) == 2 else labels
    return [
        next((text for text in texts if font.getlength(text) + CAPTION_MARGIN <= width), "")
        for texts, width in zip(zip(full, shorter, strict=True), widths, strict=True)
    ]
