"""Average precision and recall of detections, by the protocol of COCO."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pydantic import PositiveInt

from callbacks.metrics.base import ImageMetric
from datamodules.errors import UserError
from datamodules.transforms.objects import encode_masks, mask_areas

COCO_DETECTIONS = 100
COCO_KEYPOINTS = 17
EVALUATIONS = {"box": "bbox", "mask": "segm", "keypoints": "keypoints"}


class COCOAveragePrecision(ImageMetric):
    """Average precision (AP) and average recall (AR) of boxes, masks and keypoints, as cocoeval.py of COCO's API, in percent.

    A detection of a class is true if its overlap with an object that is not yet found by a detection with a higher score is at
    least a threshold. The overlap is the intersection over union (IoU) of boxes or masks. For keypoints it is the similarity
    OKS, the mean of exp(-d^2 / (2 s^2 k^2)) over the annotated keypoints, with the distance d in pixels, the area s^2 of the
    object, and k = 2 sigma. AP is the mean over 101 recalls of the precision, made monotone, and over the classes with objects;
    AR is the maximum recall. Detections of regions of crowds are ignored.

    - `box/ap`, `mask/ap`, `keypoints/ap`: mean over the thresholds 0.50, 0.55, ..., 0.95;
    - `box/ap50`, `box/ap75`: AP at one threshold;
    - `box/ap-small`, `box/ap-medium`, `box/ap-large`: for objects below 32^2 pixels, up to 96^2, and above, by the area of the
      annotation; keypoints have no small objects;
    - `box/ar1`, `box/ar10`, `box/ar100`: AR with this many detections in an image; `box/ar-small`, ...;
    - `keypoints/ar`, `keypoints/ar50`, `keypoints/ar75`, ...: AR with 20 detections in an image.

    With another number of detections than 100, names end with it: `mask/ap/max500`. A column without objects, such as one
    without small objects, is absent.

    Required outputs: "prediction" and "annotations", see `DetectionOutputs`. Masks and keypoints are evaluated if the method
    predicts them.

    Args:
        max_detections: maximum number of boxes and masks in an image, those with the highest scores.
        keypoint_sigmas: sigma of each keypoint; null for those of COCO's 17 keypoints.
        on_validation: evaluate at validations too, otherwise only at tests.

    Raises:
        UserError: the sigmas are missing for other keypoints than those of COCO.
    """

    set_protocols = ()
    required_outputs = ("prediction", "annotations")

    def __init__(
        self,
        max_detections: PositiveInt = COCO_DETECTIONS,
        keypoint_sigmas: Sequence[float] | None = None,
        on_validation: bool = True,
    ) -> None:
        super().__init__(on_validation)
        self.max_detections, self.keypoint_sigmas = max_detections, keypoint_sigmas

    def update(self, outputs: dict[str, Any], i: int) -> dict[str, Any]:
        """Return the annotated objects and the detections of the image, with run-length codes as masks."""
        prediction = outputs["prediction"][i]
        found = {name: values.detach().cpu() for name, values in prediction.items() if name != "masks"}
        detections = {name: values.double().numpy() for name, values in found.items()}
        if "masks" in prediction:
            detections["masks"] = encode_masks(prediction["masks"])
        return {"true": outputs["annotations"][i], "found": detections, "size": tuple(outputs["image"][i].shape[-2:])}

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        found = states[0]["found"]
        kinds = ["box", *(["mask"] if "masks" in found else []), *(["keypoints"] if "keypoints" in found else [])]
        labels = range(1, len(trainer.datamodule.class_names))
        return {name: value for kind in kinds for name, value in self.evaluate(kind, states, labels).items()}

    def evaluate(self, kind: str, states: Sequence[dict[str, Any]], labels: Sequence[int]) -> dict[str, float]:
        """Evaluate the boxes, masks or keypoints of a dataset.

        Args:
            kind: "box", "mask" or "keypoints".
            states: results of `update`.
            labels: all labels.

        Returns:
            The metrics by protocol.

        Raises:
            UserError: see the class.
        """
        images = [{"id": i, "height": state["size"][0], "width": state["size"][1]} for i, state in enumerate(states, 1)]
        common = {"images": images, "categories": [{"id": label} for label in labels]}
        true, found = (
            COCO({**common, "annotations": number([row for i, state in enumerate(states, 1) for row in rows(kind, i, state)])})
            for rows in (true_rows, found_rows)
        )
        sigmas = self.sigmas(states) if kind == "keypoints" else None
        evaluation = COCOeval_faster(true, found, EVALUATIONS[kind], kpt_oks_sigmas=sigmas, print_function=ignore)
        evaluation.params.catIds = list(labels)
        if kind != "keypoints":
            evaluation.params.maxDets = [limit for limit in (1, 10) if limit < self.max_detections] + [self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        suffix = "" if self.max_detections == COCO_DETECTIONS or kind == "keypoints" else f"/max{self.max_detections}"
        return {f"{kind}/{name}{suffix}": value for name, value in columns(evaluation).items()}

    def sigmas(self, states: Sequence[dict[str, Any]]) -> list[float] | None:
        """Return the sigmas of the keypoints; None for those of COCO."""
        count = states[0]["found"]["keypoints"].shape[1]
        given = COCO_KEYPOINTS if self.keypoint_sigmas is None else len(self.keypoint_sigmas)
        if count != given:
            raise UserError(
                f"COCOAveragePrecision: {given} sigmas for {count} keypoints. Set keypoint_sigmas to {count} numbers"
            )
        return None if self.keypoint_sigmas is None else list(self.keypoint_sigmas)


def columns(evaluation: Any) -> dict[str, float]:
    """Return the columns of COCO from an accumulated evaluation, in percent, without those that have no objects.

    The precision is an array over thresholds, recalls, classes, areas and numbers of detections; it is -1 for classes without
    objects.
    """
    parameters = evaluation.params
    precision = np.asarray(evaluation.eval["precision"])
    recall = np.asarray(evaluation.eval["recall"])
    thresholds, limits = np.asarray(parameters.iouThrs), parameters.maxDets
    values = {}
    for name, array, at in (("ap", precision, [-1]), ("ar", recall, range(len(limits)))):
        for limit in at:
            label = f"{name}{limits[limit]}" if name == "ar" and len(limits) > 1 else name
            values[label] = array[..., 0, limit]
        if name == "ap" or len(limits) == 1:
            for threshold in (50, 75):
                index = np.isclose(thresholds, threshold / 100)
                values[f"{name}{threshold}"] = array[index][..., 0, -1]
        for area, size in enumerate(parameters.areaRngLbl[1:], 1):
            values[f"{name}-{size}"] = array[..., area, -1]
    return {name: 100 * float(part[part > -1].mean()) for name, part in values.items() if (part > -1).any()}


def true_rows(kind: str, image_id: int, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the annotated objects of an image in the format of COCO."""
    true = state["true"]
    rows = []
    for i, (left, top, right, bottom) in enumerate(np.asarray(true["boxes"], np.float64)):
        row = {
            "image_id": image_id,
            "category_id": int(true["labels"][i]),
            "bbox": [left, top, right - left, bottom - top],
            "area": float(true["areas"][i]),
            "iscrowd": int(true["crowd"][i]),
        }
        if kind == "mask":
            row["segmentation"] = true["masks"][i]
        if kind == "keypoints":
            points = np.asarray(true["keypoints"][i], np.float64)
            row |= {"keypoints": points.flatten().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        rows.append(row)
    return rows


def found_rows(kind: str, image_id: int, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the detections of an image in the format of COCO; their areas are those of their boxes, masks or keypoints."""
    found = state["found"]
    boxes = found["boxes"]
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = mask_areas(found["masks"]) if kind == "mask" else widths * heights
    if kind == "keypoints" and len(boxes):
        areas = np.ptp(found["keypoints"][..., 0], axis=1) * np.ptp(found["keypoints"][..., 1], axis=1)
    rows = []
    for i, score in enumerate(found["scores"].tolist()):
        row = {
            "image_id": image_id,
            "category_id": int(found["labels"][i]),
            "bbox": [*boxes[i, :2].tolist(), float(widths[i]), float(heights[i])],
            "score": score,
            "area": float(areas[i]),
            "iscrowd": 0,
        }
        if kind == "mask":
            row["segmentation"] = found["masks"][i]
        if kind == "keypoints":
            row["keypoints"] = found["keypoints"][i].flatten().tolist()
        rows.append(row)
    return rows


def number(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number the rows from 1 on; the library marks objects without a match by 0."""
    return [{**row, "id": i} for i, row in enumerate(rows, 1)]


def ignore(*_: Any) -> None:
    """Print nothing."""
