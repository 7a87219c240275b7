import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Bernoulli, Normal, kl_divergence
from torchvision.transforms.functional import to_tensor

from callbacks.metrics.likelihood import Likelihood, likelihood_terms
from callbacks.run.init_output_bias import InitOutputBias
from datamodules.catalog.array_readers import read_split
from datamodules.catalog.catalog import resolve_images
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.reconstruction import Reconstruction, binarize
from modules.autoencoder import Autoencoder
from modules.vae import VAE, iwae_bound, kl_standard_normal
from tests.helpers.fake_datasets import lay_out
from tests.helpers.method_contract import ReconstructionContract
from tests.helpers.tiny_recipes import of_digits


class TestVAE(ReconstructionContract):
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [40], "latent_size": 6}}
    steady = "modules.vae.VAE"
    learns = ["--model.total_images", "60000", "--val_every_images", "20000", "--data.batch_size", "50"]
    mark = -190


@pytest.mark.slow
class TestIWAEOfTwoLayers(ReconstructionContract):
    model = {
        "class_path": "modules.vae.VAE",
        "init_args": {
            "hidden_dims": [40],
            "latent_size": 6,
            "top_dims": [10, 3],
            "objective": "iwae",
            "n_samples": 4,
            "first_stage_images": 20,
        },
    }
    steady = "modules.vae.VAE"
    learns = [
        "--model.first_stage_images",
        "0",
        "--model.total_images",
        "60000",
        "--val_every_images",
        "20000",
        "--data.batch_size",
        "50",
    ]
    mark = -200


def parameters(method):
    return sum(p.numel() for p in method.parameters())


def layers(*sizes):
    return sum(into * out + out for into, out in pairwise(sizes))


def test_networks_are_the_papers():
    """pytorch/examples' 784-400-20; IWAE, Section 5: 784-200-200-50 and 784-200-200-100, 100-100-50, with heads of two."""
    assert parameters(VAE(hidden_dims=[400], latent_size=20)) == layers(784, 400, 40) + layers(20, 400, 784)
    assert parameters(VAE(hidden_dims=[200, 200], latent_size=50)) == layers(784, 200, 200, 100) + layers(50, 200, 200, 784)
    two = VAE(hidden_dims=[200, 200], latent_size=100, top_dims=[100, 100, 50])
    below = layers(784, 200, 200, 200) + layers(100, 200, 200, 784)
    assert parameters(two) == below + layers(100, 100, 100, 100) + layers(50, 100, 100, 200)


def test_divergence_is_torchs_and_monte_carlos():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(5).double(), 1.0)
    closed = kl_standard_normal((mean, log_variance))
    assert torch.allclose(closed, kl_divergence(posterior, prior).sum(1), atol=1e-12)
    draws = posterior.sample((200_000,))
    estimates = (posterior.log_prob(draws) - prior.log_prob(draws)).sum(2)  # (draws, 3)
    error = 4 * estimates.std(0) / math.sqrt(len(draws))
    assert ((estimates.mean(0) - closed).abs() < error).all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("above", [[], [7, 3]])
def test_log_weights_are_those_of_torchs_distributions(likelihood, above):
    torch.manual_seed(1)
    method = VAE(size=8, hidden_dims=[9], latent_size=4, top_dims=above, likelihood=likelihood).double()
    image, noise = torch.rand(2, 1, 8, 8).double(), torch.randn(5, 2, method.latent_size).double()
    if likelihood == "bernoulli":
        image = image.round()
    with torch.no_grad():
        found = method.log_weights(image, noise)
        mean, log_variance = method.encoder(image).chunk(2, 1)
        q = Normal(mean, (log_variance / 2).exp())
        for draw in range(5):
            z = q.mean + q.stddev * noise[draw, :, :4]
            told = method.decoder(z)
            if likelihood == "bernoulli":
                pixels = Bernoulli(logits=told)
            else:
                pixels = Normal(told[:, :1].sigmoid(), ((1 + (told[:, 1:] + 8).exp()).log() / 2 - 4).exp())
            expected = pixels.log_prob(image).flatten(1).sum(1) - q.log_prob(z).sum(1)
            prior = Normal(torch.zeros(4).double(), 1.0)
            if above:
                q2 = Normal(*((m if i == 0 else (m / 2).exp()) for i, m in enumerate(method.top_encoder(z).chunk(2, 1))))
                z2 = q2.mean + q2.stddev * noise[draw, :, 4:]
                prior = Normal(*((m if i == 0 else (m / 2).exp()) for i, m in enumerate(method.top_decoder(z2).chunk(2, 1))))
                expected += Normal(torch.zeros(3).double(), 1.0).log_prob(z2).sum(1) - q2.log_prob(z2).sum(1)
            assert torch.allclose(found[draw], expected + prior.log_prob(z).sum(1), atol=1e-10)


