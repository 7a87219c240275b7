from statistics import NormalDist

import pytest
import torch
from PIL import Image

from experiments.main import main
from modules.dcgan import DCGAN
from modules.vae import VAE
from tests.forked import forked


@pytest.fixture
def ckpt(workplace):
    torch.manual_seed(0)
    path = workplace / "weights.ckpt"
    torch.save({"state_dict": DCGAN(1, 28, 4, 32).state_dict()}, path)
    return str(path)


def test_a_sample_is_the_same_in_any_number_of_them(workplace, ckpt):
    for count in ("3", "105"):
        assert forked(main, ["sample", "dcgan/demo", "--ckpt", ckpt, "--count", count, "--output", f"out{count}"]) == 0
    assert len(list((workplace / "out105").glob("0*.png"))) == 105
    few, many = (Image.open(workplace / folder / "000002.png") for folder in ("out3", "out105"))
    assert max(abs(a - b) for a, b in zip(few.tobytes(), many.tobytes(), strict=True)) <= 1
    assert Image.open(workplace / "out105/sheet.png").size == (8 * 30 + 2, 8 * 30 + 2)


def test_interpolation_begins_and_ends_at_its_samples(workplace, ckpt):
    assert forked(main, ["sample", "dcgan/demo", "--ckpt", ckpt, "--count", "8", "--output", "out"]) == 0
    words = ["interpolate", "dcgan/demo", "--ckpt", ckpt, "--between", "3", "7", "--steps", "4", "--output", "way.png"]
    assert forked(main, words) == 0
    way = Image.open(workplace / "way.png")
    assert way.size == (5 * 30 + 2, 30 + 2)
    for number, left in ((3, 2), (7, 2 + 4 * 30)):
        shown = way.crop((left, 2, left + 28, 30)).convert("L").tobytes()
        expected = Image.open(workplace / f"out/{number:06d}.png").convert("L").tobytes()
        assert max(abs(a - b) for a, b in zip(shown, expected, strict=True)) <= 1


def test_a_concept_minus_itself_leaves_the_other(workplace, ckpt):
    words = ["arithmetic", "dcgan/demo", "--ckpt", ckpt, "--plus", "1", "--minus", "1", "--plus", "5", "--output", "sum.png"]
    assert forked(main, words) == 0
    picture = Image.open(workplace / "sum.png").convert("L")
    assert picture.size == (9 * 30 + 2, 4 * 30 + 2)
    five, total = (picture.crop((2, top, 30, top + 28)).tobytes() for top in (32, 92))
    assert max(abs(a - b) for a, b in zip(five, total, strict=True)) <= 1


def test_a_manifold_lies_over_the_quantiles_of_its_latents(workplace):
    """The picture in the second row and the last column, made by hand."""
    torch.manual_seed(0)
    method = VAE(hidden=[500], latent_size=2).eval()
    torch.save({"state_dict": method.state_dict()}, workplace / "vae.ckpt")
    words = ["manifold", "vae/demo", "--ckpt", "vae.ckpt", "--side", "3", "--output", "plane.png"]
    assert forked(main, words) == 0
    plane = Image.open(workplace / "plane.png").convert("L")
    assert plane.size == (3 * 28, 3 * 28)
    latents = torch.tensor([[NormalDist().inv_cdf(5 / 6), NormalDist().inv_cdf(1 / 2)]])
    with torch.no_grad():
        expected = method.sample(latents).flatten() * 255
    shown = torch.tensor(list(plane.crop((56, 28, 84, 56)).tobytes()))
    assert (shown - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "espcn"], "espcn/demo makes no images from latents"),
        (["sample", "dcgan/demo", "--count", "0"], "sample: --count 0: at least 1"),
        (["interpolate", "dcgan/demo", "--between", "3"], "--between takes at least two samples"),
        (["arithmetic", "dcgan/demo"], "--plus names the samples of a concept"),
        (["manifold", "vae/demo", "--side", "1"], "manifold: --side 1: at least 2"),
        (["sample", "dcgan/demo"], "no weights for dcgan/demo yet: darkroom fit dcgan/demo, or name some by --ckpt"),
    ],
)
def test_mistakes_are_answered_in_a_line(workplace, capfd, words, message):
    assert forked(main, words) == 2
    assert message in capfd.readouterr().err
