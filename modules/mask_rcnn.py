"""Mask R-CNN: Faster R-CNN with a mask for each region of interest.

K. He, G. Gkioxari, P. Dollar, R. Girshick. Mask R-CNN. ICCV 2017. arXiv:1703.06870 (v3).

Differences from the paper, with reasons:

1. Proposals and heads are trained together, from one set of features, as in the authors' code (Detectron). The paper trains the
   region proposal network first, "for convenient ablation". The learning rate has Detectron's warmup.
2. Losses are means over the RoIs of an image and then over the images, see `modules/networks/rcnn.py`.
3. Regions of crowds are not used in training, as in torchvision. Detectron does not use them as negative examples.
4. Without pretrained weights, backbones have group normalization, because a batch has few images.
5. Pretrained weights are those of torchvision, whose ResNets have their strides in the 3 x 3 convolutions. Its ResNeXt-101
   (64x4d) was trained by a newer recipe.
6. Biases have the learning rate and the weight decay of the other weights. In Detectron they have twice the learning rate and
   no decay. Anchors that cross the border of the image are used. Mask targets are interpolated, not binary.
7. The keypoint loss is over all positive RoIs; Detectron samples RoIs with visible keypoints.
8. With `aligned`, features and masks are values at the centers of their cells, as in Detectron2. In the paper's code and in
   torchvision, they are shifted by half a cell, which limits the masks of objects of a few pixels.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import keypointrcnn_inference, keypoints_to_heatmap
from torchvision.ops import roi_align

from datamodules.errors import UserError
from datamodules.io.paths import file_hash
from modules.networks.detection_backbones import (
    Backbone,
    frozen_norm,
    group_norm,
    imagenet_url,
    last_stage,
    load_stages,
    make_body,
)
from modules.networks.deterministic import cross_entropy
from modules.networks.mask_heads import MASK_SIZE, KeypointHead, KeypointPredictor, MaskHead, MaskMLP, MaskPredictor
from modules.networks.pretrained import find_or_download
from modules.networks.rcnn import (
    BoxPredictor,
    Objects,
    ProposalNetwork,
    RCNNHeads,
    image_mean_weights,
    rename_torchvision_weights,
)
from modules.networks.roi_pool import RoILayer, RoIPooler
from modules.networks.weights import read_weights_file
from modules.tasks.detection import DetectionMethod, Detections, batch_images
from modules.training.method import Batch
from modules.training.optimizers import kernels
from modules.training.schedules import step_schedule
from modules.training.stages import Stage

BOX_SIZE = 7  # side of the pooled features of the box head (Figure 4)
WARMUP_START = 1 / 3  # of the learning rate, as in Detectron


class MaskRCNN(DetectionMethod):
    """Section 3: two stages, region proposals and heads with classes, boxes and masks.

    Args:
        num_classes: number of classes and of the background, as in torchvision.
        backbone: a ResNet or ResNeXt of torchvision ("resnet50", "resnext101_64x4d"), or "small" for a network for CPUs.
        neck: "fpn" for a feature pyramid; "c4" or "c5" for the features of the fourth or fifth stage.
        backbone_weights: "imagenet" for pretrained weights (downloaded once), with frozen batch normalization and first two
            stages; null for random weights and group normalization.
        base_channels: width of the small backbone.
        fpn_channels: channels of the feature pyramid; 256 in the paper.
        box_channels: width of the box head; 1024 in the paper.
        masks: predict masks; without them, the method is Faster R-CNN.
        mask_head: "fcn", four convolutions, or "mlp", fully connected layers (Table 2e).
        mask_layers: convolutions of the mask head, or hidden layers of the MLP.
        mask_channels: channels of the mask head; 256 in the paper, 1024 for the MLP.
        mask_activation: "sigmoid" for each class, or "softmax" over the classes (Table 2b).
        class_agnostic_masks: one mask for all classes (Section 4.2).
        num_keypoints: number of keypoints of an object; 0 for no keypoint head.
        keypoint_layers, keypoint_channels: convolutions of the keypoint head and their channels; 8 and 512 in the paper.
        roi_layer: see `RoIPooler` (Table 2c, 2d).
        aligned: see `RoIPooler` and `to_image_size`.
        anchor_sizes: square roots of the areas of the anchors in pixels, one for each level of a feature pyramid.
        anchors_per_image: sampled anchors of an image.
        rois_per_image: sampled RoIs of an image; 512 with a feature pyramid, 64 with C4 in the paper.
        train_proposals: proposals of an image in training, from which RoIs are sampled.
        test_proposals: proposals of an image in evaluations; 1000 with a feature pyramid, 300 with C4 in the paper.
        score_threshold, nms_threshold, max_detections: of detections.
        min_size, max_size: see `DetectionMethod`.
        released: use torchvision's weights for COCO if there is no training; requires the network of its model.
        optimizer: "sgd" with a momentum of 0.9, or "adamw".
        weight_decay: of the optimizer.
        warmup: images over which the learning rate rises linearly from a third of it.
        learning_rate_steps: learning rate after a number of images; null for a half cosine to zero.
        total_images: training budget.
        learning_rate: learning rate after the warmup.
        seed: seed of the sampling of anchors and RoIs.

    Raises:
        UserError: the backbone does not exist, or options contradict each other.
    """

    def __init__(
        self,
        num_classes: int = 81,
        backbone: str = "resnet50",
        neck: Literal["fpn", "c4", "c5"] = "fpn",
        backbone_weights: Literal["imagenet"] | None = None,
        base_channels: PositiveInt = 32,
        fpn_channels: PositiveInt = 256,
        box_channels: PositiveInt = 1024,
        masks: bool = True,
        mask_head: Literal["fcn", "mlp"] = "fcn",
        mask_layers: PositiveInt = 4,
        mask_channels: PositiveInt = 256,
        mask_activation: Literal["sigmoid", "softmax"] = "sigmoid",
        class_agnostic_masks: bool = False,
        num_keypoints: NonNegativeInt = 0,
        keypoint_layers: PositiveInt = 8,
        keypoint_channels: PositiveInt = 512,
        roi_layer: RoILayer = "align",
        aligned: bool = False,
        anchor_sizes: tuple[PositiveInt, ...] = (32, 64, 128, 256, 512),
        anchors_per_image: PositiveInt = 256,
        rois_per_image: PositiveInt = 512,
        train_proposals: PositiveInt = 2000,
        test_proposals: PositiveInt = 1000,
        score_threshold: NonNegativeFloat = 0.05,
        nms_threshold: PositiveFloat = 0.5,
        max_detections: PositiveInt = 100,
        min_size: PositiveInt | None = 800,
        max_size: PositiveInt = 1333,
        released: bool = False,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        weight_decay: NonNegativeFloat = 1e-4,
        warmup: NonNegativeInt = 0,
        learning_rate_steps: dict[int, PositiveFloat] | None = None,
        total_images: int = 1_440_000,
        learning_rate: PositiveFloat = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(aligned, min_size, max_size, total_images, learning_rate, warmup, seed)
        self.save_hyperparameters()
        if class_agnostic_masks and mask_activation == "softmax":
            raise UserError("model.class_agnostic_masks: one mask for all classes has no softmax. Use sigmoid")
        if neck == "fpn" and len(anchor_sizes) != 5:
            raise UserError(f"model.anchor_sizes: {len(anchor_sizes)} sizes for the 5 levels of a feature pyramid. Name 5")
        if neck == "c4" and (num_keypoints or mask_head == "mlp"):
            raise UserError("model.neck: c4 has no head for keypoints and no MLP for masks. Use fpn")
        self.backbone_name, self.backbone_weights, self.is_released = backbone, backbone_weights, released
        self.backbone_hash = ""  # sha256 of the pretrained weights
        self.optimizer_name, self.weight_decay = optimizer, weight_decay
        self.learning_rate_steps = dict(sorted((learning_rate_steps or {}).items()))
        self.mask_activation, self.class_agnostic_masks = mask_activation, class_agnostic_masks

        norm_layer = frozen_norm(released) if backbone_weights or released else group_norm
        body = make_body(backbone, base_channels, norm_layer)
        stage = last_stage(body) if neck == "c4" else None
        self.backbone = Backbone(body, neck, fpn_channels)
        channels, strides = self.backbone.out_channels, self.backbone.level_strides
        is_pyramid = neck == "fpn"
        self.rpn = ProposalNetwork(
            channels,
            [*strides, 2 * strides[-1]] if is_pyramid else strides,
            released,
            anchor_sizes,
            anchors_per_image,
            train_candidates=train_proposals if is_pyramid else 12_000,
            test_candidates=test_proposals if is_pyramid else 6000,
            train_proposals=train_proposals,
            test_proposals=test_proposals,
        )
        box_pool = RoIPooler(roi_layer, BOX_SIZE, strides, aligned)
        mask_pool = RoIPooler(roi_layer, MASK_SIZE, strides, aligned)
        box_head = stage or TwoMLPHead(channels * BOX_SIZE**2, box_channels)
        box_features = 2 * channels if stage else box_channels  # `layer4` has twice the channels of `layer3`
        outputs = 1 if class_agnostic_masks else num_classes
        mask: dict[str, Any] = {}
        if masks and mask_head == "mlp":
            mask = {
                "pool": mask_pool,
                "head": nn.Flatten(),
                "predictor": MaskMLP(channels, mask_layers, mask_channels, outputs),
            }
        elif masks:
            head = nn.Identity() if stage else MaskHead(channels, mask_layers, mask_channels)
            in_channels = box_features if stage else mask_channels
            mask = {"pool": mask_pool, "head": head, "predictor": MaskPredictor(in_channels, mask_channels, outputs)}
        keypoint: dict[str, Any] = {}
        if num_keypoints:
            points = KeypointHead(channels, keypoint_layers, keypoint_channels)
            keypoint = {"pool": mask_pool, "head": points, "predictor": KeypointPredictor(keypoint_channels, num_keypoints)}
        self.roi_heads = RCNNHeads(
            {"pool": box_pool, "head": box_head, "predictor": BoxPredictor(box_features, num_classes)},
            {**mask, "loss": self.mask_loss, "probabilities": self.mask_probabilities} if mask else {},
            {**keypoint, "loss": keypoint_loss, "probabilities": keypointrcnn_inference} if keypoint else {},
            shares_features=stage is not None,
            rois_per_image=rois_per_image,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
        if backbone_weights:
            self.freeze_first_stages()
        self.to(memory_format=torch.channels_last)

    # Section 3: multi-task loss

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute L = L_cls + L_box + L_mask, and the losses of the region proposals and the keypoints."""
        images = batch_images(batch["image"])
        features = self.backbone(images.tensors)
        proposals, proposal_losses = self.rpn(images, features, batch["objects"])
        _, losses = self.roi_heads(features, proposals, images.image_sizes, batch["objects"])
        return {"objectness": proposal_losses["loss_objectness"], "proposal": proposal_losses["loss_rpn_box_reg"], **losses}

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features at the highest resolution, (N, C, H / stride, W / stride), of normalized images (N, 3, H, W)."""
        return self.backbone(images)["0"]

    def detect(self, images: ImageList) -> list[Detections]:
        """Detect objects in the proposals with the highest scores (Section 3.1, inference)."""
        features = self.backbone(images.tensors)
        proposals, _ = self.rpn(images, features)
        return self.roi_heads(features, proposals, images.image_sizes)[0]

    # Section 3: mask representation

    def mask_loss(self, logits: Tensor, boxes: list[Tensor], matches: list[Tensor], targets: Objects) -> Tensor:
        """Compute L_mask over positive RoIs: the mean binary cross-entropy of the mask of the true class.

        With softmax (Table 2b), it is the cross-entropy of the class of each pixel, 0 outside of the object.

        Args:
            logits: (R, num_classes or 1, m, m) for the R positive RoIs of all images.
            boxes: positive RoIs of each image, (R_i, 4).
            matches: index of the object of each RoI, (R_i,).
            targets: objects of each image.
        """
        size = logits.shape[-1]
        labels = torch.cat([target["labels"][match] for target, match in zip(targets, matches, strict=True)])
        found = zip(targets, boxes, matches, strict=True)
        masks = torch.cat([self.mask_targets(target["masks"], box, match, size) for target, box, match in found]).to(logits)
        if self.mask_activation == "softmax":
            loss = cross_entropy(logits, labels[:, None, None] * (masks >= 0.5))
        else:
            loss = F.binary_cross_entropy_with_logits(self.own_masks(logits, labels), masks, reduction="none")
        return (loss.mean((1, 2)) * image_mean_weights([len(box) for box in boxes], loss)).sum()

    def mask_targets(self, masks: Tensor, boxes: Tensor, matches: Tensor, size: int) -> Tensor:
        """Return the intersections of boxes (R, 4) and their objects, with indices (R,) in masks (M, H, W): (R, size, size)."""
        rois = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
        return roi_align(masks[:, None].to(boxes), rois, size, aligned=self.aligned)[:, 0]

    def own_masks(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return the mask of the class of each RoI: (R, num_classes or 1, m, m) to (R, m, m)."""
        return values[torch.arange(len(labels), device=labels.device), 0 if self.class_agnostic_masks else labels]

    def mask_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the masks of detections with these labels (R,): probabilities (R, m, m)."""
        if self.mask_activation == "softmax":
            return self.own_masks(logits.softmax(1), labels)
        return self.own_masks(logits, labels).sigmoid()

    # Section 3.1: training

    def freeze_first_stages(self) -> None:
        """Freeze the first convolution and the second stage, as in Detectron."""
        for name, parameter in self.backbone.body.named_parameters():
            if name.startswith(("conv1", "bn1", "layer1")):
                parameter.requires_grad = False

    def setup(self, stage: str) -> None:
        """Load the pretrained weights of the backbone before training; a checkpoint replaces them when a run resumes.

        Raises:
            UserError: the weights are missing and cannot be downloaded.
        """
        super().setup(stage)
        if stage != "fit" or not self.backbone_weights:
            return
        path = find_or_download(self.backbone_name, imagenet_url(self.backbone_name), None)
        weights = read_weights_file(path)
        load_stages(self.backbone.body, weights, "")
        if self.roi_heads.shares_features:
            load_stages(self.roi_heads.box_head, weights, "layer4.")
        self.backbone_hash = file_hash(path)

    def on_fit_start(self) -> None:
        """Check the layer of the regions, before the base class plans the training.

        Raises:
            UserError: on a GPU, RoIPool is trained with deterministic operations, which torchvision does not have.
        """
        if self.device.type == "cuda" and torch.are_deterministic_algorithms_enabled() and self.hparams["roi_layer"] == "pool":
            raise UserError(
                "trainer.deterministic: torchvision has no deterministic RoIPool for GPUs. "
                "Use --model.roi_layer align, or --trainer.deterministic false"
            )
        super().on_fit_start()

    def file_hashes(self) -> dict[str, str]:
        """Return the hash of the pretrained weights."""
        return {**super().file_hashes(), **({"backbone weights": self.backbone_hash} if self.backbone_weights else {})}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create SGD with a momentum of 0.9, or AdamW."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(
            trained, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay, **kernels(self.device)
        )

    def schedule(self, images_seen: int) -> float:
        """Return the learning rate: a linear warmup, and then steps or a half cosine to zero."""
        if images_seen < self.warmup:
            return self.learning_rate * (WARMUP_START + (1 - WARMUP_START) * images_seen / self.warmup)
        if not self.learning_rate_steps:
            return super().schedule(images_seen)
        return step_schedule(self.learning_rate, self.learning_rate_steps, images_seen)

    def stages(self) -> list[Stage]:
        """Return a stage for each learning rate."""
        return [*super().stages(), *(Stage(start) for start in self.learning_rate_steps)]

    # Weights of torchvision

    def authors_weights(self) -> Path | None:
        """Return torchvision's weights for COCO, downloaded if they are missing; None unless `released` is set.

        Raises:
            UserError: the download failed.
        """
        if not self.is_released:
            return None
        name = "keypointrcnn_resnet50_fpn" if self.hparams["num_keypoints"] else "maskrcnn_resnet50_fpn"
        return find_or_download(f"torchvision's {name}", get_model_weights(name)["COCO_V1"].url, None)

    def rename_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with the names of this method; torchvision's files have older names than its code."""
        return rename_torchvision_weights(weights)


# Section 5: keypoints


def keypoint_loss(logits: Tensor, boxes: list[Tensor], matches: list[Tensor], targets: Objects) -> Tensor:
    """Compute the cross-entropy of the position of each visible keypoint, over the m * m positions of its RoI.

    Args:
        logits: (R, K, m, m) for the R positive RoIs of all images.
        boxes, matches, targets: see `MaskRCNN.mask_loss`.
    """
    positions, visible = [], []
    for target, box, match in zip(targets, boxes, matches, strict=True):
        position, inside = keypoints_to_heatmap(target["keypoints"][match].to(box), box, logits.shape[-1])
        positions.append(position.flatten())
        visible.append(inside.flatten().bool())
    index = torch.where(torch.cat(visible))[0]
    entropy = F.cross_entropy(logits.flatten(0, 1).flatten(1)[index], torch.cat(positions)[index], reduction="none")
    weighted = entropy * image_mean_weights([int(inside.sum()) for inside in visible], entropy)
    return weighted.sum() + 0 * logits.sum()  # without keypoints, gradients are zero
