"""Pictures with masks: where they are found, how they are checked, deformed and weighed."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, label, map_coordinates
from skimage.segmentation import find_boundaries

from datamodules.catalog.catalog import DatasetNotFound, catalog
from datamodules.catalog.masked_images import MaskedImage, MaskSpec, list_masked_images
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
    """Three pictures of one's own with masks of three classes."""
    generator = np.random.default_rng(0)
    for name in ("a", "b", "deep/c"):
        for kind in ("images", "masks"):
            (tmp_path / "own" / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"own/images/{name}.jpg")
        Image.fromarray(generator.integers(0, 3, (40, 50), np.uint8)).save(tmp_path / f"own/masks/{name}.png")
    return tmp_path / "own"


def data_of(folder, **settings):
    data = Segmentation(str(folder), str(folder), 3, crop=16, **settings)
    data.setup("fit")
    return data


# What is where


def test_a_folder_of_ones_own(folder):
    found = list_masked_images(str(folder))
    assert [labelled.picture.name for labelled in found] == ["a", "b", "deep/c"]
    pixels, mask = found[2].read(3)
    assert pixels.shape == (3, 40, 50)
    assert (mask == np.asarray(Image.open(folder / "masks/deep/c.png"))).all()
    (folder / "masks/b.png").unlink()
    with pytest.raises(DatasetNotFound, match=r"b\.jpg has no mask .*masks/b\.png"):
        list_masked_images(str(folder))


def test_what_is_wrong_with_a_mask_is_named(folder):
    def spoiled(values):
        Image.fromarray(values).save(folder / "masks/b.png")
        return pytest.raises(InvalidImage, match=message)

    message = r"b\.png: 50x39 but 50x40 is its picture's size"
    with spoiled(np.zeros((39, 50), np.uint8)):
        data_of(folder)
    message = r"1 of 3 pictures of .* b\.png: the class 7 is none of 0 \.\.\. 2 \(data\.classes\)".replace(" b", ".* .*b")
    with spoiled(np.full((40, 50), 7, np.uint8)):
        data_of(folder)
    message = r"b\.png: fractions or negative numbers"
    Image.fromarray(np.full((40, 50), 0.5, np.float32)).save(folder / "masks/b.tif")
    (folder / "masks/b.png").unlink()
    with pytest.raises(InvalidImage, match=r"b\.tif: fractions or negative numbers"):
        data_of(folder)
    (folder / "masks/b.tif").unlink()
    message = r"b\.png: colours instead of class ids"
    with spoiled(np.zeros((40, 50, 3), np.uint8)):
        data_of(folder)
    Image.fromarray(np.full((40, 50), 255, np.uint8)).save(folder / "masks/b.png")  # all ignored
    data_of(folder)


