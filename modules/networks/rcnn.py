"""Two stages of a detector: region proposals, and heads for the boxes, masks and keypoints of regions of interest (RoIs).

S. Ren, K. He, R. Girshick, J. Sun. Faster R-CNN. NeurIPS 2015. arXiv:1506.01497. The parts are those of torchvision, apart from
the losses: each loss is a mean over the sampled anchors or RoIs of an image, and then over the images. It is therefore the same
for any number of processes and micro-batches. In torchvision and Detectron, it is a mean over the RoIs of all images of a
process.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from modules.losses.precision import to_float32

RPN_BETA, BOX_BETA = 1 / 9, 1.0  # absolute error at which the smooth L1 losses become linear, as in Detectron
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # of anchors: height over width
Objects = list[dict[str, Tensor]]


def image_mean_weights(counts: Sequence[int], like: Tensor) -> Tensor:
    """Return weights (sum of counts,) whose sum over values is the mean over each image's values, and then over the images.

    Args:
        counts: number of values of each image, in order.
        like: tensor with the dtype and device of the values.
    """
    weights = [1 / (max(1, count) * len(counts)) for count in counts]
    return torch.repeat_interleave(like.new_tensor(weights), torch.tensor(counts, device=like.device))


class Anchors(AnchorGenerator):
    """Anchors in float32. In torchvision they have the dtype of the features: with bf16, errors of up to 4 pixels.

    Args:
        sizes: square roots of the areas of the anchors at each level.
        level_strides: stride of each level; None for the ratio of the sizes of image and features, rounded down, as in
            torchvision: for an image with 800 rows, the stride of the last level is then 61 instead of 64.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], level_strides: Sequence[int] | None) -> None:
        super().__init__(sizes, (ASPECT_RATIOS,) * len(sizes))
        self.level_strides = level_strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, (A, 4)."""
        # Expanded scalars: torchvision takes the sizes, the dtype and the device of the features, and not their values.
        float32_maps = [to_float32(features.new_zeros(())).expand(features.shape) for features in feature_maps]
        if self.level_strides is None:
            return super().forward(image_list, float32_maps)
        self.set_cell_anchors(float32_maps[0].dtype, float32_maps[0].device)
        grids = [list(features.shape[-2:]) for features in feature_maps]
        strides = [[float32_maps[0].new_tensor(stride)] * 2 for stride in self.level_strides]
        return [torch.cat(self.grid_anchors(grids, strides))] * len(image_list.image_sizes)


class Float32ProposalHead(RPNHead):
    """Head whose outputs are float32; boxes that are decoded from them have the same dtype."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the objectness (N, A, h, w) and the offsets (N, 4 A, h, w) at each level."""
        objectness, offsets = super().forward(x)
        return [to_float32(values) for values in objectness], [to_float32(values) for values in offsets]