def test_the_bound_of_many_draws_is_the_integral_over_the_latents():
    """Two latents: -log p(x) by the trapezoidal rule; the ELBO is above it."""
    torch.manual_seed(2)
    method = VAE(size=6, hidden_dims=[12], latent_size=2).double()
    for values in method.decoder.parameters():
        values.data *= 1.5
    image = torch.rand(3, 1, 6, 6).double().round()
    points = torch.linspace(-6, 6, 401).double()
    grid = torch.cartesian_prod(points, points)[:, None].expand(-1, 3, -1)  # (401 * 401, 3, 2)
    with torch.no_grad():
        prior = -0.5 * grid.square().sum(2) - math.log(2 * math.pi)
        area = 2 * (points[1] - points[0]).log()
        exact = -((method.log_likelihood(image, grid) + prior).logsumexp(0) + area)
        outputs = {"image": image, "index": torch.arange(3), "code": method.posterior(image)[0]}
        found = likelihood_terms(method, outputs, seed=0, n_samples=20_000)
        alone = likelihood_terms(method, {name: values[1:2] for name, values in outputs.items()}, seed=0, n_samples=50)[
            "nll-50"
        ]
        together = likelihood_terms(method, outputs, seed=0, n_samples=50)["nll-50"]
    assert alone.item() == pytest.approx(together[1].item(), abs=1e-9)  # whatever else is in the batch
    assert (found["nll-20000"] - exact).abs().max() < 0.02
    assert -found["elbo"].mean() > exact.mean() + 0.02


def test_more_draws_make_the_bound_tighter():
    torch.manual_seed(3)
    method = VAE(size=6, hidden_dims=[12], latent_size=4).double()
    image, noise = torch.rand(64, 1, 6, 6).double().round(), torch.randn(1000, 64, 4).double()
    with torch.no_grad():
        weights = method.log_weights(image, noise)
    of_k = [torch.stack([iwae_bound(part) for part in weights.split(k)]).mean().item() for k in (1, 10, 100)]
    assert of_k[0] < of_k[1] < of_k[2]
    assert of_k[0] == pytest.approx(weights.mean().item(), abs=1e-9)
    assert iwae_bound(torch.full((7, 2), -3.0)).tolist() == pytest.approx([-3, -3])  # of equal weights, the weight


def test_the_training_objectives_are_the_bounds():
    batch = {"image": torch.rand(4, 1, 28, 28), "positions": range(4), "repetition": 0}
    for settings in (
        {},
        {"n_samples": 3},
        {"beta": 4.0},
        {"objective": "iwae", "n_samples": 3},
        {"top_dims": [5, 2], "n_samples": 2},
    ):
        method = VAE(hidden_dims=[8], latent_size=3, **settings)
        noise = (
            method.batch_noise(batch, "latent", method.n_samples * method.latent_size, "fast-normal")
            .view(4, method.n_samples, -1)
            .transpose(0, 1)
        )
        loss = sum(method.losses(batch).values())
        weights = method.log_weights(batch["image"], noise)
        if settings.get("objective") == "iwae":
            assert loss.item() == pytest.approx(-iwae_bound(weights).mean().item(), rel=1e-5)
        elif "top_dims" in settings:
            assert loss.item() == pytest.approx(-weights.mean().item(), rel=1e-5)
        else:
            likelihood = weights - method.sample_posterior(method.posterior(batch["image"]), noise)[1]
            expected = settings.get("beta", 1) * kl_standard_normal(method.posterior(batch["image"])).mean() - likelihood.mean()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_legs_of_the_rate_are_those_of_the_paper():
    """3,280 passes in eight legs, each three times as long as the one before."""
    method = VAE(first_stage_images=60_000, learning_rate=1e-3)
    begin = 0
    for leg in range(8):
        for images in (begin * 60_000, (begin + 3**leg) * 60_000 - 20):
            assert method.schedule(images) == pytest.approx(1e-3 * 10 ** (-leg / 7)), (leg, images)
        begin += 3**leg
    assert begin == 3280