def test_values_of_files_become_classes(tmp_path):
    values = np.array([[0, 255, 30], [255, 0, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    picture = ImageRef("own", "mask", tmp_path / "mask.png")
    labelled = MaskedImage(picture, picture.path, MaskSpec(values={0: 1, 255: 0}, default_class=255))
    assert labelled.read_mask().tolist() == [[1, 0, 255], [0, 1, 1]]
    strict = MaskedImage(picture, picture.path, MaskSpec(values={0: 1, 255: 0}))
    with pytest.raises(InvalidImage, match=r"mask\.png: the value 30 is none of 0, 255"):
        strict.read_mask()


def test_coins_are_found_and_the_halves_do_not_meet():
    """There are 24 coins in four rows."""
    train, val = (list_masked_images(f"coins/{part}")[0].load(1) for part in ("train", "val"))
    assert (train.mask.shape, val.mask.shape) == ((303, 256), (303, 128))
    assert train.instance_ids.max() + val.instance_ids.max() == pytest.approx(26, abs=3)  # some are cut in two
    assert 0.25 < train.mask.mean() < 0.5


def test_masks_of_the_catalogue_lie_where_their_origins_put_them(workplace):
    cases = {
        "isbi2012-em/train": ("ISBI2012-EM/train/image/3.png", "ISBI2012-EM/train/label/3.png"),
        "camvid/val": ("CamVid/val/x.png", "CamVid/valannot/x.png"),
        "dsb2018/train": ("DSB2018/train/images/ab.png", "DSB2018/train/masks/ab.png"),
        "phc-u373/train": ("PhC-C2DH-U373/01/t002.tif", "PhC-C2DH-U373/01_GT/SEG/man_seg002.tif"),
        "dic-hela/val": ("DIC-C2DH-HeLa/02/t067.tif", "DIC-C2DH-HeLa/02_GT/SEG/man_seg067.tif"),
    }
    for spec, (picture, mask) in cases.items():
        entry = catalog()[spec.partition("/")[0]]
        path = workplace / "data" / picture
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert entry.files(spec.partition("/")[2]) == [path]
        source, target = entry.masks["replace"]
        assert workplace / "data" / mask == workplace / "data" / entry.folder / re.sub(
            source, target, picture.partition("/")[2]
        )


def test_frames_without_a_mask_are_left_out_where_only_some_have_one(workplace):
    root = workplace / "data/PhC-C2DH-U373"
    for path in ("01/t000.tif", "01/t001.tif", "01_GT/SEG/man_seg001.tif"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / path)
    assert [labelled.picture.name for labelled in list_masked_images("phc-u373/train")] == ["t001"]
    (root / "01_GT/SEG/man_seg001.tif").unlink()
    with pytest.raises(DatasetNotFound, match="phc-u373/train: none of its 2 pictures has a mask"):
        list_masked_images("phc-u373/train")


def test_sets_through_torchvision_and_sets_without_masks(workplace):
    with pytest.raises(DatasetNotFound, match=r"voc/train is not here: darkroom data get voc"):
        list_masked_images("voc/train")
    with pytest.raises(DatasetNotFound, match=r"cityscapes/val is not here: by hand"):
        list_masked_images("cityscapes/val")
    with pytest.raises(UserError, match="set5 has no masks; sets that have: coins"):
        list_masked_images("set5")
    root = workplace / "data/VOC/VOCdevkit/VOC2012"
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / kind).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n")
    Image.new("RGB", (6, 5)).save(root / "JPEGImages/2007_000033.jpg")
    palette = Image.fromarray(np.array([[0, 1, 255, 0, 0, 0]] * 5, np.uint8), "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(root / "SegmentationClass/2007_000033.png")
    (labelled,) = list_masked_images("voc/val")
    assert labelled.load(3).mask[0].tolist() == [0, 1, 255, 0, 0, 0]


@pytest.mark.parametrize(
    ("spec", "count", "shape", "instances"),
    [
        ("isbi2012-em/train", 15, (1, 512, 512), False),
        ("isbi2012-em/val", 5, (1, 512, 512), False),
        ("dsb2018/val", 37, None, True),
        ("camvid/test", 39, (3, 360, 480), False),
    ],
)
def test_real_sets(with_real_data, spec, count, shape, instances):
    found = list_masked_images(spec)
    assert len(found) == count
    sample = found[0].load(1 if shape and shape[0] == 1 else 3)
    assert shape is None or tuple(sample.pixels.shape) == shape
    assert sample.instances == instances
    assert set(np.unique(sample.mask)) <= {*range(12), 255}


def test_settings_that_cannot_be_are_refused(folder):
    for settings in ({"classes": 300}, {"channels": 4}, {"downscale": 0}, {"crop": 0}, {"margin": 3}, {"zoom": 0.5}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(settings))}: "):
            Segmentation(str(folder), str(folder), **{"classes": 3, **settings})
    with pytest.raises(UserError, match="coins has no split 'test': train, val"):
        list_masked_images("coins/test")
    Image.new("RGB", (50, 40)).save(folder / "images/a.bmp")
    with pytest.raises(InvalidImage, match=r"a\.bmp and .*a\.jpg have the same name"):
        list_masked_images(str(folder))


def test_black_and_white_masks_are_not_taken_for_ignored_pixels(folder):
    for name in ("a", "b", "deep/c"):
        mask = np.asarray(Image.open(folder / f"masks/{name}.png"))
        Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8)).save(folder / f"masks/{name}.png")
    with pytest.raises(UserError, match=r"have but one class; 255 means that a pixel does not count: save objects as 1"):
        data_of(folder)
    data_of(folder, instances=True)  # one object a picture