class ProposalNetwork(RegionProposalNetwork):
    """Region proposal network.

    Args:
        channels: channels of the features.
        level_strides: strides of the levels of the features, with "pool" for a feature pyramid.
        infer_strides: compute the strides from the features, as in torchvision, see `Anchors`.
        anchor_sizes: square roots of the areas of the anchors in pixels. One for each level, or all at a single level.
        anchors_per_image: sampled anchors for the loss, at most half of them positive.
        train_candidates, test_candidates: proposals of each level before non-maximum suppression.
        train_proposals, test_proposals: proposals of an image after it.
    """

    def __init__(
        self,
        channels: int,
        level_strides: Sequence[int],
        infer_strides: bool,
        anchor_sizes: Sequence[int],
        anchors_per_image: int,
        train_candidates: int,
        test_candidates: int,
        train_proposals: int,
        test_proposals: int,
    ) -> None:
        sizes = tuple((size,) for size in anchor_sizes) if len(level_strides) > 1 else (tuple(anchor_sizes),)
        anchors = Anchors(sizes, None if infer_strides else level_strides)
        super().__init__(
            anchors,
            Float32ProposalHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=anchors_per_image,
            positive_fraction=0.5,
            pre_nms_top_n={"training": train_candidates, "testing": test_candidates},
            post_nms_top_n={"training": train_proposals, "testing": test_proposals},
            nms_thresh=0.7,
        )

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of objectness and boxes (Faster R-CNN, eq. 1) over the sampled anchors."""
        sampled = [positive | negative for positive, negative in zip(*self.fg_bg_sampler(labels), strict=True)]
        index = torch.where(torch.cat(sampled).bool())[0]
        target, box_target = torch.cat(labels)[index], torch.cat(regression_targets)[index]
        weights = image_mean_weights([int(mask.sum()) for mask in sampled], target)
        classification = F.binary_cross_entropy_with_logits(objectness.flatten()[index], target, weights, reduction="sum")
        positive = target == 1  # targets of others may be infinite
        offsets = pred_bbox_deltas[index[positive]]
        error = F.smooth_l1_loss(offsets, box_target[positive], beta=RPN_BETA, reduction="none").sum(1)
        return classification, (error * weights[positive]).sum()


class BoxPredictor(nn.Module):
    """Scores of classes and offsets of boxes, for each class, from features (R, C) or (R, C, h, w)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):  # as in Fast R-CNN
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (R, num_classes) and offsets (R, 4 num_classes)."""
        pooled = features.mean((2, 3)) if features.ndim == 4 else features
        return self.cls_score(pooled), self.bbox_pred(pooled)


class RCNNHeads(RoIHeads):
    """Heads for the boxes of proposals, and for the masks and keypoints of positive proposals or detections.

    Args:
        box: pooler, head and predictor of boxes.
        mask: head and predictor of masks, with "pool", "head", "predictor", "loss" and "probabilities"; empty for none.
        keypoint: the same for keypoints; "probabilities" returns points and scores.
        shares_features: the masks use the features of the box head, as with C4 backbones.
        rois_per_image: sampled proposals, at most a quarter of them positive.
        score_threshold, nms_threshold, max_detections: of detections.
    """

    def __init__(
        self,
        box: Mapping[str, nn.Module],
        mask: Mapping[str, Any],
        keypoint: Mapping[str, Any],
        shares_features: bool,
        rois_per_image: int,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__(
            box["pool"],
            box["head"],
            box["predictor"],
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            **{f"{kind}_{part}": branch.get(name) for kind, branch in (("mask", mask), ("keypoint", keypoint))
               for part, name in (("roi_pool", "pool"), ("head", "head"), ("predictor", "predictor"))},
        )  # fmt: skip
        self.shares_features = shares_features
        self.mask_loss: Callable[..., Tensor] | None = mask.get("loss")
        self.mask_probabilities: Callable[..., Tensor] | None = mask.get("probabilities")
        self.keypoint_loss: Callable[..., Tensor] | None = keypoint.get("loss")
        self.keypoint_points: Callable[..., Any] | None = keypoint.get("probabilities")

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Objects | None = None,
    ) -> tuple[Objects, dict[str, Tensor]]:
        """Return the losses if there are targets, and the detections otherwise.

        Args:
            features: features by level.
            proposals: boxes of each image, (R_i, 4).
            image_shapes: heights and widths of the images.
            targets: objects of each image, see `DetectionBatch`.
        """
        if targets is None:
            return self.detections(features, proposals, image_shapes), {}
        proposals, matches, labels, box_targets = self.select_training_samples(proposals, targets)
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, offsets = self.box_predictor(box_features)
        losses = self.box_losses(logits, offsets, labels, box_targets)
        positive = [label > 0 for label in labels]
        boxes = [box[index] for box, index in zip(proposals, positive, strict=True)]
        matched = [match[index] for match, index in zip(matches, positive, strict=True)]
        if self.mask_loss is not None:
            pooled = box_features[torch.cat(positive)] if self.shares_features else None
            mask_logits = self.mask_logits(features, boxes, image_shapes, pooled)
            losses["mask"] = self.mask_loss(to_float32(mask_logits), boxes, matched, targets)
        if self.keypoint_loss is not None:
            losses["keypoint"] = self.keypoint_loss(
                to_float32(self.heatmaps(features, boxes, image_shapes)), boxes, matched, targets
            )
        return [], losses

    def box_losses(
        self, logits: Tensor, offsets: Tensor, labels: list[Tensor], box_targets: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """Compute the losses of classes and boxes (Fast R-CNN, eq. 1)."""
        label, box_target = torch.cat(labels), torch.cat(list(box_targets))
        weights = image_mean_weights([len(values) for values in labels], box_target)
        entropy = F.cross_entropy(to_float32(logits), label, reduction="none")
        positive = torch.where(label > 0)[0]  # targets of others may be infinite
        own_offsets = to_float32(offsets).view(len(offsets), -1, 4)[positive, label[positive]]
        error = F.smooth_l1_loss(own_offsets, box_target[positive], beta=BOX_BETA, reduction="none").sum(1)
        return {"class": (entropy * weights).sum(), "box": (error * weights[positive]).sum()}

    def mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]], pooled: Tensor | None
    ) -> Tensor:
        """Compute the logits of masks (R, C, m, m); `pooled` are features of the box head, if the branches share them."""
        if pooled is None:
            pool, head = (self.box_roi_pool, self.box_head) if self.shares_features else (self.mask_roi_pool, self.mask_head)
            pooled = head(pool(features, boxes, image_shapes))
        return self.mask_predictor(pooled)

    def heatmaps(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Compute the logits of keypoints (R, K, m, m)."""
        return self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes, image_shapes)))

    def detections(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]) -> Objects:
        """Detect objects; masks and keypoints are predicted for the detections only (Section 3.1)."""
        logits, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        logits, offsets = to_float32(logits), to_float32(offsets)
        boxes, scores, labels = self.postprocess_detections(logits, offsets, proposals, image_shapes)
        found = [
            {"boxes": box, "scores": score, "labels": label} for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
        counts = [len(box) for box in boxes]
        if self.mask_probabilities is not None:
            masks = self.mask_probabilities(
                to_float32(self.mask_logits(features, boxes, image_shapes, None)), torch.cat(labels)
            )
            for detections, values in zip(found, masks[:, None].split(counts), strict=True):
                detections["masks"] = values
        if self.keypoint_points is not None:
            points, point_scores = self.keypoint_points(to_float32(self.heatmaps(features, boxes, image_shapes)), boxes)
            for detections, values, values_of_scores in zip(found, points, point_scores, strict=True):
                detections["keypoints"], detections["keypoint_scores"] = values, values_of_scores
        return found


def rename_torchvision_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of torchvision's detectors with the names of its newer code; other names do not change."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+|rpn\.head\.conv)\.(weight|bias)$", r"\1.0.\2", name)
        name = name.replace("rpn.head.conv.0.", "rpn.head.conv.0.0.") if re.search(r"conv\.0\.(weight|bias)$", name) else name
        name = re.sub(r"mask_fcn(\d)\.", lambda match: f"{int(match[1]) - 1}.0.", name)
        if not name.endswith("num_batches_tracked"):  # frozen batch normalization does not count batches
            renamed[name] = value
    return renamed
