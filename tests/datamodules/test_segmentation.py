"""Images with masks: files, validation, augmentation and pixel weights."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, label, map_coordinates
from skimage.segmentation import find_boundaries

from datamodules.catalog.catalog import DatasetNotFound, catalog
from datamodules.catalog.masked_image import MaskedImage, MaskSpec
from datamodules.catalog.masked_images import list_masked_images
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import ImageRef
from datamodules.segmentation import Segmentation, StreamedTiles
from datamodules.transforms.augment import SpatialAugment
from datamodules.transforms.downsample import downsample_image, downsample_mask
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.weight_map import border_weight, class_weights, separate_instances


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three images and masks of three classes."""
    generator = np.random.default_rng(0)
    for name in ("a", "b", "deep/c"):
        for subfolder in ("images", "masks"):
            (tmp_path / "mine" / subfolder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"mine/images/{name}.jpg")
        Image.fromarray(generator.integers(0, 3, (40, 50), np.uint8)).save(tmp_path / f"mine/masks/{name}.png")
    return tmp_path / "mine"


def data_of(folder, **options):
    data = Segmentation(str(folder), str(folder), 3, crop=16, **options)
    data.setup("fit")
    return data


# Files and validation


def test_folder_pairs_each_image_with_its_mask(folder):
    masked_images = list_masked_images(str(folder))
    assert [masked_image.image.name for masked_image in masked_images] == ["a", "b", "deep/c"]
    pixels, mask = masked_images[2].read(3)
    assert pixels.shape == (3, 40, 50)
    assert (mask == np.asarray(Image.open(folder / "masks/deep/c.png"))).all()
    (folder / "masks/b.png").unlink()
    with pytest.raises(DatasetNotFound, match=r"b\.jpg .*masks/b\.png"):
        list_masked_images(str(folder))


def test_unusable_masks_raise(folder):
    def raises_for(values):
        Image.fromarray(values).save(folder / "masks/b.png")
        return pytest.raises(InvalidImage, match=pattern)

    pattern = r"b\.png: 50x39 .*50x40"
    with raises_for(np.zeros((39, 50), np.uint8)):
        data_of(folder)
    pattern = r"1 of 3 .*b\.png: .* 7 .*data\.num_classes"
    with raises_for(np.full((40, 50), 7, np.uint8)):
        data_of(folder)
    Image.fromarray(np.full((40, 50), 0.5, np.float32)).save(folder / "masks/b.tif")
    (folder / "masks/b.png").unlink()
    with pytest.raises(InvalidImage, match=r"b\.tif: .*negative"):
        data_of(folder)
    (folder / "masks/b.tif").unlink()
    pattern = r"b\.png: .*class ids"
    with raises_for(np.zeros((40, 50, 3), np.uint8)):
        data_of(folder)
    Image.fromarray(np.full((40, 50), 255, np.uint8)).save(folder / "masks/b.png")  # all pixels ignored
    data_of(folder)