def test_a_grey_network_gets_the_luma_of_colours(folder):
    pixels, _ = list_masked_images(str(folder))[0].read(1)
    theirs = np.asarray(Image.open(folder / "images/a.jpg").convert("L")).astype(int)
    assert np.abs(pixels[0].numpy().astype(int) - theirs).max() <= 1


def test_streamed_objects_are_parted_too(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
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


def test_batches_are_the_fields_words_types_and_ranges(folder):
    (batch,) = take(data_of(folder, margin=8, batch_size=2, rotate=True, zoom=1.5, elastic_std=3, contrast_jitter=0.3), 1)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((2, 3, 24, 24), torch.float32),
        "mask": ((2, 16, 16), torch.int64),
    }
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1


def test_a_tile_that_is_not_deformed_is_cut_out(folder):
    data = data_of(folder, margin=4, batch_size=3)
    (batch,) = take(data, 1)
    pictures = [labelled.load(3) for labelled in list_masked_images(str(folder))]
    for image, mask in zip(batch["image"], batch["mask"], strict=True):
        whole = [np.pad(sample.pixels, ((0, 0), (2, 2), (2, 2)), "reflect") for sample in pictures]
        windows = [np.lib.stride_tricks.sliding_window_view(pixels, (20, 20), (1, 2))[0] for pixels in whole]
        bytes_of = (image[0] * 255).round().byte().numpy()
        matches = [(i, *place) for i, window in enumerate(windows) for place in np.argwhere((window == bytes_of).all((2, 3)))]
        ((which, top, left),) = matches
        assert (pictures[which].mask[top : top + 16, left : left + 16] == mask.numpy()).all()


def test_a_sample_is_a_function_of_its_position(folder):
    settings = {"rotate": True, "hflip": True, "elastic_std": 4, "zoom": 1.3, "contrast_jitter": 0.2}
    whole = take(data_of(folder, batch_size=4, **settings), 2)
    later = data_of(folder, batch_size=4, **settings)
    later.samples_seen = 4
    (second,) = take(later, 1)
    assert torch.equal(second["image"], whole[1]["image"])
    other = take(data_of(folder, batch_size=2, **settings), 2)
    assert torch.equal(torch.cat([part["mask"] for part in other]), whole[0]["mask"])
    assert not torch.equal(whole[0]["image"], take(data_of(folder, batch_size=4, seed=1, **settings), 1)[0]["image"])


def test_streamed_tiles_are_as_good_as_stored_ones(folder):
    settings = {"batch_size": 3, "rotate": True, "elastic_std": 3, "margin": 4}
    stored, streamed = data_of(folder, **settings), data_of(folder, streaming=True, **settings)
    assert isinstance(streamed.tiles, StreamedTiles)
    items = np.array([2, 0, 1])
    which = np.array([np.flatnonzero(stored.tiles.image_ids == item)[0] for item in items])
    one, other = stored.tiles[5, which], streamed.tiles[5, items]
    assert all(torch.equal(one[key], other[key]) for key in ("image", "mask"))
    with pytest.raises(UserError, match=r"data\.border_weight: weights are made of pictures in memory"):
        Segmentation(str(folder), str(folder), 3, streaming=True, border_weight=10.0)


