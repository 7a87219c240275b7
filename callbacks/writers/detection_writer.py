"""Writer of detections: overlays, label maps, and a file in the format of COCO."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from callbacks.metrics.ranks import gather
from datamodules.errors import escape_controls
from datamodules.transforms.draw_objects import draw_objects
from datamodules.transforms.objects import encode_masks, label_map

MAX_OBJECTS = 2**16 - 1  # in a label map of 16 bits
OVERLAY_SIZE = 640  # approximate size of the shorter side of the drawing of a smaller image


class DetectionWriter(BasePredictionWriter):
    """Callback that writes the detections of each image, and those of all images to `annotations.json`.

    For each image, it writes a drawing to the folder `overlays`, enlarged if the image is small. If the method predicts masks,
    it also writes a map of instance ids as a gray PNG of 16 bits: i for the detection with the i-th highest score, 0 for the
    background. Where masks overlap, the higher score counts. The file has the format of an annotation file of COCO, with the
    score of each annotation.

    Args:
        targets: output file of each label map, by the "path" of its image.
        output: folder of the output files.
        score: lowest score of a detection that is written.
        names: names of the classes by label.
        skeleton: pairs of indices of connected keypoints.
    """

    def __init__(
        self, targets: dict[str, Path], output: Path, score: float, names: Sequence[str], skeleton: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__("batch")
        self.targets, self.output, self.score, self.names, self.skeleton = targets, output, score, names, skeleton
        self.numbers = {path: i for i, path in enumerate(targets, 1)}
        self.content: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}  # image and annotations by number

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the files of one image and print its name."""
        path, image = prediction["path"], prediction["image"][0].cpu()
        height, width = image.shape[-2:]
        found = {name: values.cpu() for name, values in prediction["prediction"][0].items()}
        found = {name: values[found["scores"] >= self.score] for name, values in found.items()}
        target = self.targets[path]
        overlay_path = self.output / "overlays" / target.relative_to(self.output)
        scale = max(1, round(OVERLAY_SIZE / min(height, width)))  # so that captions are legible
        drawing = draw_objects(image, found, self.names, self.skeleton, scale)
        save((drawing * 255).round().byte().permute(1, 2, 0), overlay_path)
        if "masks" in found:
            save(label_map(found["masks"][:MAX_OBJECTS]).to(torch.uint16), target)
        entry = {"id": self.numbers[path], "file_name": path, "height": height, "width": width}
        self.content[self.numbers[path]] = (entry, coco_annotations(found, self.numbers[path]))
        written = target if "masks" in found else overlay_path
        print(escape_controls(f"{path}  {width}x{height}  {len(found['scores'])} objects  ->  {written}"), flush=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the annotations of all processes to one file."""
        if parts := gather(self.content, trainer.world_size):
            self.write_annotations({number: entry for part in parts for number, entry in part.items()})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the annotations of the images so far if the command is interrupted."""
        if self.content and trainer.is_global_zero:
            self.write_annotations(self.content)

    def write_annotations(self, content: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
        """Write an annotation file in the format of COCO."""
        entries = [content[number] for number in sorted(content)]
        annotations = [row for _, rows in entries for row in rows]
        used = {row["category_id"] for row in annotations}
        names = dict(enumerate(self.names)) | {label: f"class {label}" for label in used if label >= len(self.names)}
        file = {
            "images": [image for image, _ in entries],
            "annotations": [{"id": number, **row} for number, row in enumerate(annotations, 1)],
            "categories": [
                {"id": label, "name": name or f"class {label}"} for label, name in names.items() if name or label in used
            ],
        }
        path = self.output / "annotations.json"
        path.write_text(json.dumps(file))
        print(f"{len(annotations)} objects in {len(entries)} images  ->  {path}", flush=True)


def save(pixels: Tensor, path: Path) -> None:
    """Write an image, uint8 or uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def coco_annotations(found: dict[str, Tensor], image_id: int) -> list[dict[str, Any]]:
    """Return detections as annotations in the format of COCO, without ids."""
    codes = encode_masks(found["masks"]) if "masks" in found else []
    rows = []
    for i, (left, top, right, bottom) in enumerate(found["boxes"].tolist()):
        row: dict[str, Any] = {
            "image_id": image_id,
            "category_id": int(found["labels"][i]),
            "bbox": [left, top, right - left, bottom - top],
            "score": float(found["scores"][i]),
            "area": float(found["masks"][i].sum()) if codes else (right - left) * (bottom - top),
            "iscrowd": 0,
        }
        if codes:
            row["segmentation"] = {"size": list(codes[i]["size"]), "counts": codes[i]["counts"].decode()}
        if "keypoints" in found:
            points = found["keypoints"][i].clone()
            points[:, 2] = 2  # visible, in the format of COCO
            row |= {"keypoints": points.flatten().tolist(), "num_keypoints": len(points)}
        rows.append(row)
    return rows
