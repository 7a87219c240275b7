"""Own images with masks: two folders, formats of masks, stacks, bit depths, and a held-out share."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks

from datamodules.catalog.catalog import DatasetNotFound
from datamodules.catalog.masked_image import MaskSpec
from datamodules.catalog.masked_images import pair_folders
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.segmentation import Segmentation

SIDE = 48


def cell(index: int) -> np.ndarray:
    """Return a mask with two disks, (SIDE, SIDE), bool."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((rows - 12 - index % 5) ** 2 + (columns - 12) ** 2 < 49) | ((rows - 33) ** 2 + (columns - 33) ** 2 < 81)


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Return a folder of ten photographs in `pictures` and their masks of 0 and 1 in `annotations`."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures", "annotations"):
        (tmp_path / folder).mkdir()
    for i in range(10):
        noise = np.random.default_rng(i).integers(0, 90, (SIDE, SIDE))
        Image.fromarray((noise + 120 * cell(i)).astype(np.uint8)).save(tmp_path / f"pictures/{i}.png")
        Image.fromarray(cell(i).astype(np.uint8)).save(tmp_path / f"annotations/{i}.png")
    return tmp_path


def save_masks(folder, convert):
    for i in range(10):
        Image.fromarray(convert(cell(i))).save(folder / f"annotations/{i}.png")


def own(**options):
    data = {"images": "pictures", "masks": "annotations", "channels": 1, "crop": 16, "test": ["held-out"], **options}
    return Segmentation(**data)


def masks_of(data):
    """Return the masks of all images by name, as the datamodule reads them."""
    samples = [data.test_images[i] for i in range(len(data.test_images))]
    return {sample["name"][0]: sample["mask"][0].numpy() for sample in samples}


# Two folders and a held-out share


def test_held_out_share_is_the_same_for_all_stages_and_seeds(cells):
    names = []
    for seed in (0, 1):
        data = own(seed=seed)
        for stage in ("fit", "test"):
            data.setup(stage)
        held_out = {data.val_images[i]["name"][0] for i in range(len(data.val_images))}
        assert held_out == set(masks_of(data))
        assert {data.val_images[0]["dataset"][0]} == {"held-out"}
        training = set(data.data_report.content_hashes["pictures"])
        assert held_out | training == {str(i) for i in range(10)}
        assert len(held_out) == 2
        assert not held_out & training
        names.append(held_out)
    assert names[0] == names[1]


def test_folds_hold_each_image_out_once(cells):
    held_out = []
    for k in range(1, 5):
        data = own(fold=f"{k}/4")
        data.setup("test")
        held_out += list(masks_of(data))
    assert sorted(held_out) == [str(i) for i in range(10)]


def test_one_root_and_two_folders_are_equal(cells):
    (cells / "root").mkdir()
    (cells / "pictures").rename(cells / "root/images")
    (cells / "annotations").rename(cells / "root/masks")
    data = own(images=None, masks=None, train="root")
    data.setup("test")
    assert len(masks_of(data)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": None}, r"data\.train: give either"),
        ({"train": "coins/train"}, r"data\.train: give either"),
        ({"fold": "6/5"}, r"data\.fold: 6/5"),
        ({"fold": "1"}, r"data\.fold: 1 is not"),
        ({"fold": "1/5", "val": "coins/val"}, r"data\.fold: 1/5 holds out training images"),
        ({"value_range": (100, 100)}, r"data\.value_range: black 100"),
        ({"mask_format": "rle"}, r"data\.masks: must be a \.csv"),
        ({"mask_format": "colors"}, r"data\.class_colors: 0 colors"),
        ({"class_names": ["a"]}, r"data\.class_names: 1 names"),
        ({"class_names": ["a", "a"]}, "same name"),
        ({"class_names": "absent.txt"}, r"absent\.txt cannot be read"),
    ],
)
def test_contradictions_are_refused(cells, options, message):
    with pytest.raises(UserError, match=message):
        own(**options)


def test_held_out_set_requires_a_held_out_share(cells):
    with pytest.raises(UserError, match=r"held-out requires data\.val null"):
        own(val="coins/val").setup("test")


# Formats of masks


