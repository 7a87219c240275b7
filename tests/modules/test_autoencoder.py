import json
import re
import shlex
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree
from scipy.stats import truncnorm
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_tv_chambolle
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from callbacks.metrics.anomaly import ReconstructionAUROC
from callbacks.metrics.denoising import DenoisingPSNR
from callbacks.metrics.reconstruction_sse import ReconstructionSSE
from callbacks.metrics.retrieval import PrecisionAtK
from callbacks.visualization.previews import PreviewImages
from datamodules.catalog.array_readers import read_split
from datamodules.errors import UserError
from datamodules.io.image_set import ImageSet
from experiments import METHODS
from experiments.cli.main import main
from modules.autoencoder import Autoencoder
from tests.helpers.method_contract import ReconstructionContract
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import of_digits, write_reconstruction_recipe

QUALITY = [
    {"class_path": "callbacks.metrics.denoising.DenoisingPSNR", "init_args": {"tv_weights": [0.1], "on_validation": True}},
    {"class_path": "callbacks.metrics.retrieval.PrecisionAtK", "init_args": {"k": 3, "on_validation": True}},
    {"class_path": "callbacks.metrics.anomaly.ReconstructionAUROC"},
]


class TestDenoisingAutoencoder(ReconstructionContract):
    model = {
        "class_path": "modules.autoencoder.Autoencoder",
        "init_args": {"hidden_dims": [60], "latent_size": 16, "corruption": "noise", "corruption_level": 0.4},
    }
    steady = "modules.autoencoder.Autoencoder"
    learns = ["--model.total_images", "60000", "--val_every_images", "20000", "--data.batch_size", "50"]

    @pytest.fixture
    def recipe(self, workplace):
        model = {**self.model, "init_args": {**self.model["init_args"], "total_images": 60}}
        return write_reconstruction_recipe(
            workplace / "tiny.yaml", model, QUALITY, binarization="real-valued", exclude_classes=[3]
        )

    def has_learned(self, log):
        """Better than what it is given, by three dB."""
        found = {row["name"].rpartition("/")[2]: float(row["value"]) for row in log if "/psnr/" in row["name"]}
        return found["restored"] > found["corrupted"] + 3


def digits():
    images, labels = read_split("digits/train")
    return images[:1000].double() / 255, labels[:1000]


def test_a_linear_one_finds_the_subspace_of_the_principal_components():
    """Trained to its end on centred digits, it leaves what PCA leaves, and its code's span is PCA's."""
    images = digits()[0][:, :, 6:22, 6:22]
    images = images - images.mean(0)
    method = Autoencoder(size=16, hidden_dims=[], latent_size=4).double()
    optimizer = torch.optim.LBFGS(method.parameters(), max_iter=2000, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (method(images) - images).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    flat = images.flatten(1).numpy()
    pca = PCA(4).fit(flat)
    residual = np.square(flat - pca.inverse_transform(pca.transform(flat))).mean()
    assert closure().item() == pytest.approx(residual, rel=1e-4)
    span, _ = np.linalg.qr(method.decoder[0][0].weight.detach().numpy())
    cosines = np.linalg.svd(pca.components_ @ span)[1]  # of the angles between the two subspaces
    assert cosines.min() > 0.999


@pytest.mark.parametrize(("corruption", "corruption_level"), [("noise", 0.3), ("masking", 0.25), ("block", 0.5)])
def test_corruptions_are_what_they_are_called(corruption, corruption_level):
    method = Autoencoder(corruption=corruption, corruption_level=corruption_level)
    image = torch.full((3000, 1, 28, 28), 0.5)
    batch = {"image": image, "positions": range(3000), "repetition": 0}
    noise = method.batch_noise(batch, "corruption", method.noise_dim(image), method.noise_kind)
    seen = method.corrupt(image, noise)
    assert 0 <= seen.min() <= seen.max() <= 1
    if corruption == "noise":
        inside, cut = (seen > 0) & (seen < 1), truncnorm(-5 / 3, 5 / 3, scale=0.3)
        assert (seen[:100] - 0.5)[inside[:100]].std().item() == pytest.approx(cut.std(), abs=0.003)
        assert inside.double().mean().item() == pytest.approx(0.9044, abs=0.002)
    elif corruption == "masking":
        assert (seen == 0).double().mean().item() == pytest.approx(0.25, abs=0.001)
    else:
        holes = seen == 0
        assert (holes.flatten(1).sum(1) == 14 * 14).all()
        rows, columns = holes.any(3)[:, 0], holes.any(2)[:, 0]
        assert (rows.sum(1) == 14).all() and (columns.sum(1) == 14).all()
        first = rows.int().argmax(1)
        assert set(first.tolist()) == set(range(15))  # every place is reached
        assert abs(np.corrcoef(first, columns.int().argmax(1))[0, 1]) < 0.06


def test_the_loss_is_of_the_sound_picture():
    method = Autoencoder(hidden_dims=[20], latent_size=4, corruption="masking", corruption_level=0.5)
    image = torch.rand(6, 1, 28, 28)
    batch = {"image": image, "positions": range(6), "repetition": 0}
    seen = image * (method.batch_noise(batch, "corruption", 784, "uniform").view(6, 1, 28, 28) >= 0.5)
    assert method.losses(batch)["mse"].item() == pytest.approx((method(seen) - image).square().mean().item(), rel=1e-6)


def test_a_convolutional_one_gives_pictures_of_the_same_size():
    method = Autoencoder(3, 32, "convolutional", [4, 8, 16], 5)
    image = torch.rand(2, 3, 32, 32)
    assert method(image).shape == image.shape
    assert method.encoder(image).shape == (2, 5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"corruption": "noise"}, r"model\.corruption_level: 0\.0 of model\.corruption: noise makes no sense"),
        (
            {"corruption": "none", "corruption_level": 0.5},
            r"model\.corruption_level: 0\.5 of model\.corruption: none makes no sense",
        ),
        ({"corruption": "block", "corruption_level": 1.0}, r"model\.corruption_level: 1\.0"),
        ({"corruption": "block", "corruption_level": 0.01}, r"model\.corruption_level: 0\.01 of 28 pixels is no block"),
        ({"network": "convolutional", "hidden_dims": []}, r"model\.hidden_dims: a convolutional network needs layers"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, says):
    with pytest.raises(UserError, match=says):
        Autoencoder(**settings)


