"""What a folder of images contains: hidden and linked files, formats, stacks, and names of classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import UserError
from datamodules.io.folders import list_images, list_unreadable
from datamodules.io.image_io import InvalidImage, open_image, probe_image, read_image
from datamodules.io.image_refs import DataReport, list_image_refs
from datamodules.io.image_set import Square, class_folders, folder_labels, load_image_set


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the images a/0.png and b/1.png, and two folders of thumbnails."""
    for i, name in enumerate(("a", "b", ".ipynb_checkpoints", "@eaDir")):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (12, 10), 50 * i).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def names(folder):
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


def test_thumbnails_and_hidden_files_are_left_out(folder):
    Image.new("L", (12, 10)).save(folder / ".hidden.png")
    assert names(folder) == ["a/0.png", "b/1.png"]
    assert [path.name for path in class_folders(list_image_refs(str(folder)))] == ["a", "b"]


def test_linked_folders_are_followed_once(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (12, 10)).save(tmp_path / "elsewhere/2.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert names(folder) == ["a/0.png", "b/1.png", "linked/2.png"]


def test_broken_links_are_named(folder):
    (folder / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png: a broken link"):
        list_images(folder)


def test_other_image_formats_are_named(folder):
    for suffix in ("jfif", "avif", "jp2"):
        Image.open(folder / "a/0.png").convert("RGB").save(folder / f"photo.{suffix}", "JPEG" if suffix == "jfif" else None)
    (folder / "photo.HEIC").write_bytes(b"\0")
    assert names(folder) == ["a/0.png", "b/1.png", "photo.avif", "photo.jfif", "photo.jp2"]
    assert [path.name for path in list_unreadable(folder)] == ["photo.HEIC"]
    assert read_image(folder / "photo.jp2").shape == (3, 10, 12)


def test_formats_that_start_programs_are_not_read(tmp_path, monkeypatch):
    """PIL runs Ghostscript for an EPS file, whatever its suffix is."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (9, 9)).save(tmp_path / "real.eps")
    (tmp_path / "real.eps").rename(tmp_path / "bad.png")
    with pytest.raises(InvalidImage, match=r"bad\.png: not an image in a known format"):
        open_image(tmp_path / "bad.png")
    assert not (tmp_path / "ran").exists()


def test_stacks_are_refused_where_one_image_is_expected(tmp_path):
    pages = [Image.new("L", (9, 8), 100 * i) for i in range(3)]
    for name in ("stack.tif", "frames.gif", "frames.webp", "frames.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(InvalidImage, match=rf"{name}: 3 pages or frames"):
            read_image(tmp_path / name)
    assert np.asarray(open_image(tmp_path / "stack.tif", 2)).max() == 200


def test_damage_in_the_middle_of_a_png_is_found_without_decoding(tmp_path):
    """Also with EXIF data, without which PIL decodes the file to look for them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 60), dtype=np.uint8)).save(tmp_path / "a.png", exif=exif)
    assert probe_image(tmp_path / "a.png", 1).startswith("64x60 ")  # turned
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InvalidImage, match=r"a\.png: truncated or damaged"):
        probe_image(tmp_path / "a.png", 1)


def test_names_that_are_not_utf8_can_be_written(folder):
    (folder / "a/0.png").rename(folder / "a/\udcff.png")
    refs = list_image_refs(str(folder))
    refs[0].name.encode()
    assert read_image(refs[0].path).shape == (1, 10, 12)


def test_classes_are_numbered_by_name_in_all_sets(folder, tmp_path):
    """A test set that lacks the class a: its images of b keep their label."""
    (tmp_path / "test/b").mkdir(parents=True)
    Image.new("L", (12, 10)).save(tmp_path / "test/b/0.png")
    refs = list_image_refs(str(tmp_path / "test"))
    assert folder_labels(refs, class_names=["a", "b"]).tolist() == [1]
    assert folder_labels(refs, class_names=["x", "y"]).tolist() == [0]  # no class in common
    assert folder_labels(refs).tolist() == [0]
    with torch.inference_mode():  # as in a test
        images = load_image_set(str(tmp_path / "test"), 8, 1, Square(), DataReport(), class_names=["a", "b"])
    assert images.labels.tolist() == [1]
    assert images.pixels.shape == (1, 1, 8, 8)