def test_a_mask_follows_its_picture_through_every_deformation(tmp_path):
    """A picture that shows its own mask still does."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (12, 12)), np.ones((8, 8))).astype(np.uint8)
    Image.fromarray(mask * 255).save(tmp_path / "images/a.png")
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    data = Segmentation(str(tmp_path), str(tmp_path), 2, channels=1, crop=40, margin=8, rotate=True, hflip=True, zoom=1.4, elastic_std=2, batch_size=6)  # fmt: skip
    data.setup("fit")
    (batch,) = take(data, 1)
    shown = (batch["image"][:, 0, 4:-4, 4:-4] > 0.5).long()
    assert (shown != batch["mask"]).float().mean() < 0.02
    assert len({sample.numpy().tobytes() for sample in batch["mask"]}) == 6


def test_pixels_between_pixels_and_beyond_borders_are_scipys():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 9, 7), np.uint8))
    layers = RaggedImageBuffer([torch.zeros(2, 3, 3, dtype=torch.uint8), pixels])
    places = torch.from_numpy(np.random.default_rng(1).uniform(-12, 20, (1, 2, 5, 6))).float()
    which = np.array([1])
    for found, order in ((layers.sample_bilinear(which, places), 1), (layers.sample_nearest(which, places), 0)):
        for channel in range(2):
            expected = map_coordinates(pixels[channel].double().numpy(), places[0].numpy(), order=order, mode="mirror")
            assert np.allclose(found[0, channel].numpy(), expected, atol=1e-4)


def test_displacements_are_those_of_the_grid_at_its_corners():
    deformation = SpatialAugment(elastic_std=10)
    field = deformation.elastic_field(0, range(400), 33)
    assert field.shape == (400, 2, 33, 33)
    assert field[:, :, ::16, ::16].std().item() == pytest.approx(10, rel=0.05)
    ends = field[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.corrcoef(ends.T).fill_diagonal_(0).abs().max() < 0.2  # each corner is drawn by itself
    steps = (field[..., 1:, :] - field[..., :-1, :]).abs()
    assert steps.max() < 10  # and between them it is smooth


def test_turns_and_zooms_are_similarities():
    lengths = np.full(50, 100)
    places = SpatialAugment(rotate=True, hflip=True, zoom=2.0).sampling_grid(0, range(50), lengths, lengths, 20, 10)
    down, across = places[:, :, 1:, :] - places[:, :, :-1, :], places[:, :, :, 1:] - places[:, :, :, :-1]
    size = down.norm(dim=1).mean((1, 2))
    assert torch.allclose(across.norm(dim=1).mean((1, 2)), size, atol=1e-4)
    assert 0.5 <= size.min() < 0.7 < 1.5 < size.max() <= 2.0
    determinant = (down[:, 0, :, :-1] * across[:, 1, :-1] - down[:, 1, :, :-1] * across[:, 0, :-1]).mean((1, 2))
    assert {-1.0, 1.0} == set(determinant.sign().tolist())


def test_smaller_pictures_have_the_values_in_the_middle_of_blocks(folder):
    pixels, mask = list_masked_images(str(folder))[0].read(3, downscale=3)
    assert pixels.shape == (3, 13, 16)
    steps = torch.arange(47, dtype=torch.uint8).view(1, 47, 1).expand(1, 47, 16)  # a picture of its own rows
    assert (downsample_image(steps, 8)[0, 1:-1, 0].numpy() == downsample_mask(steps[0].numpy(), 8)[1:-1, 0]).all()
    whole = np.asarray(Image.open(folder / "masks/a.png"))
    assert (mask == whole[1:39:3, 1:48:3]).all()
    assert (downsample_mask(whole, 1) == whole).all()


# Weights


def test_the_weight_between_cells_is_equation_2():
    generator = np.random.default_rng(0)
    cells = label(generator.random((60, 70)) < 0.02)[0]
    cells[40:50, 10:20] = cells.max() + 1
    distances = np.sort([distance_transform_edt(cells != i) for i in np.unique(cells[cells > 0])], axis=0)
    expected = 10 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * 5**2))
    found = border_weight(cells)
    assert np.allclose(found[cells == 0], expected[cells == 0], atol=1e-4)
    assert (found[cells > 0] == 0).all()
    assert (border_weight(np.zeros((5, 5), int)) == 0).all()
    assert (border_weight((label(np.eye(9))[0] == 1).astype(int)) < 1e-3).all()  # one cell alone


def test_class_weights_make_the_classes_equal():
    counts = np.array([900, 100, 0])
    weights = class_weights(counts)
    assert weights[0] * 900 == pytest.approx(weights[1] * 100)
    assert (weights * counts).sum() / 1000 == pytest.approx(1)
    assert weights[2] == 0


def test_cells_that_touch_are_parted():
    cells = np.repeat(np.repeat(np.arange(1, 7).reshape(2, 3), 8, 0), 8, 1)
    separate_touching = separate_instances(cells)
    assert label(separate_touching > 0)[1] == 6
    assert ((separate_touching == 0) == find_boundaries(cells, connectivity=2, mode="thick")).all()
    lonely = np.pad(np.ones((4, 4), int), 3)
    assert (separate_instances(lonely) == lonely).all()
