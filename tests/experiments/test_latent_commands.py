from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from datamodules.catalog.array_readers import read_split
from datamodules.generation import Generation
from datamodules.reconstruction import binarize
from experiments.cli.main import main
from experiments.run.nearest import find_nearest
from modules.autoencoder import Autoencoder
from modules.dcgan import DCGAN
from modules.vae import VAE
from tests.conftest import as_tensor
from tests.helpers.subprocess_helpers import forked


@pytest.fixture
def ckpt(workdir):
    torch.manual_seed(0)
    path = workdir / "weights.ckpt"
    torch.save({"state_dict": DCGAN(1, 28, 4, 32).state_dict()}, path)
    return str(path)


def test_sample_does_not_depend_on_count(workdir, ckpt):
    for count in ("3", "105"):
        assert forked(main, ["sample", "dcgan/demo", "--ckpt", ckpt, "--count", count, "--output", f"out{count}"]) == 0
    assert len(list((workdir / "out105").iterdir())) == 105
    first, second = (Image.open(workdir / folder / "000002.png") for folder in ("out3", "out105"))
    assert max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)) <= 1
    assert Image.open(workdir / "out105.png").size == (8 * 30 + 2, 8 * 30 + 2)


def test_checkpoint_requires_the_model_settings_of_its_training(workdir, capfd):
    """With another schedule, the same weights would be those of another level."""
    settings = ["--model.stable_images", "32", "--model.fade_images", "32", "--model.average_half_life", "16"]
    training = ["--model.total_images", "256", "--val_every_images", "256"]
    assert forked(main, ["fit", "progan/demo", "--run", "r", *settings, *training]) == 0
    path = workdir / "runs/progan/demo/r/checkpoints/last.ckpt"
    argv = ["sample", "progan/demo", "--ckpt", str(path), "--count", "1", "--output", "out"]
    assert forked(main, argv) == 2
    expected = f"{path} was trained with model.average_half_life 16, but the model has 2000. Add --model.average_half_life 16"
    assert expected in capfd.readouterr().err
    assert forked(main, [*argv, *settings]) == 0
    pixels = as_tensor(workdir / "out/000000.png")[0].float()
    assert pixels.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).std(-1).mean() > 1  # 32 x 32 pixels, not enlarged


def test_points_are_written_as_a_table_and_a_plot(workdir):
    assert forked(main, ["sample", "wgan/demo", "--count", "200", "--output", "points"]) == 0
    points = np.loadtxt("points.csv", delimiter=",", skiprows=1)
    assert points.shape == (200, 2)
    assert ((np.linalg.norm(points, axis=1) - 1.4144) ** 2).mean() ** 0.5 < 0.3  # the Gaussians are on a circle
    assert (np.asarray(Image.open("points.png")) == [204, 26, 26]).all(2).any()  # red samples


def test_interpolation_starts_and_ends_at_its_samples(workdir, ckpt):
    assert forked(main, ["sample", "dcgan/demo", "--ckpt", ckpt, "--count", "8", "--output", "out"]) == 0
    argv = ["interpolate", "dcgan/demo", "--ckpt", ckpt, "--indices", "3", "7", "--steps", "4", "--output", "interpolation.png"]
    assert forked(main, argv) == 0
    row = Image.open(workdir / "interpolation.png")
    assert row.size == (5 * 30 + 2, 30 + 2)
    for index, left in ((3, 2), (7, 2 + 4 * 30)):
        actual = row.crop((left, 2, left + 28, 30)).convert("L").tobytes()
        expected = Image.open(workdir / f"out/{index:06d}.png").convert("L").tobytes()
        assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) <= 1


def test_arithmetic_returns_the_other_concept_if_plus_and_minus_cancel(workdir, ckpt):
    argv = ["arithmetic", "dcgan/demo", "--ckpt", ckpt, "--plus", "1", "--minus", "1", "--plus", "5", "--output", "sum.png"]
    assert forked(main, argv) == 0
    image = Image.open(workdir / "sum.png").convert("L")
    assert image.size == (9 * 30 + 2, 4 * 30 + 2)
    five, total = (image.crop((2, top, 30, top + 28)).tobytes() for top in (32, 92))
    assert max(abs(a - b) for a, b in zip(five, total, strict=True)) <= 1