def test_masks_of_all_formats_are_equal(cells):
    data = own()
    data.setup("test")
    expected = masks_of(data)
    save_masks(cells, lambda mask: (255 * mask).astype(np.uint8))
    binary = own(mask_format="binary")
    binary.setup("test")
    others = [masks_of(binary)]
    save_masks(cells, lambda mask: np.where(mask[..., None], (200, 0, 10), (0, 0, 0)).astype(np.uint8))
    colors = own(mask_format="colors", class_colors=[(0, 0, 0), (200, 0, 10)])
    colors.setup("test")
    others.append(masks_of(colors))
    with (cells / "runs.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["ImageId", "EncodedPixels"])
        for i in range(10):  # runs of COCO: lengths down the columns, background first
            counts = uncompressed(cell(i))
            starts = np.cumsum([0, *counts[:-1]])[1::2] + 1
            table.writerow([f"{i}.png", " ".join(f"{s} {n}" for s, n in zip(starts, counts[1::2], strict=True) if n)])
    rle = own(mask_format="rle", masks="runs.csv")
    rle.setup("test")
    for other in (*others, masks_of(rle)):
        assert other.keys() == expected.keys()
        assert all((mask == expected[name]).all() for name, mask in other.items())


def uncompressed(mask):
    """Return the lengths of the runs of a mask, down the columns, background first; pycocotools decodes them to the mask."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff([0, *changes, len(flat)]).tolist()
    rle = coco_masks.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
    assert (coco_masks.decode(rle) == mask).all()
    return counts if len(counts) % 2 == 0 else [*counts, 0]


def test_parts_of_binary_masks_are_objects(cells):
    save_masks(cells, lambda mask: (255 * mask).astype(np.uint8))
    data = own(mask_format="binary", instances=True)
    data.setup("test")
    assert {int(data.test_images[i]["instance_ids"].max()) for i in range(2)} == {2}


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_masks_below_8_bits_keep_their_ids(cells, bits):
    """Written without PIL, which has no such mode: bit depth in the header, values packed in bytes."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for i in range(10):
        values = cell(i).astype(np.uint8)
        packed = np.zeros((SIDE, SIDE * bits // 8), np.uint8)
        for k in range(8 // bits):
            packed |= values[:, k :: 8 // bits] << (8 - bits * (k + 1))
        rows = b"".join(b"\0" + row.tobytes() for row in packed)
        header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, 0, 0, 0, 0)
        parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (cells / f"annotations/{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    data = own()
    data.setup("test")
    assert all((mask == cell(int(name))).all() for name, mask in masks_of(data).items())


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_0_and_255_without_a_format_are_refused_in_every_stage(cells, stage):
    save_masks(cells, lambda mask: (255 * mask).astype(np.uint8))
    with pytest.raises(UserError, match=r"annotations.*data\.mask_format binary"):
        own().setup(stage)


def test_unusable_masks_are_named(cells):
    save_masks(cells, lambda mask: np.where(mask[..., None], (200, 0, 10), (0, 0, 1)).astype(np.uint8))
    with pytest.raises(InvalidImage, match=r"the color \(0, 0, 1\) of pixel \(0, 0\) belongs to no class"):
        own(mask_format="colors", class_colors=[(0, 0, 0), (200, 0, 10)]).setup("fit")
    Image.new("L", (4, 4)).save(cells / "annotations/more.png")
    with pytest.raises(InvalidImage, match=r"more\.png has no image"):
        own().setup("fit")
    (cells / "annotations/more.png").unlink()
    (cells / "annotations/3.png").unlink()
    with pytest.raises(DatasetNotFound, match=r"3\.png has no mask \(1 of 10\)"):
        own().setup("fit")


def test_masks_may_have_one_ending(cells):
    names = ["0", "10", *map(str, range(2, 10))]
    for i, name in zip([0, 1, *range(2, 10)], names, strict=True):
        (cells / f"pictures/{i}.png").rename(cells / f"pictures/{name}.png")
        (cells / f"annotations/{i}.png").rename(cells / f"annotations/{name}_mask.png")
    pairs = pair_folders(cells / "pictures", cells / "annotations", "own", MaskSpec())
    assert [(item.image.name, item.mask.stem) for item in pairs] == [(name, f"{name}_mask") for name in names]
    Image.new("L", (4, 4)).save(cells / "annotations/3.png")  # next to 3_mask.png
    with pytest.raises(DatasetNotFound, match=r"0\.png has no mask"):
        pair_folders(cells / "pictures", cells / "annotations", "own", MaskSpec())
    (cells / "annotations/3.png").unlink()
    (cells / "annotations/0_mask.png").rename(cells / "annotations/0_other.png")
    with pytest.raises(DatasetNotFound, match=r"0\.png has no mask \(1 of 10\)"):
        pair_folders(cells / "pictures", cells / "annotations", "own", MaskSpec())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["0.png", "1"]], "is not pairs"),
        ([["0.png", "2300 9"]], "leaves 48x48"),
        ([["0.png"]], "line 2: 1 columns"),
        ([["x.png", "1 1"]], "x has a row, but no image"),
        ([["0.png", "1 1"]], "has an image, but no row"),
    ],
)
def test_unusable_run_lengths_are_named(cells, rows, message):
    complete = [[f"{i}.png", ""] for i in range(1, 10)] if "no row" not in message else []
    with (cells / "runs.csv").open("w") as file:
        csv.writer(file).writerows([["ImageId", "EncodedPixels"], *rows, *complete])
    data = own(mask_format="rle", masks="runs.csv", val_fraction=0.9)
    with pytest.raises(InvalidImage, match=rf"runs\.csv.*{message}"):
        for stage in ("test", "fit"):
            data.setup(stage)


def test_run_lengths_without_a_header_are_refused(cells):
    (cells / "runs.csv").write_text("".join(f"{i}.png,1 1\n" for i in range(10)))
    with pytest.raises(InvalidImage, match=r"runs\.csv, line 1: run lengths in place of the names of the columns"):
        own(mask_format="rle", masks="runs.csv").setup("fit")


def test_masks_with_alpha_are_read_and_jpeg_masks_are_refused(cells):
    expected = own()
    expected.setup("test")
    for i in range(10):
        mask = Image.open(cells / f"annotations/{i}.png")
        mask.putalpha(255)
        mask.save(cells / f"annotations/{i}.png")
    data = own()
    data.setup("test")
    for name, mask in masks_of(expected).items():
        assert (masks_of(data)[name] == mask).all()
    (cells / "annotations/3.png").unlink()
    Image.fromarray((cell(3) * 255).astype(np.uint8)).save(cells / "annotations/3.jpg")
    with pytest.raises(InvalidImage, match=r"3\.jpg: JPEG changes the values of a mask"):
        own(mask_format="binary").setup("fit")


def test_images_with_one_name_in_a_table_are_refused(cells):
    (cells / "pictures/more").mkdir()
    Image.new("L", (SIDE, SIDE)).save(cells / "pictures/more/0.png")
    (cells / "runs.csv").write_text("ImageId,EncodedPixels\n" + "".join(f"{i}.png,1 1\n" for i in range(10)))
    with pytest.raises(InvalidImage, match=r"0\.png and .*more/0\.png have the same name in runs\.csv"):
        own(mask_format="rle", masks="runs.csv").setup("fit")


def test_image_turned_against_its_mask_is_refused(cells):
    """In a square, the sizes do not show it."""
    for path in (cells / "pictures").iterdir():
        image = Image.open(path).convert("L")
        exif = Image.Exif()
        exif[0x0112] = 6
        path.unlink()
        image.save(path.with_suffix(".jpg"), exif=exif)
    with pytest.raises(InvalidImage, match="an EXIF orientation turns it, but not its mask"):
        own().setup("fit")


# Stacks and bit depths


def test_pages_of_a_stack_are_images_of_one_share(cells):
    for folder in ("pictures", "annotations"):
        for k in (0, 5):
            pages = [Image.open(cells / f"{folder}/{i}.png") for i in range(k, k + 5)]
            pages[0].save(cells / f"{folder}/stack{k}.tif", save_all=True, append_images=pages[1:])
        for i in range(10):
            (cells / f"{folder}/{i}.png").unlink()
    data = own()
    data.setup("test")
    masks = masks_of(data)
    (first,) = {name.rpartition("-")[0] for name in masks}
    assert sorted(masks) == [f"{first}-{page:04d}" for page in range(5)]
    for page in range(5):
        assert (masks[f"{first}-{page:04d}"] == cell(int(first[-1]) + page)).all()
    Image.open(cells / "annotations/stack0.tif").save(cells / "annotations/stack0.tif")
    with pytest.raises(InvalidImage, match=r"stack0\.tif: 1 pages, but its image has 5"):
        own().setup("test")


def test_value_ranges_of_16_bit_images(cells):
    """A camera of 12 bits: the levels of 8 bits would be lost with the range of the type."""
    levels = {}
    for i in range(10):
        levels[i] = np.random.default_rng(i).integers(100, 4096, (SIDE, SIDE)).astype(np.uint16)
        (cells / f"pictures/{i}.png").unlink()
        Image.fromarray(levels[i]).save(cells / f"pictures/{i}.tif", tiffinfo={281: 4095})

    def image_of(**options):
        data = own(**options)
        data.setup("test")
        sample = data.test_images[0]
        return sample["image"][0, 0], levels[int(sample["name"][0])].astype(np.float64)

    for options, low, high in (
        ({}, 0, 65535),
        ({"value_range": (100, 4000)}, 100, 4000),
        ({"value_range": "metadata"}, 0, 4095),
    ):
        image, values = image_of(**options)
        expected = np.clip((values - low) / (high - low), 0, 1) * 255
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-4)
        assert len(torch.unique(image)) == len(np.unique(expected))  # no level is lost
    data = own()
    data.setup("test")
    assert data.data_report.notes == [
        "held-out: the largest value is 6% of the range of the files, so the images are dark. "
        "Set data.value_range to percentile, or to [BLACK, WHITE]"
    ]
    image, values = image_of(value_range="percentile")
    assert (image == 0).sum() == (values <= np.percentile(values, 0.1)).sum()
    assert (image == 255).sum() == (values >= np.percentile(values, 99.9)).sum()
    data = own(value_range="percentile")
    data.setup("fit")
    batch = data.tiles[0, np.arange(2)]
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 255


def test_missing_tag_names_the_remedy(cells):
    with pytest.raises(InvalidImage, match=r"no TIFF tag MaxSampleValue. Set data\.value_range"):
        own(value_range="metadata").setup("test")


def test_class_names_from_a_file(cells):
    (cells / "classes.txt").write_text("ground\n\ncell body\n")
    assert own(class_names="classes.txt").class_names == ["ground", "cell body"]
    assert own(class_names=["x", "y"]).class_names == ["x", "y"]
    assert own().class_names == ["class 0", "class 1"]
