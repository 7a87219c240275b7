"""Types of each task's batches (yielded by the datamodule, on the device) and outputs (returned by evaluation steps).

Images are float32, NCHW, RGB or luma, in [0, 1]; masks are int64 class ids, 255 for ignored pixels. The training step
adds "sample_ids", a range, and "repeat_index"; see `modules.training.method`. Outputs contain the batch
and the entries that the method adds.
"""

from typing import Any, NotRequired, TypedDict

from torch import Tensor


class Named(TypedDict):
    """Names of evaluation images; each image is evaluated once."""

    name: list[str]  # N names within the dataset
    dataset: list[str]  # N names of datasets


class SuperResolutionBatch(TypedDict):
    """Pairs of a downscaled image and its original, luma (C = 1) or RGB (C = 3)."""

    input: Tensor  # (N, C, h, w); the bicubic kernel may overshoot [0, 1]
    target: Tensor  # (N, C, h * scale, w * scale)


class SuperResolutionEvalBatch(SuperResolutionBatch, Named):
    """A pair of full images; N is 1."""


class SuperResolutionOutputs(SuperResolutionEvalBatch):
    """Evaluation batch with the upscaled image."""

    prediction: Tensor  # like `target`; may exceed [0, 1]


class GenerationBatch(TypedDict):
    """Images of one size, with labels."""

    image: Tensor  # (N, C, H, W)
    label: Tensor  # int64 (N,)


class GenerationEvalBatch(TypedDict):
    """Indices of samples to generate."""

    index: Tensor  # int64 (N,)


class GenerationOutputs(GenerationEvalBatch):
    """Evaluation batch with the samples."""

    prediction: Tensor  # (N, C, H, W)


class ReconstructionEvalBatch(GenerationBatch, Named):
    """Images, with their positions in their dataset."""

    index: Tensor  # int64 (N,)


class ReconstructionOutputs(ReconstructionEvalBatch):
    """Evaluation batch with codes and reconstructions."""

    code: Tensor  # (N, D)
    prediction: Tensor  # like `image`
    input: NotRequired[Tensor]  # like `image`, if the method corrupts it


class SegmentationBatch(TypedDict):
    """Images with a class for each pixel."""

    image: Tensor  # (N, C, H, W), or (N, C, H + margin, W + margin) in training
    mask: Tensor  # int64 (N, H, W)
    weight: NotRequired[Tensor]  # (N, H, W), in training


class SegmentationEvalBatch(SegmentationBatch, Named):
    """A full image; N is 1."""

    instance_ids: Tensor  # int32 (N, H, W), 0 for background


class SegmentationOutputs(SegmentationEvalBatch):
    """Evaluation batch with class probabilities."""

    prediction: Tensor  # (N, K, H, W)


class DetectionBatch(TypedDict):
    """Images of different sizes, with their objects."""

    image: list[Tensor]  # N images (3, H, W)
    objects: list[dict[str, Tensor]]  # N times "boxes", "labels", "masks", "keypoints", see datamodules/transforms/objects.py


class DetectionEvalBatch(Named):
    """A full image; N is 1."""

    image: list[Tensor]  # N images (3, H, W)
    annotations: list[dict[str, Any]]  # N times the fields of datamodules/catalog/annotated_images.py, `Annotations`


class DetectionOutputs(DetectionEvalBatch):
    """Evaluation batch with the detections, sorted by score.

    A detection has "boxes" (M, 4), "labels" (M,) and "scores" (M,); "masks", bool (M, H, W), if the method predicts masks; and
    "keypoints" (M, K, 3) with their scores (M, K), "keypoint_scores", if it predicts keypoints.
    """

    prediction: list[dict[str, Tensor]]  # N


class UnpairedBatch(TypedDict):
    """Unpaired images of two domains: images at the same index are unrelated."""

    A: Tensor  # (N, 3, H, W)
    B: Tensor  # (N, 3, H, W)


class UnpairedEvalBatch(Named):
    """A full image of one domain; N is 1."""

    image: Tensor  # (N, 3, H, W)
    direction: list[str]  # N times "AtoB" or "BtoA"; the first letter is the domain of the image
    mask: NotRequired[Tensor]  # uint8 (N, H', W'), if the dataset has labels


class TranslationOutputs(UnpairedEvalBatch):
    """Evaluation batch with translations, each like `image`."""

    prediction: Tensor  # `image` translated to the other domain
    reconstruction: Tensor  # `prediction` translated back to the domain of `image`
    identity: Tensor  # identity mapping: translation of `image` to the domain of `image`


class PhotographBatch(TypedDict):
    """Photographs."""

    image: Tensor  # (N, 3, size, size)


class PhotographEvalBatch(PhotographBatch, Named):
    """A photograph; N is 1."""

    label: Tensor  # int64 (N,)
    index: Tensor  # int64 (N,), over all datasets


class StylizationOutputs(PhotographEvalBatch):
    """Evaluation batch with the stylized photograph."""

    style: list[str]  # N names of styles
    prediction: Tensor  # like `image`; may exceed [0, 1]


class ColorizationOutputs(PhotographEvalBatch):
    """Evaluation batch with the photograph colorized from its lightness."""

    prediction: Tensor  # like `image`, in [0, 1]
    ab: Tensor  # (N, 2, size, size), predicted a and b of Lab


class ClassificationBatch(PhotographBatch):
    """Photographs with their classes."""

    label: Tensor  # int64 (N,)


class ClassificationOutputs(PhotographEvalBatch):
    """Evaluation batch with the scores of the classes, from one or more classifiers by name."""

    logits: dict[str, Tensor]  # (N, K) each


class RingBatch(TypedDict):
    """Points in the plane."""

    point: Tensor  # (N, 2)


class RingEvalBatch(GenerationEvalBatch, RingBatch):
    """Indices of samples to generate, with real points."""
