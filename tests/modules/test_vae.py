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
from tests.tasks.reconstruction import ReconstructionContract, of_digits


class TestVAE(ReconstructionContract):
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [40], "latent_size": 6}}
    deterministic_model = "modules.vae.VAE"
    training_overrides = ["--model.total_images", "60000", "--val_every_images", "20000", "--data.batch_size", "50"]
    min_score = -195  # nats; 8 seeds, AVX-512: -184.6 ... -174.2; first validation: -211 ... -205


@pytest.mark.slow
class TestTwoLayerIWAE(ReconstructionContract):
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
    deterministic_model = "modules.vae.VAE"
    training_overrides = [
        "--model.first_stage_images",
        "0",
        "--model.total_images",
        "60000",
        "--val_every_images",
        "20000",
        "--data.batch_size",
        "50",
    ]
    min_score = -200


def n_parameters(method):
    return sum(p.numel() for p in method.parameters())


def mlp_parameters(*sizes):
    return sum(in_dim * out_dim + out_dim for in_dim, out_dim in pairwise(sizes))


def test_parameter_counts_match_the_papers():
    """pytorch/examples: 784-400-20; IWAE, Section 5: 784-200-200-50, and 784-200-200-100 with 100-100-50."""
    example = VAE(hidden_dims=[400], latent_size=20)
    assert n_parameters(example) == mlp_parameters(784, 400, 40) + mlp_parameters(20, 400, 784)
    one_layer = VAE(hidden_dims=[200, 200], latent_size=50)
    assert n_parameters(one_layer) == mlp_parameters(784, 200, 200, 100) + mlp_parameters(50, 200, 200, 784)
    two_layers = VAE(hidden_dims=[200, 200], latent_size=100, top_dims=[100, 100, 50])
    first_layer = mlp_parameters(784, 200, 200, 200) + mlp_parameters(100, 200, 200, 784)
    assert n_parameters(two_layers) == first_layer + mlp_parameters(100, 100, 100, 100) + mlp_parameters(50, 100, 100, 200)


def test_kl_matches_torch_and_monte_carlo():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(5).double(), 1.0)
    closed_form = kl_standard_normal((mean, log_variance))
    assert torch.allclose(closed_form, kl_divergence(posterior, prior).sum(1), atol=1e-12)
    samples = posterior.sample((200_000,))
    estimates = (posterior.log_prob(samples) - prior.log_prob(samples)).sum(2)  # (samples, 3)
    error = 4 * estimates.std(0) / math.sqrt(len(samples))
    assert ((estimates.mean(0) - closed_form).abs() < error).all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("top_dims", [[], [7, 3]])
def test_log_weights_match_torch_distributions(likelihood, top_dims):
    torch.manual_seed(1)
    method = VAE(size=8, hidden_dims=[9], latent_size=4, top_dims=top_dims, likelihood=likelihood).double()
    image, noise = torch.rand(2, 1, 8, 8).double(), torch.randn(5, 2, method.latent_dim).double()
    if likelihood == "bernoulli":
        image = image.round()
    with torch.no_grad():
        log_weights = method.log_weights(image, noise)
        mean, log_variance = method.encoder(image).chunk(2, 1)
        q = Normal(mean, (log_variance / 2).exp())
        for sample in range(5):
            z = q.mean + q.stddev * noise[sample, :, :4]
            outputs = method.decoder(z)
            if likelihood == "bernoulli":
                pixels = Bernoulli(logits=outputs)
            else:
                pixels = Normal(outputs[:, :1].sigmoid(), ((1 + (outputs[:, 1:] + 8).exp()).log() / 2 - 4).exp())
            expected = pixels.log_prob(image).flatten(1).sum(1) - q.log_prob(z).sum(1)
            prior = Normal(torch.zeros(4).double(), 1.0)
            if top_dims:
                q2 = Normal(*((m if i == 0 else (m / 2).exp()) for i, m in enumerate(method.top_encoder(z).chunk(2, 1))))
                z2 = q2.mean + q2.stddev * noise[sample, :, 4:]
                prior = Normal(*((m if i == 0 else (m / 2).exp()) for i, m in enumerate(method.top_decoder(z2).chunk(2, 1))))
                expected += Normal(torch.zeros(3).double(), 1.0).log_prob(z2).sum(1) - q2.log_prob(z2).sum(1)
            assert torch.allclose(log_weights[sample], expected + prior.log_prob(z).sum(1), atol=1e-10)


def test_bound_with_many_samples_matches_the_integral():
    """Numerical integration over two latents gives -log p(x). The negative ELBO exceeds this value."""
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
        terms = likelihood_terms(method, outputs, seed=0, n_samples=20_000)
        second = {name: values[1:2] for name, values in outputs.items()}
        single = likelihood_terms(method, second, seed=0, n_samples=50)["nll-50"]
        batched = likelihood_terms(method, outputs, seed=0, n_samples=50)["nll-50"]
    assert single.item() == pytest.approx(batched[1].item(), abs=1e-9)  # independent of the rest of the batch
    assert (terms["nll-20000"] - exact).abs().max() < 0.02
    assert -terms["elbo"].mean() > exact.mean() + 0.02