def test_nearest_training_images_are_those_of_a_search_tree(workdir, ckpt, capfd):
    argv = ["nearest", "dcgan/demo", "--ckpt", ckpt, "--count", "3", "--k", "2", "--output", "nearest.png"]
    assert forked(main, argv) == 0
    output = capfd.readouterr().out
    assert forked(main, ["sample", "dcgan/demo", "--ckpt", ckpt, "--count", "3", "--output", "out"]) == 0
    rows, digits = Image.open(workdir / "nearest.png"), read_split("digits/train")[0].flatten(1)
    assert rows.size == (3 * 30 + 2, 3 * 30 + 2)
    samples = [list(Image.open(workdir / f"out/{i:06d}.png").convert("L").tobytes()) for i in range(3)]
    distances, indices = cKDTree(digits.numpy()).query(samples, k=2)
    for i in range(3):
        assert (pixels(rows, 2, 2 + 30 * i) - torch.tensor(samples[i])).abs().max() <= 1
        for j in range(2):
            assert torch.equal(pixels(rows, 32 + 30 * j, 2 + 30 * i), digits[indices[i, j]].long())
        line = f"sample {i}: training image {indices[i, 0]}, root mean squared difference of pixels"
        assert f"{line} {distances[i, 0] / 28 / 255:.2f}" in output
    for option, reason in ((["--k", "4001"], "--k 4001: must be from 1 to 4000"), (["--count", "0"], "--count 0")):
        assert forked(main, ["nearest", "dcgan/demo", "--ckpt", ckpt, *option]) == 2
        assert reason in capfd.readouterr().err


def test_nearest_images_can_be_flipped():
    data = Generation("digits/train", 28, 1, hflip=True)
    data.setup("fit")
    flipped = read_split("digits/train")[0][[2500, 7]].float().flip(3) / 255
    distances, images, ids = find_nearest(flipped, data, 3)
    assert ids[:, 0].tolist() == [2500, 7]
    assert torch.equal(images[:, 0], flipped)
    assert (distances[:, 0] == 0).all()
    assert (distances.diff(dim=1) > 0).all()


def save_untrained_vae(path):
    """Save the weights of an untrained network of vae/demo, and return the network."""
    torch.manual_seed(0)
    method = VAE(hidden_dims=[256, 128], latent_size=2, activation="relu").eval()
    torch.save({"state_dict": method.state_dict()}, path)
    return method


def pixels(image, left, top, side=28):
    return torch.tensor(list(image.crop((left, top, left + side, top + side)).convert("L").tobytes()))


def digits_test_images():
    """Return the test images of vae/demo: (500, 1, 28, 28)."""
    return binarize(read_split("digits/test")[0].float() / 255, 0, "binarise/digits-test", 0)


def test_reconstruct_places_reconstructions_below_the_images(workdir):
    method = save_untrained_vae(workdir / "vae.ckpt")
    argv = ["reconstruct", "vae/demo", "--ckpt", "vae.ckpt", "--indices", "7", "300", "--output", "rows.png"]
    assert forked(main, argv) == 0
    rows, images = Image.open(workdir / "rows.png"), digits_test_images()[[7, 300]]
    assert rows.size == (2 + 2 * 30, 2 + 2 * 30)
    with torch.no_grad():
        expected = method(images)
    for column in (0, 1):
        assert (pixels(rows, 2 + 30 * column, 2) - 255 * images[column].flatten()).abs().max() <= 1
        assert (pixels(rows, 2 + 30 * column, 32) - 255 * expected[column].flatten()).abs().max() <= 1


def test_reconstruct_shows_the_corrupted_inputs_of_a_denoiser(workdir):
    assert (
        forked(main, ["reconstruct", "autoencoder/demo", "--ckpt", save_untrained_denoiser(workdir), "--output", "rows.png"])
        == 0
    )
    assert Image.open(workdir / "rows.png").size == (2 + 16 * 30, 2 + 3 * 30)


def save_untrained_denoiser(folder):
    torch.manual_seed(0)
    method = Autoencoder(hidden_dims=[512, 128], latent_size=32, corruption="noise", corruption_level=0.4)
    torch.save({"state_dict": method.state_dict()}, folder / "denoiser.ckpt")
    return str(folder / "denoiser.ckpt")