def test_mask_values_are_mapped_to_classes(tmp_path):
    values = np.array([[0, 255, 30], [255, 0, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    image = ImageRef("mine", "mask", tmp_path / "mask.png")
    masked_image = MaskedImage(image, image.path, MaskSpec(value_map={0: 1, 255: 0}, default_class=255))
    assert masked_image.read_mask().tolist() == [[1, 0, 255], [0, 1, 1]]
    strict = MaskedImage(image, image.path, MaskSpec(value_map={0: 1, 255: 0}))
    with pytest.raises(InvalidImage, match=r"mask\.png: .*30 .*0, 255"):
        strict.read_mask()


def test_coins_splits_are_disjoint_columns_with_24_coins():
    """The image has 24 coins in four rows."""
    train, val = (list_masked_images(f"coins/{split}")[0].load(1) for split in ("train", "val"))
    assert (train.mask.shape, val.mask.shape) == ((303, 256), (303, 128))
    assert train.instance_ids.max() + val.instance_ids.max() == pytest.approx(26, abs=3)  # the split divides some coins
    assert 0.25 < train.mask.mean() < 0.5


def test_mask_paths_follow_the_original_layouts(workdir):
    cases = {
        "isbi2012-em/train": ("ISBI2012-EM/train/image/3.png", "ISBI2012-EM/train/label/3.png"),
        "camvid/val": ("CamVid/val/x.png", "CamVid/valannot/x.png"),
        "dsb2018/train": ("DSB2018/train/images/ab.png", "DSB2018/train/masks/ab.png"),
        "phc-u373/train": ("PhC-C2DH-U373/01/t002.tif", "PhC-C2DH-U373/01_GT/SEG/man_seg002.tif"),
        "dic-hela/val": ("DIC-C2DH-HeLa/02/t067.tif", "DIC-C2DH-HeLa/02_GT/SEG/man_seg067.tif"),
    }
    for spec, (image, mask) in cases.items():
        entry = catalog()[spec.partition("/")[0]]
        path = workdir / "data" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert entry.files(spec.partition("/")[2]) == [path]
        source, target = entry.masks["replace"]
        assert workdir / "data" / mask == workdir / "data" / entry.folder / re.sub(source, target, image.partition("/")[2])


def test_frames_without_masks_are_skipped_if_allowed(workdir):
    root = workdir / "data/PhC-C2DH-U373"
    for path in ("01/t000.tif", "01/t001.tif", "01_GT/SEG/man_seg001.tif"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / path)
    assert [masked_image.image.name for masked_image in list_masked_images("phc-u373/train")] == ["t001"]
    (root / "01_GT/SEG/man_seg001.tif").unlink()
    with pytest.raises(DatasetNotFound, match=r"phc-u373/train: .* 2 images"):
        list_masked_images("phc-u373/train")


def test_voc_is_read_and_missing_datasets_or_masks_raise(workdir):
    with pytest.raises(DatasetNotFound, match=r"voc/train .*darkroom data get voc"):
        list_masked_images("voc/train")
    with pytest.raises(DatasetNotFound, match=r"cityscapes/val .*manually"):
        list_masked_images("cityscapes/val")
    with pytest.raises(UserError, match=r"set5 .*coins"):
        list_masked_images("set5")
    root = workdir / "data/VOC/VOCdevkit/VOC2012"
    for subfolder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / subfolder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n")
    Image.new("RGB", (6, 5)).save(root / "JPEGImages/2007_000033.jpg")
    palette = Image.fromarray(np.array([[0, 1, 255, 0, 0, 0]] * 5, np.uint8), "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(root / "SegmentationClass/2007_000033.png")
    (masked_image,) = list_masked_images("voc/val")
    assert masked_image.load(3).mask[0].tolist() == [0, 1, 255, 0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "count", "shape", "instances"),
    [
        ("isbi2012-em/train", 15, (1, 512, 512), False),
        ("isbi2012-em/val", 5, (1, 512, 512), False),
        ("dsb2018/val", 37, None, True),
        ("camvid/test", 39, (3, 360, 480), False),
    ],
)
def test_real_datasets_have_expected_sizes_and_classes(with_real_data, spec, count, shape, instances):
    masked_images = list_masked_images(spec)
    assert len(masked_images) == count
    sample = masked_images[0].load(1 if shape and shape[0] == 1 else 3)
    assert shape is None or tuple(sample.pixels.shape) == shape
    assert sample.instances == instances
    assert set(np.unique(sample.mask)) <= {*range(12), 255}


def test_invalid_options_and_duplicate_names_raise(folder):
    for options in ({"num_classes": 300}, {"channels": 4}, {"downscale": 0}, {"crop": 0}, {"margin": 3}, {"zoom": 0.5}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(options))}: "):
            Segmentation(str(folder), str(folder), **{"num_classes": 3, **options})
    with pytest.raises(UserError, match=r"coins .*'test'.* train, val"):
        list_masked_images("coins/test")
    Image.new("RGB", (50, 40)).save(folder / "images/a.bmp")
    with pytest.raises(InvalidImage, match=r"a\.bmp .*a\.jpg"):
        list_masked_images(str(folder))


def test_masks_with_values_0_and_255_raise_without_instances(folder):
    for name in ("a", "b", "deep/c"):
        mask = np.asarray(Image.open(folder / f"masks/{name}.png"))
        Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8)).save(folder / f"masks/{name}.png")
    with pytest.raises(UserError, match=r"a\.png: .*data\.mask_format binary"):
        data_of(folder)
    data_of(folder, instances=True)  # one object per image


def test_one_channel_images_are_luma(folder):
    pixels, _ = list_masked_images(str(folder))[0].read(1)
    expected = np.asarray(Image.open(folder / "images/a.jpg").convert("L")).astype(int)
    assert np.abs(pixels[0].numpy().astype(int) - expected).max() <= 1