def test_bound_increases_with_n_samples():
    torch.manual_seed(3)
    method = VAE(size=6, hidden_dims=[12], latent_size=4).double()
    image, noise = torch.rand(64, 1, 6, 6).double().round(), torch.randn(1000, 64, 4).double()
    with torch.no_grad():
        weights = method.log_weights(image, noise)
    bounds = [torch.stack([iwae_bound(chunk) for chunk in weights.split(k)]).mean().item() for k in (1, 10, 100)]
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[0] == pytest.approx(weights.mean().item(), abs=1e-9)
    assert iwae_bound(torch.full((7, 2), -3.0)).tolist() == pytest.approx([-3, -3])  # equal weights


def test_losses_are_the_negative_bounds():
    batch = {"image": torch.rand(4, 1, 28, 28), "sample_ids": range(4), "repeat_index": 0}
    for settings in (
        {},
        {"n_samples": 3},
        {"beta": 4.0},
        {"objective": "iwae", "n_samples": 3},
        {"top_dims": [5, 2], "n_samples": 2},
    ):
        method = VAE(hidden_dims=[8], latent_size=3, **settings)
        noise = (
            method.batch_noise(batch, "latent", method.n_samples * method.latent_dim, "fast-normal")
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


def test_schedule_has_the_stages_of_the_paper():
    """3,280 passes in eight stages, each three times as long as the previous one."""
    method = VAE(first_stage_images=60_000, learning_rate=1e-3)
    start = 0
    for stage in range(8):
        for images in (start * 60_000, (start + 3**stage) * 60_000 - 20):
            assert method.schedule(images) == pytest.approx(1e-3 * 10 ** (-stage / 7)), (stage, images)
        start += 3**stage
    assert start == 3280


def test_two_layer_sampling_starts_at_the_top():
    method = VAE(size=8, hidden_dims=[9], latent_size=4, top_dims=[7, 3]).eval()
    latents = method.sample_latents(range(6))
    with torch.no_grad():
        mean, log_variance = method.top_decoder(latents[:, 4:]).chunk(2, 1)
        expected = method.decoder(mean + (log_variance / 2).exp() * latents[:, :4]).sigmoid()
        assert torch.allclose(method.sample(latents), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 0}, r"model\.n_samples: 0"),
        ({"beta": 4.0, "objective": "iwae"}, r"model\.beta: 4\.0 .*model\.objective"),
        ({"beta": 4.0, "top_dims": [5, 2]}, r"model\.beta: 4\.0 .*model\.top_dims"),
        ({"network": "convolutional", "hidden_dims": []}, r"model\.hidden_dims: a convolutional network"),
        ({"top_dims": [5]}, r"model\.top_dims: \[5\]"),
        ({"network": "convolutional", "hidden_dims": [4, 8, 16]}, r"model\.hidden_dims: 3 layers"),
    ],
)
def test_invalid_arguments_raise_user_error(settings, message):
    with pytest.raises(UserError, match=message):
        VAE(**settings)


