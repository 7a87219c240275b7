"""What predict reads and writes: photographs with what their files contain, stacks, and inputs that cannot be used."""

import shutil

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from experiments.cli.main import main
from tests.helpers.subprocess_helpers import forked, refused


def test_broken_link_among_the_inputs_is_reported_after_the_others(workdir, photos, capfd):
    shutil.copytree(photos, workdir / "in")
    (workdir / "in/gone.png").symlink_to(workdir / "nowhere.png")
    error = refused(capfd, "predict", "espcn/t91_x3", "--input", "in", "--output", "out")
    assert "gone.png: no such file" in error
    assert len(list((workdir / "out").iterdir())) == len(list(photos.iterdir()))


def test_predict_keeps_what_a_file_contains(workdir, photos):
    """The color profile, EXIF data without the orientation, the resolution, and the 16 bits of a gray image."""
    from PIL import ImageCms

    (workdir / "in").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    color = Image.open(sorted(photos.glob("astronaut*.png"))[0])
    color.save(workdir / "in/a.jpg", icc_profile=profile, exif=exif, dpi=(300, 300))
    levels = (np.asarray(color.convert("L")).astype(np.uint16) << 8) + 77
    Image.fromarray(levels).save(workdir / "in/b.png")
    disc = np.zeros((40, 40, 4), np.uint8)
    disc[10:30, 10:30] = 255
    Image.fromarray(disc).save(workdir / "in/c.png")
    assert forked(main, ["predict", "espcn/t91_x3", "--input", "in", "--output", "out"]) == 0
    a, b, c = (Image.open(workdir / f"out/{name}.png") for name in "abc")
    assert a.size == (3 * color.height, 3 * color.width)
    assert a.info["icc_profile"] == profile
    assert dict(a.getexif()) == {0x010F: "Camera"}
    assert a.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert b.mode == "I;16"
    assert len(np.unique(np.asarray(b))) > 256
    assert np.asarray(b).mean() == pytest.approx(levels.mean(), rel=0.01)
    gray, alpha = np.asarray(c).astype(float).transpose(2, 0, 1)
    assert (gray * alpha / 255 + 255 - alpha).min() > 250  # no dark edge on white


def test_broken_files_are_reported_after_the_others(workdir, photos, capfd):
    (workdir / "in").mkdir()
    shutil.copy(sorted(photos.iterdir())[0], workdir / "in/good.png")
    (workdir / "in/broken.png").write_bytes(b"x")
    (workdir / "in/phone.HEIC").write_bytes(b"x")
    (workdir / "more").mkdir()
    (workdir / "more/x.png").write_bytes(b"x")
    error = refused(capfd, "predict", "espcn/t91_x3", "--input", "more", "in", "--output", "out")
    assert "3 of 4 files were not processed" in error
    assert "more/x.png" in error
    assert "broken.png" in error
    assert "phone.HEIC" in error
    assert (workdir / "out/good.png").exists()