def test_streaming_separates_touching_objects(tmp_path):
    for subfolder in ("images", "masks"):
        (tmp_path / subfolder).mkdir()
    cells = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((12, 12))).astype(np.uint16)
    Image.fromarray(cells).save(tmp_path / "masks/a.png")
    Image.fromarray((20 * cells).astype(np.uint8)).save(tmp_path / "images/a.png")
    masks = []
    for streaming in (False, True):
        data = Segmentation(str(tmp_path), str(tmp_path), 2, channels=1, crop=36, instances=True, streaming=streaming)
        data.setup("fit")
        masks.append(take(data, 1)[0]["mask"])
    assert torch.equal(*masks)
    assert label(masks[0][0])[1] == 9


# Tiles


def take(data, count):
    return [data.prepare_train_batch(batch) for _, batch in zip(range(count), data.train_dataloader(), strict=False)]


def test_train_batches_have_documented_keys_shapes_and_range(folder):
    (batch,) = take(data_of(folder, margin=8, batch_size=2, rotate=True, zoom=1.5, elastic_std=3, contrast_jitter=0.3), 1)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((2, 3, 24, 24), torch.float32),
        "mask": ((2, 16, 16), torch.int64),
    }
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1


def test_undeformed_tile_is_a_crop_of_its_image(folder):
    data = data_of(folder, margin=4, batch_size=3)
    (batch,) = take(data, 1)
    samples = [masked_image.load(3) for masked_image in list_masked_images(str(folder))]
    for image, mask in zip(batch["image"], batch["mask"], strict=True):
        full = [np.pad(sample.pixels, ((0, 0), (2, 2), (2, 2)), "reflect") for sample in samples]
        windows = [np.lib.stride_tricks.sliding_window_view(pixels, (20, 20), (1, 2))[0] for pixels in full]
        image_bytes = (image[0] * 255).round().byte().numpy()
        matches = [
            (i, *offset) for i, window in enumerate(windows) for offset in np.argwhere((window == image_bytes).all((2, 3)))
        ]
        ((image_id, top, left),) = matches
        assert (samples[image_id].mask[top : top + 16, left : left + 16] == mask.numpy()).all()


def test_samples_are_a_function_of_seed_and_position(folder):
    options = {"rotate": True, "hflip": True, "elastic_std": 4, "zoom": 1.3, "contrast_jitter": 0.2}
    full = take(data_of(folder, batch_size=4, **options), 2)
    resumed = data_of(folder, batch_size=4, **options)
    resumed.position = lambda: 4
    (second,) = take(resumed, 1)
    assert torch.equal(second["image"], full[1]["image"])
    smaller = take(data_of(folder, batch_size=2, **options), 2)
    assert torch.equal(torch.cat([batch["mask"] for batch in smaller]), full[0]["mask"])
    assert not torch.equal(full[0]["image"], take(data_of(folder, batch_size=4, seed=1, **options), 1)[0]["image"])


def test_streamed_tiles_equal_in_memory_tiles(folder):
    options = {"batch_size": 3, "rotate": True, "elastic_std": 3, "margin": 4}
    in_memory, streamed = data_of(folder, **options), data_of(folder, streaming=True, **options)
    assert isinstance(streamed.tiles, StreamedTiles)
    items = np.array([2, 0, 1])
    image_ids = np.array([np.flatnonzero(in_memory.tiles.image_ids == item)[0] for item in items])
    in_memory_batch, streamed_batch = in_memory.tiles[5, image_ids], streamed.tiles[5, items]
    assert all(torch.equal(in_memory_batch[key], streamed_batch[key]) for key in ("image", "mask"))
    with pytest.raises(UserError, match=r"data\.border_weight: .*data\.streaming"):
        Segmentation(str(folder), str(folder), 3, streaming=True, border_weight=10.0)


def test_mask_and_image_are_deformed_equally(tmp_path):
    """The image equals its mask before and after augmentation."""
    for subfolder in ("images", "masks"):
        (tmp_path / subfolder).mkdir()
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (12, 12)), np.ones((8, 8))).astype(np.uint8)
    Image.fromarray(mask * 255).save(tmp_path / "images/a.png")
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    options = {"rotate": True, "hflip": True, "zoom": 1.4, "elastic_std": 2}
    data = Segmentation(str(tmp_path), str(tmp_path), 2, channels=1, crop=40, margin=8, batch_size=6, **options)
    data.setup("fit")
    (batch,) = take(data, 1)
    visible = (batch["image"][:, 0, 4:-4, 4:-4] > 0.5).long()
    assert (visible != batch["mask"]).float().mean() < 0.02
    assert len({sample.numpy().tobytes() for sample in batch["mask"]}) == 6


