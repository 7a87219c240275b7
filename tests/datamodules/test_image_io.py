import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.io.folders import list_images
from datamodules.io.image_io import InvalidImage, check_size, read_image


@pytest.fixture
def rgb(photos):
    return Image.open(sorted(photos.glob("*.png"))[0]).convert("RGB")


def test_bad_files_are_named_with_the_reason(tmp_path, rgb):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    rgb.save(tmp_path / "whole.png")
    rgb.save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
    for name, reason in {
        "empty.png": "empty file",
        "text.png": "not an image",
        "cut_whole.png": "cut short or damaged",
        "cut_whole.jpg": "cut short or damaged",
        "absent.png": "no such file",
    }.items():
        with pytest.raises(InvalidImage, match=reason) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_too_small_pictures_are_named(tmp_path):
    with pytest.raises(InvalidImage, match=r"small.png: 8x5 pixels, too small: at least 9x9"):
        check_size(8, 5, tmp_path / "small.png", 9)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_gives_one_or_three_channels(tmp_path, rgb, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    rgb.convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == ((1 if mode in ("L", "LA", "1") else 3), rgb.height, rgb.width)
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(pixels.permute(1, 2, 0), np.array(rgb))


def test_sixteen_bits_keep_black_and_white(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").tolist() == [[[0, 1, 128, 255]]]


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InvalidImage, match="unknown range"):
        read_image(tmp_path / "float.tif")


def test_orientation_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    rgb.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape[1:] == (rgb.width, rgb.height)


def test_a_bomb_is_refused(tmp_path, rgb, monkeypatch):
    rgb.save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InvalidImage, match="decompression bomb"):
        read_image(tmp_path / "big.png")


def test_listing_goes_into_folders_and_passes_over_the_rest(tmp_path, rgb):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.JPG", ".hidden.png"):
        rgb.save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["b/a.JPG", "z.png"]