@pytest.mark.parametrize(("recipe", "use"), [("vae/demo", "samples"), ("autoencoder/demo", "reconstructions")])
def test_bench_names_its_figures(recipe, use, workplace, capfd):
    assert forked(main, ["bench", recipe, "--pairs", "6", "--steps", "1", "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "images_per_second", "gflops", f"{use}_per_second"):
        assert figures[name] > 0


# What they are worth


def test_anomaly_scores_are_sklearns():
    generator = torch.Generator().manual_seed(0)
    image, made = torch.rand(2, 300, 1, 8, 8, generator=generator).unbind(0)
    label = torch.arange(300) % 10
    made[label == 3] = 0.5 * made[label == 3] + 0.2
    callback = ReconstructionAUROC()
    outputs = {"image": image, "prediction": made, "label": label}

    def running_on(**sets):
        data = SimpleNamespace(
            exclude_classes=["3", "7"], is_unseen=partial(torch.isin, test_elements=torch.tensor([3, 7])), reference_sets=sets
        )
        return SimpleNamespace(datamodule=data)

    running = running_on(some=ImageSet(image, label))
    callback.setup(running, None, "test")
    found = callback.compute([callback.update(outputs, i) for i in range(300)], running)
    errors = np.square((made - image).numpy()).reshape(300, -1).mean(1)
    assert found["auroc/image-l2"] == pytest.approx(roc_auc_score(np.isin(label.numpy(), [3, 7]), errors), abs=1e-6)
    made[0] = torch.nan
    with pytest.raises(UserError, match=r"ReconstructionAUROC: the network gives values back that are not finite"):
        callback.compute([callback.update(outputs, i) for i in range(2)], running)
    with pytest.raises(UserError, match=r"ReconstructionAUROC: SimpleNamespace does not know which classes training sees"):
        callback.setup(SimpleNamespace(datamodule=SimpleNamespace()), None, "test")
    with pytest.raises(UserError, match=r"threes needs both, pictures of classes that training sees and others"):
        callback.setup(running_on(threes=ImageSet(image, 0 * label + 3)), None, "test")


def test_retrieval_is_a_trees():
    images, labels = digits()
    codes = torch.randn(784, 12, generator=torch.Generator().manual_seed(0)).double()
    outputs = {"image": images, "code": images.flatten(1) @ codes, "label": labels}
    callback = PrecisionAtK(k=5)
    found = callback.compute([callback.update(outputs, i) for i in range(1000)], None)
    for name in ("code", "pixels"):
        vectors = outputs["code" if name == "code" else "image"].flatten(1).float().numpy()
        _, answers = cKDTree(vectors).query(vectors, 6)
        assert (answers[:, 0] == np.arange(1000)).all()
        expected = (labels.numpy()[answers[:, 1:]] == labels.numpy()[:, None]).mean()
        assert found[f"precision-at-5/{name}"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("k", "method", "says"),
    [
        (5, Autoencoder(), r"Retrieval\.k: 5 nearest of the 5 pictures of some"),
        (0, Autoencoder(), r"Retrieval\.k: 0; at least one"),
        (1, torch.nn.Identity(), r"Retrieval: Identity has no codes"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_step(k, method, says):
    sets = {"some": ImageSet(torch.zeros(5, 1, 2, 2), torch.zeros(5))}
    with pytest.raises(UserError, match=says):
        PrecisionAtK(k=k).setup(SimpleNamespace(datamodule=SimpleNamespace(reference_sets=sets)), method, "fit")


def test_squared_errors_are_those_of_a_singular_value_decomposition(workplace):
    """Of embedded digits, the components from those that training sees."""
    data = of_digits()
    running = SimpleNamespace(datamodule=data, state=SimpleNamespace(fn="test"))
    images = digits()[0][:20].float()
    outputs = {"image": images, "prediction": 0.9 * images, "code": torch.zeros(20, 6)}
    outputs |= {"name": [f"{i:02d}" for i in range(20)], "dataset": ["some"] * 20}
    callback = ReconstructionSSE()
    callback.setup(running, Autoencoder(), "test")
    callback.on_test_batch_end(running, None, outputs, None, 0)
    found = callback.compute(list(callback.state["some"].values()), running)
    assert found["sse/network"] == pytest.approx(0.01 * images.square().sum().item() / 20, rel=1e-6)
    seen = read_split("digits/train")[0].flatten(1).double() / 255
    mean = seen.mean(0)
    components = torch.linalg.svd(seen - mean, full_matrices=False)[2][:6]
    centred = images.flatten(1).double() - mean
    lost = (centred - centred @ components.T @ components).square().sum(1).mean().item()
    assert found["sse/pca"] == pytest.approx(lost, rel=1e-4)
    data.exclude_classes = ["3"]
    with pytest.raises(UserError, match=r"ReconstructionSSE: the components are those of whole sets"):
        callback.setup(running, Autoencoder(), "fit")
    with pytest.raises(UserError, match=r"ReconstructionSSE: Identity on Reconstruction has no codes"):
        callback.setup(running, torch.nn.Identity(), "fit")


def test_restoration_is_skimages():
    generator = torch.Generator().manual_seed(0)
    image = digits()[0][:4].float()
    outputs = {"image": image, "input": (image + 0.3 * torch.randn(image.shape, generator=generator)).clamp(0, 1)}
    outputs["prediction"] = 0.8 * image
    callback = DenoisingPSNR([0.1, 0.4])
    found = callback.compute([callback.update(outputs, i) for i in range(4)], None)
    sound, seen, made = (outputs[name].double().numpy()[:, 0] for name in ("image", "input", "prediction"))

    def mean(pictures):
        return np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(sound, pictures, strict=True)])

    assert found["psnr/output"] == pytest.approx(mean(made), abs=1e-6)
    assert found["psnr/input"] == pytest.approx(mean(seen), abs=1e-6)
    of_weights = [mean([denoise_tv_chambolle(picture, weight=weight) for picture in seen]) for weight in (0.1, 0.4)]
    assert found["psnr/tv-chambolle"] == pytest.approx(max(of_weights), abs=1e-6)


def test_the_sheet_shows_what_comes_back_below_the_pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image, seen, made = torch.rand(3, 20, 1, 6, 8, generator=generator).unbind(0)
    samples = PreviewImages(tmp_path, sheet=12)
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False, loggers=[], state=SimpleNamespace(fn="fit"))
    method = SimpleNamespace(images_seen=30)
    samples.on_validation_epoch_start(trainer, method)
    for i, outputs in enumerate(({"image": image, "input": seen, "prediction": made}, {"image": made, "prediction": image})):
        samples.on_validation_batch_end(trainer, method, {**outputs, "code": None}, None, i)
    samples.on_validation_epoch_end(trainer, method)
    sheet = np.asarray(Image.open(tmp_path / "000000030.png"))[:, :, 0]
    assert sheet.shape == (3 * 8 + 2 + 4, 3 * 10 + 2)  # a quarter of the sheet, the first of the first batch
    for row, pictures in enumerate((image, seen, made)):
        for column in range(3):
            cell = sheet[2 + 8 * row : 8 + 8 * row, 2 + 10 * column : 10 + 10 * column]
            assert np.abs(cell - pictures[column, 0].numpy() * 255).max() <= 0.501


def test_defects_are_found_by_the_command_that_the_page_has(workplace, photos):
    """Of sets in folders, as MVTec's."""
    page = (METHODS / "autoencoder/README.md").read_text()
    command = re.search(r"```text\ndarkroom (.*?)```", page, re.DOTALL)[1]
    generator = np.random.default_rng(0)
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/broken_large", 4)):
        (workplace / "bottle" / folder).mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(workplace / f"bottle/{folder}/{i:03d}.png")
    assert (
        forked(
            main, [*shlex.split(command), "--model.total_images", "64", "--val_every_images", "64", "--data.batch_size", "4"]
        )
        == 0
    )
    record = json.loads((workplace / "runs/autoencoder/exclude_0/bottle/record.json").read_text())
    assert 0 <= record["metrics"]["bottle-test"]["auroc/image-l2"]["mean"] <= 1