@pytest.mark.parametrize("network", ["fully-connected", "convolutional"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_init_output_bias_sets_the_mean_image(network, likelihood):
    """The mean is per pixel, or per channel for a convolutional decoder. A resumed run keeps its bias."""
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
        initial = method.decode(torch.zeros(1, 3))[0]
    assert torch.allclose(initial, mean.clamp(0.001, 0.999), atol=1e-5 if network == "fully-connected" else 2e-3)
    with pytest.raises(UserError, match=r"InitOutputBias: Autoencoder has no init_output_bias"):
        InitOutputBias().setup(trainer, Autoencoder(), "fit")


# Data


def test_binarize_samples_pixels_with_their_values_as_probabilities():
    image = torch.linspace(0, 1, 16).expand(20_000, 16).reshape(20_000, 1, 4, 4)
    binary = binarize(image, 0, "binarise", 0)
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    frequency, value = binary.mean(0).flatten(), image[0].flatten()
    assert (frequency[0], frequency[-1]) == (0, 1)
    assert ((frequency - value).abs() < 4 * (value * (1 - value) / 20_000).sqrt() + 1e-9).all()
    assert torch.equal(binarize(image[7:9], 0, "binarise", 7), binary[7:9])  # by index, independent of the rest
    correlation = np.corrcoef(binary[:, 0].flatten(1)[:, 6:10].T)
    assert np.abs(correlation - np.eye(4)).max() < 0.04


def test_training_resamples_pixels_and_validation_does_not():
    data = of_digits(binarization="dynamic")
    items = data.items[0, np.array([3, 3])]
    first, second = data.prepare_train_batch(items)["image"]
    assert not torch.equal(first, second)
    assert not ((first == 1) & (items["image"][0] == 0)).any()
    batches = [next(iter(data.val_dataloader()))["image"] for _ in range(2)]
    assert torch.equal(*batches)


def test_exclude_classes_removes_training_images_only():
    data = of_digits(exclude_classes=[3, 5])
    assert set(data.items.images.labels.tolist()) == {0, 1, 2, 4, 6, 7, 8, 9}
    assert set(data.val_images.labels.tolist()) == set(range(10))
    with pytest.raises(UserError, match=r"data\.exclude_classes: .*digits/train"):
        of_digits(exclude_classes=range(10))
    with pytest.raises(UserError, match=r"data\.exclude_classes: 11: .*digits/train has 0, 1, 2"):
        of_digits(exclude_classes=[3, 11])


def test_wrong_binarization_raises_invalid_image():
    with pytest.raises(InvalidImage, match=r"data\.binarization: static, but digits/train has values between 0 and 255"):
        of_digits(binarization="static")


def test_statically_binarized_dataset_is_read(workdir):
    lay_out("mnist-static")
    pixels, _ = read_split("mnist-static/val")
    assert torch.equal(pixels, 255 * (read_split("digits/train")[0][:30] > 127).to(torch.uint8))
    Reconstruction("mnist-static/train", 28, "mnist-static/val", binarization="static").setup("fit")
    with pytest.raises(InvalidImage, match=r"data\.binarization: dynamic, .*mnist-static/train"):
        Reconstruction("mnist-static/train", 28, "mnist-static/val", binarization="dynamic").setup("fit")
    (workdir / "data/binarized_mnist/binarized_mnist_test.amat").write_text("0 1 0")
    with pytest.raises(InvalidImage, match=r"binarized_mnist_test\.amat: "):
        read_split("mnist-static/test")


def test_omniglot_images_are_transposed(workdir):
    lay_out("omniglot28")
    pixels, labels = read_split("omniglot28/train")
    assert torch.equal(pixels, read_split("digits/train")[0][:40])
    assert labels.tolist() == list(range(40))
    assert len(read_split("omniglot28/test")[0]) == 20
    (workdir / "data/omniglot28/chardata.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(InvalidImage, match=r"chardata\.mat: damaged"):
        read_split("omniglot28/train")


def test_frey_images_are_28x20(workdir):
    lay_out("frey")
    data = Reconstruction("frey/train", [28, 20], "frey/test")
    data.setup("fit")
    image = next(iter(data.val_dataloader()))["image"]
    photograph = Image.open(resolve_images("photographs/test")[0]).convert("L")
    # Image 1,565 is the first of the test split: row 39 and column 5 of the crops, counted from 0.
    assert torch.equal(image[0], to_tensor(photograph.crop((50, 39, 70, 67))))
    assert VAE(size=[28, 20], likelihood="gaussian").eval()(image).shape == image.shape
    for train, size, message in (
        ("frey/train", [20, 28], r"the images of frey/train are \[1, 28, 20\]"),
        ("faces/trainA", [9, 5], r"data\.size: \[9, 5\] .*faces/trainA"),
    ):
        lay_out("faces")
        with pytest.raises(UserError, match=message):
            Reconstruction(train, size, train).setup("fit")
    (workdir / "data/frey/frey_rawface.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(InvalidImage, match=r"frey_rawface\.mat: damaged"):
        read_split("frey/all")


def test_folder_names_are_classes(workdir):
    """In the layout of MVTec, the training split has only good images. The test split also has defective images."""
    classes_by_split = {"train": ["good"], "test": ["broken", "good", "scratched"]}
    for split, folders in classes_by_split.items():
        for i, folder in enumerate(folders):
            path = workdir / "bottle" / split / folder
            path.mkdir(parents=True)
            for index in range(2):
                Image.new("L", (16, 16), 100 + 10 * i + index).save(path / f"{index}.png")
    data = Reconstruction("./bottle/train", 16, "./bottle/test", ["./bottle/test"])
    data.setup("fit")
    assert data.class_names == ["good", "broken", "scratched"]
    assert data.val_images.labels.tolist() == [1, 1, 0, 0, 2, 2]
    assert data.is_unseen(data.val_images.labels).tolist() == [True, True, False, False, True, True]
    data = Reconstruction("./bottle/test", 16, "./bottle/test", exclude_classes=["scratched", "broken"])
    data.setup("fit")
    assert [data.class_names[label] for label in data.items.images.labels] == ["good", "good"]
    assert data.is_unseen(data.val_images.labels).tolist() == [True, True, False, False, True, True]


def test_active_units_have_varying_codes():
    callback = Likelihood()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(500, 3, generator=generator) * torch.tensor([1.0, 0.2, 0.05])
    callback.batch = {"code": codes.numpy(), "elbo": np.arange(500.0)}
    states = [callback.update({}, i) for i in range(500)]
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(binarization="static"), lightning_module=SimpleNamespace(likelihood="bernoulli")
    )
    metrics = callback.compute(states, trainer)
    assert metrics == {"active-units/bernoulli-static": 2.0, "elbo/bernoulli-static": 249.5}
