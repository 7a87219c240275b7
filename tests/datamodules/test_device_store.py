"""Data on the device: the batches and the training are those of data on the host."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import Dataset

from datamodules import base
from datamodules.catalog.annotated_images import AnnotatedImage, Annotations
from datamodules.catalog.masked_image import MaskedSample
from datamodules.detection_datasets import InMemoryScenes, StreamedScenes
from datamodules.generation import InMemoryImages
from datamodules.io import device_store
from datamodules.io.copy_ahead import CopyAhead
from datamodules.io.image_refs import ImageRef
from datamodules.io.image_set import ImageSet
from datamodules.photographs import RandomCrops
from datamodules.segmentation_datasets import InMemoryTiles
from datamodules.superresolution_datasets import InMemoryPatches
from datamodules.transforms.augment import SpatialAugment
from datamodules.transforms.augment_objects import ObjectAugment
from datamodules.transforms.objects import encode_masks, mask_areas, mask_boxes
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.unpaired import UnpairedCrops
from tests.helpers.gpu_contract import DEVICE
from tests.helpers.method_contract import assert_equal, checkpoint, fit
from tests.helpers.subprocess_helpers import forked
from tests.tasks.detection import SMALL_NETWORK, write_detection_recipe
from tests.tasks.generation import write_generative_recipe
from tests.tasks.superresolution import write_recipe

DEFORMATION = SpatialAugment(rotate=True, hflip=True, zoom=1.2, elastic_std=5.0)


def random_images(channels: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((90, 120), (100, 70), (66, 80))
    return [torch.randint(256, (channels, *size), generator=generator, dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 17, 66])
def test_crops_on_the_device_equal_those_on_the_host(size, channels):
    """Patches may exceed their images by some pixels, and have all symmetries of the square."""
    buffer, generator = RaggedImageBuffer(random_images(channels)), np.random.default_rng(0)
    image_ids = generator.integers(0, 3, 200)
    lengths = np.stack([buffer.heights, buffer.widths])[:, image_ids]
    top, left = generator.integers(-5, np.maximum(lengths - size + 6, -4))
    symmetry = generator.integers(0, 8, 200)
    arguments = (image_ids, top, left, size, symmetry)
    assert torch.equal(buffer.crop_on_device(*arguments), buffer.crop_patches(*arguments))


def random_tiles(augment):
    """Tiles with weights, of images with two classes."""
    samples = []
    for image in random_images():
        mask = (image[0].numpy() > 127).astype(np.uint8)
        samples.append(MaskedSample(image, mask, np.zeros(mask.shape, np.int32), instances=False))
    return InMemoryTiles(samples, crop=40, margin=12, augment=augment, seed=1, weight=10.0)


def datasets():
    images = random_images()
    labels = torch.tensor([2, 0, 1])
    squares = torch.stack([image[:, :64, :64] for image in images])
    return [
        InMemoryImages(ImageSet(squares, labels)),
        RandomCrops(RaggedImageBuffer(images), labels, 66, seed=1),
        UnpairedCrops(images, images[::-1], 60, hflip=True, seed=1),
        InMemoryPatches(RaggedImageBuffer(images), seed=1, size=20, grid=2, border_overhang=4),
        random_tiles(SpatialAugment()),
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu, id="gpu")])
@pytest.mark.parametrize("items", datasets(), ids=lambda items: type(items).__name__)
def test_batches_of_stored_data_are_the_same(items, device):
    deferred = device_store.DeferredItems(items.on_device(torch.device(device)))
    slice_ = (40, np.array([2, 0, 1, 1]))
    expected, found = items[slice_], deferred.read(deferred[slice_])
    assert isinstance(items, device_store.Storable)
    assert items.n_bytes > 3 * 60 * 60
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].device.type == device
            assert torch.equal(found[name].cpu(), value)
        else:
            assert found[name] == value


@pytest.mark.parametrize("items", datasets(), ids=lambda items: type(items).__name__)
def test_batches_of_stored_data_are_made_on_the_device(items):
    """Tensors of the device meta have no values: an operation that reads one raises an error."""
    if isinstance(items, InMemoryTiles):
        items = random_tiles(DEFORMATION)
    slice_ = (40, np.array([2, 0, 1, 1]))
    expected, found = items[slice_], items.on_device(torch.device("meta"))[slice_]
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].device.type == "meta"
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)


@pytest.mark.gpu
def test_deformed_tiles_differ_by_rounding_errors_on_the_device():
    items = random_tiles(DEFORMATION)
    slice_ = (40, np.array([2, 0, 1, 1]))
    expected, found = items[slice_], items.on_device(torch.device(DEVICE))[slice_]
    difference = (found["image"].cpu().int() - expected["image"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert (found["mask"].cpu() != expected["mask"]).float().mean() < 0.01
    assert (found["weight"].cpu() - expected["weight"]).abs().max() < 1e-2


class CountedBatches(Dataset):
    """Six batches; counts those that were read."""

    def __init__(self):
        self.n_read = 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.n_read += 1
        return {"image": torch.full((3,), index), "objects": [{"boxes": torch.full((2,), index)}], "start": index}


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu, id="gpu")])
def test_batches_are_copied_two_ahead_and_in_order(device):
    dataset = CountedBatches()
    for i, batch in enumerate(CopyAhead(dataset, torch.device(device), batch_size=None)):
        assert dataset.n_read == min(i + 3, 6)
        assert batch["start"] == i
        for tensor in (batch["image"], batch["objects"][0]["boxes"]):
            assert tensor.device.type == device
            assert (tensor == i).all()
    assert i == 5


def test_processes_that_load_batches_to_copy_end_with_the_loop():
    """Lightning ends them after the training, before the test."""
    loader = CopyAhead(CountedBatches(), torch.device("cpu"), batch_size=None, num_workers=1, persistent_workers=True)
    combined = CombinedLoader(loader)
    next(iter(combined))
    (worker,) = loader._iterator._workers
    combined.reset()
    assert not worker.is_alive()


@dataclass(frozen=True)
class DrawnScene(AnnotatedImage):
    """Noise with five objects, one of them a crowd, whose masks are scattered pixels, and two keypoints of each."""

    seed: int

    def read(self):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(256, (3, 70, 90), generator=generator, dtype=torch.uint8)

    def annotations(self, height, width):
        generator = np.random.default_rng(self.seed)
        masks = np.zeros((5, height, width), bool)
        for mask, top, left in zip(masks, generator.integers(0, 40, 5), generator.integers(0, 60, 5), strict=True):
            mask[top : top + 30, left : left + 30] = generator.random((30, 30)) < 0.2
        keypoints = generator.integers(0, 70, (5, 2, 3)).astype(np.float32)
        keypoints[..., 2] = generator.integers(0, 3, (5, 2))
        keypoints *= keypoints[..., 2:] > 0
        codes = encode_masks(torch.from_numpy(masks))
        crowd = np.arange(5) == 3
        return Annotations(mask_boxes(codes), np.arange(1, 6), codes, mask_areas(codes), crowd, keypoints)


def scenes(kind=InMemoryScenes, masks=True, **augment):
    images = [DrawnScene(ImageRef("drawn", str(seed), Path()), seed) for seed in range(3)]
    return kind(images, masks, ObjectAugment(mirrored_keypoints=[1, 0], **augment), seed=1)


AUGMENTS = [
    {"hflip": False},
    {"crop": 40, "symmetries": True},
    {"crop": 40, "zoom": 1.5, "short_sides": [60, 100], "symmetries": True},
]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param(DEVICE, marks=pytest.mark.gpu, id="gpu")])
def test_scenes_on_the_device_equal_those_on_the_host(device, augment, masks):
    """Interpolated pixels differ by at most 1 where the device rounds otherwise. Tensors without data allow no copy back."""
    items = scenes(masks=masks, **augment)
    assert isinstance(items, device_store.Storable)
    assert not isinstance(scenes(StreamedScenes), device_store.Storable)
    assert items.n_bytes > 3 * 3 * 70 * 90
    stored = items.on_device(torch.device(device))
    for start in range(0, 40, 4):
        slice_ = (start, np.array([2, 0, 1, 1]))
        host, streamed, found = items[slice_], scenes(StreamedScenes, masks, **augment)[slice_], stored[slice_]
        for i in range(4):
            expected, given = host["image"][i], found["image"][i]
            assert given.shape == expected.shape
            assert given.device.type == device
            if device != "meta":
                assert (given.cpu().int() - expected.int()).abs().max() <= (device != "cpu" and "zoom" in augment)
            assert found["objects"][i].keys() == host["objects"][i].keys() == streamed["objects"][i].keys()
            assert ("masks" in found["objects"][i]) == masks
            for name, values in host["objects"][i].items():
                assert torch.equal(values, streamed["objects"][i][name])
                assert found["objects"][i][name].shape == values.shape
                assert found["objects"][i][name].device.type == device
                assert device == "meta" or torch.equal(found["objects"][i][name].cpu(), values)


def fit_with_stored_data(recipe, *overrides):
    read = device_store.DeferredItems.read
    calls = []
    device_store.DeferredItems.read = lambda self, batch: calls.append(batch) or read(self, batch)
    base.fits = lambda n_bytes, device: True
    fit(recipe, *overrides)
    assert len(calls) == 15


def fit_with_copied_batches(recipe, *overrides):
    base.copies_ahead = lambda device: True
    fit(recipe, "--data.num_workers", "1", *overrides)


@pytest.mark.parametrize("task", ["super-resolution", "generation", "detection"])
def test_training_on_stored_data_and_on_copied_batches_is_the_same(workdir, photos, monkeypatch, task):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    if task == "generation":
        model = {"channels": 1, "size": 28, "hidden_dim": 16, "total_images": 60}
        recipe = write_generative_recipe(workdir / "tiny.yaml", {"class_path": "modules.gan.GAN", "init_args": model})
    elif task == "detection":
        model = {"class_path": "modules.mask_rcnn.MaskRCNN", "init_args": {**SMALL_NETWORK, "total_images": 60}}
        recipe = write_detection_recipe(workdir / "tiny.yaml", model)
    else:
        model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
        recipe = write_recipe(workdir / "tiny.yaml", photos, model)
    assert forked(fit, recipe, "--run", "host") == 0
    assert forked(fit_with_stored_data, recipe, "--run", "device") == 0
    assert forked(fit_with_copied_batches, recipe, "--run", "copies") == 0
    host, *others = (checkpoint(workdir, recipe, run)["state_dict"] for run in ("host", "device", "copies"))
    for other in others:
        assert_equal(host, other)


def test_data_are_stored_if_they_take_a_fifth_of_the_memory(monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    assert device_store.fits(200, gpu)
    assert not device_store.fits(201, gpu)
    assert not device_store.fits(1, torch.device("cpu"))
