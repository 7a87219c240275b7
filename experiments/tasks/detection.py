"""Detection: inputs of `predict`, PIL baseline and inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.writers.detection_writer import DetectionWriter
from datamodules.catalog.annotated_images import list_annotated_images
from datamodules.detection import Detection
from datamodules.io.user_images import PhotographInputs
from datamodules.transforms.objects import decode_masks
from experiments.bench.timing import median_seconds
from experiments.tasks.pil import to_tensor
from experiments.tasks.task import Task
from modules.tasks.detection import DetectionMethod

DEFAULT_SCORE = 0.5
CHANGES = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE)
BENCH_SIDES = (480, 640)  # height and width of the image of `bench_inference`, unless the recipe crops its images


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[Dataset[Any], DetectionWriter]:
    """Return a dataset of photographs and a writer of detections with at least the score `--score`."""
    score = DEFAULT_SCORE if cli.config.score is None else cli.config.score
    data = cli.datamodule
    return PhotographInputs(files, min_side=1), DetectionWriter(paths, output, score, data.class_names, data.skeleton)


class PilScenes(Dataset[dict[str, Any]]):
    """Images with objects: PIL resizes, crops and flips (or transposes) each image and each of its masks."""

    def __init__(self, data: Detection) -> None:
        self.data = data
        self.images = list_annotated_images(data.train, data.num_keypoints, data.category_ids, data.persons).images

    def __len__(self) -> int:
        return 100 * len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        data, source = self.data, self.images[index % len(self.images)]
        pixels = source.read()
        height, width = pixels.shape[-2:]
        annotations = source.annotations(height, width)
        window = data.augment.window(height, width, torch.rand(7).double().numpy())
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        size, flips = (window.new_width, window.new_height), (torch.rand(3) < 0.5).tolist()

        def transform(image: Image.Image, resample: Image.Resampling) -> Image.Image:
            image = image.crop(box).resize(size, resample)
            for flip, change in zip(flips, CHANGES if data.augment.symmetries else CHANGES[:1], strict=False):
                image = image.transpose(change) if flip else image
            return image

        photograph = transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()), Image.Resampling.BILINEAR)
        objects: dict[str, list[Tensor]] = {"boxes": [], "labels": [], "masks": [], "keypoints": []}
        for i, mask in enumerate(decode_masks(annotations.masks, height, width)):
            moved = np.asarray(transform(Image.fromarray(mask.numpy()), Image.Resampling.NEAREST))
            rows, columns = np.nonzero(moved)
            if annotations.crowd[i] or not len(rows):
                continue
            ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            objects["boxes"].append(torch.tensor(ends, dtype=torch.float32))
            objects["labels"].append(torch.tensor(annotations.labels[i]))
            objects["masks"].append(torch.from_numpy(moved.copy()))
            objects["keypoints"].append(torch.from_numpy(annotations.keypoints[i]))
        shapes = {"boxes": (0, 4), "masks": (0, size[1], size[0]), "keypoints": (0, data.num_keypoints, 3)}
        stacked = {
            name: torch.stack(values) if values else torch.zeros(shapes.get(name, (0,)), dtype=TYPES.get(name, torch.float32))
            for name, values in objects.items()
            if name != "keypoints" or data.num_keypoints
        }
        return {"image": to_tensor(photograph), "objects": stacked}

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return lists of images and of objects, which have different sizes."""
        return {name: [item[name] for item in items] for name in items[0]}


TYPES = {"labels": torch.int64, "masks": torch.uint8}


def bench_inference(method: DetectionMethod, data: Detection) -> dict[str, Any]:
    """Return "ms_per_image", the time of a detection in an image of 640 x 480 pixels, or of the size of the training crops."""
    sides = BENCH_SIDES if data.crop is None else (data.crop, data.crop)
    image = [torch.rand(3, *sides, device=method.device)]
    return {"ms_per_image": 1000 * median_seconds(lambda: method.predict(image), method.device)}


TASK = Task(Detection, PilScenes, bench_inference, predict, ("score",))