def test_sampling_matches_scipy_map_coordinates():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 9, 7), np.uint8))
    buffer = RaggedImageBuffer([torch.zeros(2, 3, 3, dtype=torch.uint8), pixels])
    coords = torch.from_numpy(np.random.default_rng(1).uniform(-12, 20, (1, 2, 5, 6))).float()
    image_ids = np.array([1])
    for actual, order in ((buffer.sample_bilinear(image_ids, coords), 1), (buffer.sample_nearest(image_ids, coords), 0)):
        for channel in range(2):
            expected = map_coordinates(pixels[channel].double().numpy(), coords[0].numpy(), order=order, mode="mirror")
            assert np.allclose(actual[0, channel].numpy(), expected, atol=1e-4)


def test_elastic_field_is_smooth_with_requested_std():
    augment = SpatialAugment(elastic_std=10)
    field = augment.elastic_field(0, range(400), 33)
    assert field.shape == (400, 2, 33, 33)
    assert field[:, :, ::16, ::16].std().item() == pytest.approx(10, rel=0.05)
    ends = field[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.corrcoef(ends.T).fill_diagonal_(0).abs().max() < 0.2  # corners are independent
    steps = (field[..., 1:, :] - field[..., :-1, :]).abs()
    assert steps.max() < 10  # smooth between grid points


def test_rotation_zoom_and_flip_are_similarities():
    lengths = np.full(50, 100)
    coords = SpatialAugment(rotate=True, hflip=True, zoom=2.0).sampling_grid(0, range(50), lengths, lengths, 20, 10)
    row_steps, column_steps = coords[:, :, 1:, :] - coords[:, :, :-1, :], coords[:, :, :, 1:] - coords[:, :, :, :-1]
    size = row_steps.norm(dim=1).mean((1, 2))
    assert torch.allclose(column_steps.norm(dim=1).mean((1, 2)), size, atol=1e-4)
    assert 0.5 <= size.min() < 0.7 < 1.5 < size.max() <= 2.0
    determinants = row_steps[:, 0, :, :-1] * column_steps[:, 1, :-1] - row_steps[:, 1, :, :-1] * column_steps[:, 0, :-1]
    assert {-1.0, 1.0} == set(determinants.mean((1, 2)).sign().tolist())


def test_downscale_keeps_mask_values_at_block_centers(folder):
    pixels, mask = list_masked_images(str(folder))[0].read(3, downscale=3)
    assert pixels.shape == (3, 13, 16)
    steps = torch.arange(47, dtype=torch.uint8).view(1, 47, 1).expand(1, 47, 16)  # pixel value = row index
    assert (downsample_image(steps, 8)[0, 1:-1, 0].numpy() == downsample_mask(steps[0].numpy(), 8)[1:-1, 0]).all()
    full = np.asarray(Image.open(folder / "masks/a.png"))
    assert (mask == full[1:39:3, 1:48:3]).all()
    assert (downsample_mask(full, 1) == full).all()


# Pixel weights


def test_border_weight_matches_equation_2():
    generator = np.random.default_rng(0)
    cells = label(generator.random((60, 70)) < 0.02)[0]
    cells[40:50, 10:20] = cells.max() + 1
    distances = np.sort([distance_transform_edt(cells != i) for i in np.unique(cells[cells > 0])], axis=0)
    expected = 10 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * 5**2))
    actual = border_weight(cells)
    assert np.allclose(actual[cells == 0], expected[cells == 0], atol=1e-4)
    assert (actual[cells > 0] == 0).all()
    assert (border_weight(np.zeros((5, 5), int)) == 0).all()
    assert (border_weight((label(np.eye(9))[0] == 1).astype(int)) < 1e-3).all()  # a single cell


def test_class_weights_balance_classes():
    counts = np.array([900, 100, 0])
    weights = class_weights(counts)
    assert weights[0] * 900 == pytest.approx(weights[1] * 100)
    assert (weights * counts).sum() / 1000 == pytest.approx(1)
    assert weights[2] == 0


def test_separate_instances_separates_touching_cells():
    cells = np.repeat(np.repeat(np.arange(1, 7).reshape(2, 3), 8, 0), 8, 1)
    separated = separate_instances(cells)
    assert label(separated > 0)[1] == 6
    assert ((separated == 0) == find_boundaries(cells, connectivity=2, mode="thick")).all()
    isolated = np.pad(np.ones((4, 4), int), 3)
    assert (separate_instances(isolated) == isolated).all()
