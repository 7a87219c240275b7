from statistics import NormalDist

import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from datamodules.catalog.array_readers import read_split
from datamodules.reconstruction import binarize
from experiments.cli.main import main
from modules.autoencoder import Autoencoder
from modules.dcgan import DCGAN
from modules.vae import VAE
from tests.helpers.subprocess_helpers import forked


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


def of_two_latents(path):
    """A network as that of vae/demo, untrained, and its weights in a file."""
    torch.manual_seed(0)
    method = VAE(hidden_dims=[256, 128], latent_size=2, activation="relu").eval()
    torch.save({"state_dict": method.state_dict()}, path)
    return method


def pixels(picture, left, top, side=28):
    return torch.tensor(list(picture.crop((left, top, left + side, top + side)).convert("L").tobytes()))


def of_digits():
    """The pictures that vae/demo is measured on: (500, 1, 28, 28)."""
    return binarize(read_split("digits/test")[0].float() / 255, 0, "binarise/digits-test", 0)


def test_what_comes_back_stands_below_the_pictures(workplace):
    method = of_two_latents(workplace / "vae.ckpt")
    words = ["reconstruct", "vae/demo", "--ckpt", "vae.ckpt", "--numbers", "7", "300", "--output", "back.png"]
    assert forked(main, words) == 0
    back, images = Image.open(workplace / "back.png"), of_digits()[[7, 300]]
    assert back.size == (2 + 2 * 30, 2 + 2 * 30)
    with torch.no_grad():
        expected = method(images)
    for column in (0, 1):
        assert (pixels(back, 2 + 30 * column, 2) - 255 * images[column].flatten()).abs().max() <= 1
        assert (pixels(back, 2 + 30 * column, 32) - 255 * expected[column].flatten()).abs().max() <= 1


def test_a_denoisers_row_shows_what_it_saw(workplace):
    assert forked(main, ["reconstruct", "autoencoder/demo", "--ckpt", denoiser(workplace), "--output", "back.png"]) == 0
    assert Image.open(workplace / "back.png").size == (2 + 16 * 30, 2 + 3 * 30)


def denoiser(folder):
    torch.manual_seed(0)
    method = Autoencoder(hidden_dims=[512, 128], latent_size=32, corruption="noise", corruption_level=0.4)
    torch.save({"state_dict": method.state_dict()}, folder / "denoiser.ckpt")
    return str(folder / "denoiser.ckpt")


def test_answers_are_the_nearest_codes(workplace, capfd):
    """By scipy, of codes computed here; frames say whether it is the same digit."""
    method = of_two_latents(workplace / "vae.ckpt")
    words = ["retrieve", "vae/demo", "--ckpt", "vae.ckpt", "--numbers", "4", "20", "--k", "3", "--output", "found.png"]
    assert forked(main, words) == 0
    images, labels = of_digits(), read_split("digits/test")[1]
    with torch.no_grad():
        codes = method.posterior(images)[0].numpy()
    answers = cKDTree(codes).query(codes[[4, 20]], 4)[1]
    assert answers[:, 0].tolist() == [4, 20]
    found = Image.open(workplace / "found.png")
    assert found.size == (2 + 4 * 34, 2 + 2 * 34)  # frames of two pixels and gaps of two
    right = 0
    for row, query in enumerate((4, 20)):
        for column, answer in enumerate(answers[row]):
            left, top = 2 + 34 * column, 2 + 34 * row
            assert (pixels(found, left + 2, top + 2) - 255 * images[answer].flatten()).abs().max() <= 1
            red, green, _ = found.getpixel((left, top))
            if column:
                same = labels[answer] == labels[query]
                assert (green > red) == same
                right += int(same)
    assert f"answers   {right} of 6 have their query's class" in capfd.readouterr().out


def test_interpolation_goes_between_pictures(workplace):
    method = of_two_latents(workplace / "vae.ckpt")
    words = ["interpolate", "vae/demo", "--ckpt", "vae.ckpt", "--pictures", "--between", "7", "30", "--steps", "2"]
    assert forked(main, [*words, "--output", "way.png"]) == 0
    with torch.no_grad():
        codes = method.posterior(of_digits()[[7, 30]])[0]
        expected = 255 * method.decode(codes.mean(0, keepdim=True)).flatten()
    assert (pixels(Image.open(workplace / "way.png"), 32, 2) - expected).abs().max() <= 1


def test_a_manifold_lies_over_the_quantiles_of_its_latents(workplace):
    """The picture in the second row and the last column, made by hand."""
    method = of_two_latents(workplace / "vae.ckpt")
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
        (["reconstruct", "--numbers", "500"], "no picture 500: the 500 of the test set count from 0"),
        (["retrieve", "--k", "500"], "retrieve: --k 500 of 499 other pictures"),
    ],
)
def test_pictures_that_are_not_there_are_refused(workplace, capfd, words, message):
    of_two_latents(workplace / "vae.ckpt")
    assert forked(main, [words[0], "vae/demo", "--ckpt", "vae.ckpt", *words[1:]]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "espcn"], "espcn/demo makes no images from latents"),
        (["sample", "dcgan/demo", "--count", "0"], "sample: --count 0: at least 1"),
        (["interpolate", "dcgan/demo", "--between", "3"], "--between takes at least two numbers"),
        (["arithmetic", "dcgan/demo"], "--plus names the samples of a concept"),
        (["manifold", "vae/demo", "--side", "1"], "manifold: --side 1: at least 2"),
        (["reconstruct", "dcgan/demo"], "dcgan/demo makes no codes of pictures"),
        (["interpolate", "vae/demo", "--pictures", "--between", "3"], "--between takes at least two numbers"),
        (["retrieve", "vae/demo", "--ckpt", "no.ckpt"], "--ckpt: no file no.ckpt"),
        (["sample", "dcgan/demo"], "no weights for dcgan/demo yet: darkroom fit dcgan/demo, or name some by --ckpt"),
    ],
)
def test_mistakes_are_answered_in_a_line(workplace, capfd, words, message):
    assert forked(main, words) == 2
    assert message in capfd.readouterr().err
