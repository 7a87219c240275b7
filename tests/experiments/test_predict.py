"""`darkroom predict` on a user's images."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import ROOT
from experiments.cli.main import main
from tests.helpers.subprocess_helpers import forked


@pytest.fixture(scope="module")
def user_images(tmp_path_factory, photos):
    """Return a folder of images in several modes and sizes, with a subfolder."""
    folder = tmp_path_factory.mktemp("user_images")
    rgb = Image.open(sorted(photos.glob("astronaut*.png"))[0]).convert("RGB")
    rgb.save(folder / "color.jpg")
    rgb.convert("L").save(folder / "gray.png")
    rgb.convert("RGBA").save(folder / "transparent.png")
    rgb.convert("CMYK").save(folder / "print.tif")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.crop((0, 0, 1, 7)).save(folder / "tiny.png")
    uint16 = np.array(rgb.convert("L")).astype(np.uint16) * 257
    Image.fromarray(uint16).save(folder / "uint16.png")
    (folder / "album").mkdir()
    rgb.crop((0, 0, 31, 40)).save(folder / "album" / "odd.png")
    return folder


def test_predict_enlarges_images_of_all_modes(workdir, user_images, capfd):
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(user_images), "--output", "out"]) == 0
    modes = {
        "color": "RGB",
        "gray": "L",
        "transparent": "RGBA",
        "print": "RGB",
        "uint16": "I;16",
        "tiny": "RGB",
        "album/odd": "RGB",
    }
    for path in user_images.rglob("*.*"):
        name = path.relative_to(user_images).with_suffix("").as_posix()
        original, enlarged = Image.open(path), Image.open(workdir / "out" / f"{name}.png")
        assert enlarged.size == (3 * original.width, 3 * original.height), name
        assert enlarged.mode == modes.get(name, enlarged.mode), name
        small = np.array(enlarged.convert("RGB").resize(original.size, Image.Resampling.BOX)).astype(float)
        before = np.array(Image.open(path).convert("RGB")).astype(float) if name != "uint16" else None
        if before is not None and name != "tiny":
            assert np.abs(small - before).mean() < 10, name  # colors are unchanged
    assert "astronaut" not in capfd.readouterr().err


def test_predict_combines_network_luma_with_bicubic_chroma(workdir, photos):
    from safetensors.torch import load_file

    from datamodules.transforms.color import rgb_to_ycbcr, ycbcr_to_rgb
    from datamodules.transforms.resize import imresize
    from modules.espcn import ESPCN

    path = sorted(photos.glob("chelsea*.png"))[0]
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(path), "--output", "out"]) == 0
    network = ESPCN(3)
    network.load_state_dict(load_file(ROOT / "experiments/methods/espcn/weights/t91_x3.safetensors"))
    rgb = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
    ycc = rgb_to_ycbcr(rgb)
    with torch.no_grad():
        luma = network(ycc[None, :1])[0]
    expected = ycbcr_to_rgb(torch.cat([luma, imresize(ycc[1:], (luma.shape[1], luma.shape[2]))]))
    written = torch.from_numpy(np.array(Image.open(workdir / "out" / path.name))).permute(2, 0, 1)
    assert ((expected * 255).round().clamp(0, 255) - written).abs().max() <= 1


@pytest.mark.parametrize(
    ("write_file", "message"),
    [
        (lambda folder: (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "cut.png"),
        (lambda folder: None, "in: "),
    ],
)
def test_predict_names_unreadable_input(workdir, capfd, write_file, message):
    (workdir / "in").mkdir()
    write_file(workdir / "in")
    assert forked(main, ["predict", "espcn/t91_x3", "--input", "in"]) == 2
    assert message in capfd.readouterr().err


def test_predict_does_not_overwrite_its_inputs(workdir, photos, capfd):
    source = sorted(photos.glob("*.png"))[0]
    (workdir / "in").mkdir()
    Image.open(source).convert("RGB").save(workdir / "in/a.jpg")
    (workdir / "in/a.png").write_bytes(source.read_bytes())
    assert forked(main, ["predict", "espcn/t91_x3", "--input", "in", "--output", "in"]) == 2
    assert (workdir / "in/a.png").read_bytes() == source.read_bytes()
    assert "--output: in/a.png" in capfd.readouterr().err


def predict_and_write_peak_memory(workdir):
    import resource

    status = main(["predict", "espcn/t91_x3", "--input", "photo.jpg", "--output", "out"])
    (workdir / "peak.txt").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
    return status


@pytest.mark.slow
def test_large_photograph_is_enlarged_in_bounded_memory(workdir):
    """A photograph of 6 megapixels with transparency; before tiles, it took 3.2 GB without."""
    pixels = np.random.default_rng(0).integers(0, 255, (2000, 3000, 4), np.uint8)
    Image.fromarray(pixels).resize((3000, 2000)).save(workdir / "photo.png")
    (workdir / "photo.png").rename(workdir / "photo.jpg")  # the content decides
    assert forked(predict_and_write_peak_memory, workdir) == 0
    assert int((workdir / "peak.txt").read_text()) < 2500  # MiB; 1,800 were seen