def test_retrieve_matches_scipy_nearest_neighbors(workdir, capfd):
    """The reference is scipy on codes that the test computes. A green frame marks a neighbor of the query's class."""
    method = save_untrained_vae(workdir / "vae.ckpt")
    argv = ["retrieve", "vae/demo", "--ckpt", "vae.ckpt", "--indices", "4", "20", "--k", "3", "--output", "grid.png"]
    assert forked(main, argv) == 0
    images, labels = digits_test_images(), read_split("digits/test")[1]
    with torch.no_grad():
        codes = method.posterior(images)[0].numpy()
    neighbors = cKDTree(codes).query(codes[[4, 20]], 4)[1]
    assert neighbors[:, 0].tolist() == [4, 20]
    grid = Image.open(workdir / "grid.png")
    assert grid.size == (2 + 4 * 34, 2 + 2 * 34)  # frames of two pixels and gaps of two
    n_same_class = 0
    for row, query in enumerate((4, 20)):
        for column, neighbor in enumerate(neighbors[row]):
            left, top = 2 + 34 * column, 2 + 34 * row
            assert (pixels(grid, left + 2, top + 2) - 255 * images[neighbor].flatten()).abs().max() <= 1
            red, green, _ = grid.getpixel((left, top))
            if column:
                same = labels[neighbor] == labels[query]
                assert (green > red) == same
                n_same_class += int(same)
    assert f"{n_same_class} of 6 have the query's class" in capfd.readouterr().out


def test_interpolation_between_images_decodes_the_mean_code(workdir):
    method = save_untrained_vae(workdir / "vae.ckpt")
    argv = ["interpolate", "vae/demo", "--ckpt", "vae.ckpt", "--images", "--indices", "7", "30", "--steps", "2"]
    assert forked(main, [*argv, "--output", "interpolation.png"]) == 0
    with torch.no_grad():
        codes = method.posterior(digits_test_images()[[7, 30]])[0]
        expected = 255 * method.decode(codes.mean(0, keepdim=True)).flatten()
    assert (pixels(Image.open(workdir / "interpolation.png"), 32, 2) - expected).abs().max() <= 1


def test_manifold_decodes_quantiles_of_the_latent_distribution(workdir):
    """Check the image in the second row and last column."""
    method = save_untrained_vae(workdir / "vae.ckpt")
    argv = ["manifold", "vae/demo", "--ckpt", "vae.ckpt", "--grid-size", "3", "--output", "manifold.png"]
    assert forked(main, argv) == 0
    manifold = Image.open(workdir / "manifold.png").convert("L")
    assert manifold.size == (3 * 28, 3 * 28)
    latents = torch.tensor([[NormalDist().inv_cdf(5 / 6), NormalDist().inv_cdf(1 / 2)]])
    with torch.no_grad():
        expected = method.sample(latents).flatten() * 255
    actual = torch.tensor(list(manifold.crop((56, 28, 84, 56)).tobytes()))
    assert (actual - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["reconstruct", "--indices", "500"], "--indices 500: "),
        (["retrieve", "--k", "500"], "retrieve: --k 500: "),
    ],
)
def test_indices_out_of_range_are_refused(workdir, capfd, argv, message):
    save_untrained_vae(workdir / "vae.ckpt")
    assert forked(main, [argv[0], "vae/demo", "--ckpt", "vae.ckpt", *argv[1:]]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "espcn"], "espcn/demo does not generate images"),
        (["sample", "dcgan/demo", "--count", "0"], "sample: --count 0: "),
        (["interpolate", "dcgan/demo", "--indices", "3"], "interpolate: --indices "),
        (["arithmetic", "dcgan/demo"], "arithmetic: --plus "),
        (["manifold", "vae/demo", "--grid-size", "1"], "manifold: --grid-size 1: "),
        (["reconstruct", "dcgan/demo"], "dcgan/demo does not encode images"),
        (["interpolate", "vae/demo", "--images", "--indices", "3"], "interpolate: --indices "),
        (["retrieve", "vae/demo", "--ckpt", "no.ckpt"], "--ckpt: no file no.ckpt"),
        (["sample", "dcgan/cifar10"], "no weights for dcgan/cifar10; "),
    ],
)
def test_invalid_command_names_the_option(workdir, capfd, argv, message):
    assert forked(main, argv) == 2
    assert message in capfd.readouterr().err