def save_stack(pages, path, description):
    """Save a stack as ImageJ does, with 3.1 pixels per micrometer and a description."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[282], tags[283], tags[296] = description, 3.1, 3.1, 1
    pages[0].save(path, save_all=True, append_images=pages[1:], tiffinfo=tags)


def test_several_inputs_keep_their_names(workdir, photos, capfd):
    files = sorted(photos.iterdir())[:2]
    for folder in ("one", "two/sub"):
        (workdir / folder).mkdir(parents=True)
    shutil.copy(files[0], workdir / "one/a.png")
    shutil.copy(files[1], workdir / "two/sub/b.png")
    words = ["--input", "one/a.png", "two", "one", "--output", "out"]
    assert forked(main, ["predict", "espcn/t91_x3", *words]) == 0
    assert sorted(str(path.relative_to(workdir / "out")) for path in (workdir / "out").rglob("*.png")) == ["a.png", "sub/b.png"]
    shutil.copy(files[1], workdir / "two/a.png")
    (workdir / "empty").mkdir()
    for words, message in (
        (["one", "two"], "one/a.png and two/a.png would both be written to out2/a.png. Process them one by one"),
        (["one", "empty"], "empty: no images in this folder"),
        (["one", "--input", "two"], "--input: given twice. Write all inputs after one --input"),
    ):
        assert message in refused(capfd, "predict", "espcn/t91_x3", "--output", "out2", "--input", *words)
    (workdir / "one/c.png").write_bytes(b"damaged")  # not one of the inputs, but a file of the user
    shutil.copy(files[1], workdir / "two/c.png")
    error = refused(capfd, "predict", "espcn/t91_x3", "--input", "two/c.png", "one", "--output", "one")
    assert "one/c.png exists, and may be one of your files" in error
    error = refused(capfd, "predict", "espcn/t91_x3", "--input", "one", "clip.mp4", "--output", "out2")
    assert "clip.mp4 is one of 2 inputs. Give a video alone" in error


def test_control_characters_of_a_name_are_not_printed(workdir, photos, capfd):
    (workdir / "in").mkdir()
    shutil.copy(sorted(photos.iterdir())[0], workdir / "in/a\n\x1b[31m.png")
    (workdir / "in/b\x1b[31m.png").write_bytes(b"x")
    error = refused(capfd, "predict", "espcn/t91_x3", "--input", "in", "--output", "out")
    assert "b\\x1b[31m.png" in error
    assert forked(main, ["predict", "espcn/t91_x3", "--input", "in/a\n\x1b[31m.png", "--output", "out"]) == 0
    output = capfd.readouterr().out
    assert "in/a\\n\\x1b[31m.png  " in output
    assert "\x1b[31m" not in output


def test_output_that_looks_like_a_file_is_refused(workdir, photos, capfd):
    error = refused(capfd, "predict", "espcn/t91_x3", "--input", str(photos), "--output", "large.jpg")
    assert "large.jpg looks like a file. Give a folder" in error


def test_overlays_do_not_replace_masks(workdir, photos, capfd):
    for name in ("in/x.png", "in/overlays/x.png"):
        (workdir / name).parent.mkdir(exist_ok=True)
        shutil.copy(sorted(photos.iterdir())[0], workdir / name)
    error = refused(capfd, "predict", "unet/demo", "--input", "in", "--output", "out")
    assert "in/overlays/x.png would be in out/overlays/x.png, which is used for other files" in error


def test_channels_of_a_stack_are_not_images(workdir, capfd):
    pages = [Image.new("L", (40, 48), value) for value in (10, 200)]
    for name, text in (
        ("j.tif", "ImageJ=1.54f\nimages=2\nchannels=2\n"),
        ("o.tif", '<OME><Pixels SizeC="2" SizeZ="1"/></OME>'),
    ):
        save_stack(pages, workdir / name, text)
        error = refused(capfd, "predict", "unet/em", "--input", name, "--output", "out")
        assert f"{name}: its pages are 2 channels of each image. Save one channel" in error


def test_a_stack_gives_a_stack(workdir):
    pages = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 40), dtype=np.uint8)) for i in range(3)]
    lines = ["ImageJ=1.54f", "images=3", "slices=3", "unit=micron", "spacing=0.5"]
    save_stack(pages, workdir / "stack.tif", "\n".join([*lines, "min=3.0", "max=200.0", ""]))
    pages[1].save(workdir / "page.png")
    for name in ("stack.tif", "page.png"):
        assert forked(main, ["predict", "unet/em", "--input", name, "--output", "out"]) == 0
    stack = Image.open(workdir / "out/stack.tif")
    assert float(stack.tag_v2[282]) == pytest.approx(3.1)
    assert stack.tag_v2[270].split() == lines  # without the range of the display
    assert (stack.n_frames, Image.open(workdir / "out/overlays/stack.tif").n_frames) == (3, 3)
    stack.seek(1)
    assert (np.asarray(stack) == np.asarray(Image.open(workdir / "out/page.png"))).all()
    assert (workdir / "out/classes.csv").read_text().splitlines()[1].startswith("0,membrane")
