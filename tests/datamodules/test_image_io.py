import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from datamodules.errors import UserError
from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, check_size, note_on_losses, read_image, set_size_limit
from datamodules.io.image_refs import DataReport, ImageRef
from datamodules.io.user_images import merge_channels
from datamodules.transforms.color import ycbcr_to_rgb
from datamodules.transforms.resize import imresize


@pytest.fixture
def rgb(photos):
    return Image.open(sorted(photos.glob("*.png"))[0]).convert("RGB")


def test_unusable_files_raise_with_name_and_reason(tmp_path, rgb):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    rgb.save(tmp_path / "complete.png")
    rgb.save(tmp_path / "complete.jpg")
    for name in ("complete.png", "complete.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"truncated_{name}").write_bytes(content[: len(content) // 2])
    for name, reason in {
        "empty.png": "empty file",
        "text.png": "not an image",
        "truncated_complete.png": "truncated or damaged",
        "truncated_complete.jpg": "truncated or damaged",
        "absent.png": "no such file",
    }.items():
        with pytest.raises(InvalidImage, match=reason) as raised:
            read_image(tmp_path / name)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


def test_too_small_images_raise(tmp_path):
    with pytest.raises(InvalidImage, match=r"small\.png: 8x5 .*9x9"):
        check_size(8, 5, tmp_path / "small.png", 9)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_every_pil_mode_reads_as_one_or_three_channels(tmp_path, rgb, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    rgb.convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == ((1 if mode in ("L", "LA", "1") else 3), rgb.height, rgb.width)
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(pixels.permute(1, 2, 0), np.array(rgb))


def test_files_with_more_bits_than_are_read_are_named(tmp_path):
    levels = np.arange(48, dtype=np.uint16).reshape(4, 4, 3) * 1000
    tifffile.imwrite(tmp_path / "color.tif", levels, photometric="rgb")
    (tmp_path / "color.ppm").write_bytes(b"P6 4 4 65535\n" + levels.astype(">u2").tobytes())
    Image.fromarray(levels[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(levels[..., 0]).save(tmp_path / "transparent.png", transparency=0)
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "8.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    assert note_on_losses([tmp_path / "gray.png", tmp_path / "8.png", tmp_path / "damaged.png"]) == ""
    assert note_on_losses(sorted(tmp_path.iterdir())) == (
        f"color of 16 bits is read with 8 bits (files: 2, such as {tmp_path / 'color.ppm'}); "
        f"16-bit gray is read without its transparency (files: 1, such as {tmp_path / 'transparent.png'})"
    )
    report = DataReport()
    report.validate([ImageRef("own", "color", tmp_path / "color.tif")], 1)
    assert report.notes == [f"own: color of 16 bits is read with 8 bits (files: 1, such as {tmp_path / 'color.tif'})"]


def test_16_bit_range_maps_to_8_bit_range(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").tolist() == [[[0, 1, 128, 255]]]


def test_floating_point_file_raises(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InvalidImage, match=r"float\.tif"):
        read_image(tmp_path / "float.tif")


def test_exif_orientation_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    rgb.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape[1:] == (rgb.width, rgb.height)


def test_decompression_bomb_raises(tmp_path, rgb, monkeypatch):
    rgb.save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InvalidImage, match=r"big\.png.*0\.001 megapixels"):
        read_image(tmp_path / "big.png")
    monkeypatch.setenv("DARKROOM_MAX_MEGAPIXELS", "1")
    set_size_limit()
    assert read_image(tmp_path / "big.png").shape[1:] == (rgb.height, rgb.width)
    monkeypatch.setenv("DARKROOM_MAX_MEGAPIXELS", "many")
    with pytest.raises(UserError, match="DARKROOM_MAX_MEGAPIXELS: many"):
        set_size_limit()


def test_list_images_is_recursive_and_skips_other_files(tmp_path, rgb):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.JPG", ".hidden.png"):
        rgb.save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["b/a.JPG", "z.png"]


@pytest.mark.parametrize("factor", [2, 3])
def test_tiles_of_enlarged_chroma_equal_the_whole(factor):
    """The tiles have 256 pixels, so this image has four."""
    generator = torch.Generator().manual_seed(0)
    luma = torch.rand(1, factor * 300, factor * 270, generator=generator)
    chroma, alpha = torch.rand(2, 300, 270, generator=generator), torch.rand(1, 300, 270, generator=generator)
    size = (factor * 300, factor * 270)
    rgb = ycbcr_to_rgb(torch.cat([luma, imresize(chroma, size)]))
    expected = (torch.cat([rgb, imresize(alpha, size)]) * 255 + 0.5).floor().clamp(0, 255)
    merged = np.asarray(merge_channels(luma, chroma, alpha)).astype(int)
    difference = np.abs(merged - expected.permute(1, 2, 0).numpy())
    assert difference.max() <= 1  # rounding
    assert (difference > 0).mean() < 1e-3