def test_samples_of_two_layers_come_from_the_top():
    method = VAE(size=8, hidden_dims=[9], latent_size=4, top_dims=[7, 3]).eval()
    latents = method.sample_latents(range(6))
    with torch.no_grad():
        mean, log_variance = method.top_decoder(latents[:, 4:]).chunk(2, 1)
        expected = method.decoder(mean + (log_variance / 2).exp() * latents[:, :4]).sigmoid()
        assert torch.allclose(method.sample(latents), expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_samples": 0}, r"model\.n_samples: 0; at least one draw"),
        ({"beta": 4.0, "objective": "iwae"}, r"model\.beta: 4\.0 weighs a part of the ELBO"),
        ({"beta": 4.0, "top_dims": [5, 2]}, r"model\.beta: 4\.0 is for one layer of latents"),
        ({"network": "convolutional", "hidden_dims": []}, r"model\.hidden_dims: a convolutional network needs layers"),
        ({"top_dims": [5]}, r"model\.top_dims: \[5\]; hidden units and then latents"),
        ({"network": "convolutional", "hidden_dims": [4, 8, 16]}, r"model\.hidden_dims: 3 layers halve sides of 28x28 pixels"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, says):
    with pytest.raises(UserError, match=says):
        VAE(**settings)


@pytest.mark.parametrize("network", ["fully-connected", "convolutional"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_decoder_can_begin_with_the_mean_picture(network, likelihood):
    """Of pictures in the training set's order; by channels where a bias is a channel's. A run that goes on keeps what it has."""
    data = of_digits()
    method = VAE(network=network, hidden_dims=[8], latent_size=3, likelihood=likelihood)
    trainer = SimpleNamespace(datamodule=data)
    method.images_seen = 20
    before = {name: value.clone() for name, value in method.state_dict().items()}
    InitOutputBias().on_train_start(trainer, method)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    method.images_seen = 0
    InitOutputBias().on_train_start(trainer, method)
    changed = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 1 and changed[0].endswith("bias")
    weights = method.state_dict()[changed[0].replace("bias", "weight")]
    weights.zero_()
    images = read_split("digits/train")[0].float() / 255
    mean = images.mean(0) if network == "fully-connected" else images.mean().expand(1, 28, 28)
    with torch.no_grad():
        begun = method.decode(torch.zeros(1, 3))[0]
    assert torch.allclose(begun, mean.clamp(0.001, 0.999), atol=1e-5 if network == "fully-connected" else 2e-3)
    with pytest.raises(UserError, match=r"InitOutputBias: Autoencoder has no decoder that begins with a picture"):
        InitOutputBias().setup(trainer, Autoencoder(), "fit")


# The data


def test_binarised_pixels_are_drawn_with_their_values():
    image = torch.linspace(0, 1, 16).expand(20_000, 16).reshape(20_000, 1, 4, 4)
    reparameterize = binarize(image, 0, "binarise", 0)
    assert set(reparameterize.unique().tolist()) == {0.0, 1.0}
    share, value = reparameterize.mean(0).flatten(), image[0].flatten()
    assert (share[0], share[-1]) == (0, 1)
    assert ((share - value).abs() < 4 * (value * (1 - value) / 20_000).sqrt() + 1e-9).all()
    assert torch.equal(binarize(image[7:9], 0, "binarise", 7), reparameterize[7:9])  # by position, whatever else is drawn
    neighbours = np.corrcoef(reparameterize[:, 0].flatten(1)[:, 6:10].T)
    assert np.abs(neighbours - np.eye(4)).max() < 0.04


def test_training_draws_anew_and_measuring_does_not():
    data = of_digits(binarization="dynamic")
    items = data.items[0, np.array([3, 3])]
    first, second = data.prepare_train_batch(items)["image"]
    assert not torch.equal(first, second)
    assert not ((first == 1) & (items["image"][0] == 0)).any()
    seen = [next(iter(data.val_dataloader()))["image"] for _ in range(2)]
    assert torch.equal(*seen)


def test_a_class_can_be_left_out_of_training():
    data = of_digits(exclude_classes=[3, 5])
    assert set(data.items.images.labels.tolist()) == {0, 1, 2, 4, 6, 7, 8, 9}
    assert set(data.val_images.labels.tolist()) == set(range(10))
    with pytest.raises(UserError, match=r"data\.exclude_classes: .* leaves nothing of digits/train"):
        of_digits(exclude_classes=range(10))
    with pytest.raises(UserError, match=r"data\.exclude_classes: 11: no classes of digits/train, which has 0, 1, 2"):
        of_digits(exclude_classes=[3, 11])


def test_kinds_of_pixels_are_not_mixed():
    with pytest.raises(InvalidImage, match=r"data\.binarization: static, but digits/train has values between 0 and 255"):
        of_digits(binarization="static")


def test_sets_that_are_binarised_once_are_read(workplace):
    lay_out("mnist-static")
    pixels, _ = read_split("mnist-static/val")
    assert torch.equal(pixels, 255 * (read_split("digits/train")[0][:30] > 127).to(torch.uint8))
    Reconstruction("mnist-static/train", 28, "mnist-static/val", binarization="static").setup("fit")
    with pytest.raises(
        InvalidImage, match=r"data\.binarization: dynamic, but mnist-static/train is binarised already; take static"
    ):
        Reconstruction("mnist-static/train", 28, "mnist-static/val", binarization="dynamic").setup("fit")
    (workplace / "data/binarized_mnist/binarized_mnist_test.amat").write_text("0 1 0")
    with pytest.raises(InvalidImage, match=r"binarized_mnist_test\.amat: cut short"):
        read_split("mnist-static/test")


def test_omniglot_is_read_column_by_column(workplace):
    lay_out("omniglot28")
    pixels, labels = read_split("omniglot28/train")
    assert torch.equal(pixels, read_split("digits/train")[0][:40])
    assert labels.tolist() == list(range(40))
    assert len(read_split("omniglot28/test")[0]) == 20
    (workplace / "data/omniglot28/chardata.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(InvalidImage, match=r"chardata\.mat: damaged"):
        read_split("omniglot28/train")


def test_frey_is_higher_than_wide(workplace):
    lay_out("frey")
    data = Reconstruction("frey/train", [28, 20], "frey/test")
    data.setup("fit")
    image = next(iter(data.val_dataloader()))["image"]
    photograph = Image.open(resolve_images("photographs/test")[0]).convert("L")
    # Number 1,565 is the first of the test: 39 rows down, the fifth column of cuttings.
    assert torch.equal(image[0], to_tensor(photograph.crop((50, 39, 70, 67))))
    assert VAE(size=[28, 20], likelihood="gaussian").eval()(image).shape == image.shape
    for train, size, says in (
        ("frey/train", [20, 28], r"the images of frey/train are \[1, 28, 20\]"),
        ("faces/trainA", [9, 5], "cut square"),
    ):
        lay_out("faces")
        with pytest.raises(UserError, match=says):
            Reconstruction(train, size, train).setup("fit")
    (workplace / "data/frey/frey_rawface.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(InvalidImage, match=r"frey_rawface\.mat: damaged"):
        read_split("frey/all")


def test_folders_are_classes_by_their_names(workplace):
    """As MVTec has them: training sees what is sound, the test has defects beside it."""
    made = {"train": ["good"], "test": ["broken", "good", "scratched"]}
    for part, folders in made.items():
        for i, folder in enumerate(folders):
            path = workplace / "bottle" / part / folder
            path.mkdir(parents=True)
            for number in range(2):
                Image.new("L", (16, 16), 100 + 10 * i + number).save(path / f"{number}.png")
    data = Reconstruction("./bottle/train", 16, "./bottle/test", ["./bottle/test"])
    data.setup("fit")
    assert data.classes == ["good", "broken", "scratched"]
    assert data.val_images.labels.tolist() == [1, 1, 0, 0, 2, 2]
    assert data.is_unseen(data.val_images.labels).tolist() == [True, True, False, False, True, True]
    data = Reconstruction("./bottle/test", 16, "./bottle/test", exclude_classes=["scratched", "broken"])
    data.setup("fit")
    assert [data.classes[label] for label in data.items.images.labels] == ["good", "good"]
    assert data.is_unseen(data.val_images.labels).tolist() == [True, True, False, False, True, True]


def test_active_units_are_those_that_vary():
    callback = Likelihood()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 0.2, 0.05])
    callback.batch = {"code": codes.numpy(), "elbo": np.arange(500.0)}
    kept = [callback.update({}, i) for i in range(500)]
    running = SimpleNamespace(
        datamodule=SimpleNamespace(binarization="static"), lightning_module=SimpleNamespace(likelihood="bernoulli")
    )
    found = callback.compute(kept, running)
    assert found == {"active-units/bernoulli-static": 2.0, "elbo/bernoulli-static": 249.5}
