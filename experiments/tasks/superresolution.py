"""Super-resolution: inputs of `predict`, PIL baseline and inference benchmark."""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.writers.image_writer import ImageWriter
from datamodules.catalog.catalog import DatasetNotFound, resolve_images
from datamodules.io.image_refs import list_image_refs
from datamodules.io.user_images import SuperResolutionInputs
from datamodules.superresolution import SuperResolution
from datamodules.superresolution_datasets import SREvalImages
from experiments.bench.timing import count_flops, median_seconds
from experiments.tasks.pil import to_tensor
from experiments.tasks.task import Task
from modules.srcnn import SRCNN


def predict(cli: Any, files: Sequence[Path], paths: dict[str, Path], output: Path) -> tuple[SuperResolutionInputs, ImageWriter]:
    """Return a dataset of luma or RGB inputs and a writer of upscaled images."""
    return SuperResolutionInputs(files, cli.model.channels), ImageWriter(paths)


class PilPatches(Dataset[dict[str, Tensor]]):
    """Pairs of low- and high-resolution patches; each item opens an image file, crops, flips or turns, blurs and resizes."""

    def __init__(self, data: SuperResolution) -> None:
        self.files, self.scale = resolve_images(data.train, data.scale), data.scale
        self.mode = "RGB" if data.channels == 3 else "L"
        self.size, self.blur = data.scale * data.patch_size, data.blur

    def __len__(self) -> int:
        return 100 * len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = Image.open(self.files[index % len(self.files)]).convert(self.mode)
        left, top = (int(torch.randint(max(1, length - self.size + 1), ())) for length in image.size)
        high = image.crop((left, top, left + self.size, top + self.size))
        symmetry = int(torch.randint(8, ()))
        high = high.transpose(Image.Transpose(symmetry)) if symmetry < 7 else high
        blurred = high.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else high
        low = blurred.resize((self.size // self.scale,) * 2, Image.Resampling.BICUBIC)
        return {"input": to_tensor(low), "target": to_tensor(high)}


def bench_inference(method: Any, data: SuperResolution) -> dict[str, Any]:
    """Return the mean inference time per image, for the method and for SRCNN 9-5-5, and the ratios of time and FLOPs.

    The images are those of Set14, or of photographs/test if Set14 is not installed. Times are in milliseconds.
    """
    name = "set14"
    try:
        image_refs = list_image_refs(name)
    except DatasetNotFound:
        name = "photographs/test"
        image_refs = list_image_refs(name)
    images = SREvalImages(image_refs, method.scale, method.channels)
    inputs = [images[i]["input"].to(method.device) for i in range(len(images))]
    networks = (method, SRCNN(method.scale, "9-5-5").eval().to(method.device))
    ours, srcnn = (
        1000 * statistics.fmean(median_seconds(partial(network, image), method.device) for image in inputs)
        for network in networks
    )
    flops, flops_srcnn = (count_flops(partial(network, inputs[0])) for network in networks)
    return {
        "inference_set": name,
        "inference_ms": ours,
        "inference_ms_srcnn": srcnn,
        "srcnn_to_ours": srcnn / ours,
        "srcnn_to_ours_flops": flops_srcnn / flops,
        "srcnn_to_ours_theory": 2.5 * method.scale**2,  # ESPCN paper, Section 1
    }


TASK = Task(SuperResolution, PilPatches, bench_inference, predict)
