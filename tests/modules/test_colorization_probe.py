"""Linear classification of features: its features and classifiers against scikit-learn, and the contract."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage.color import rgb2lab
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from datamodules.classification import Classification
from datamodules.errors import UserError
from experiments.cli.main import main
from modules.colorization import ColorfulColorization
from modules.colorization_probe import LAYERS, ColorizationProbe
from modules.networks.weights import inference_state_dict
from tests.helpers.subprocess_helpers import forked
from tests.tasks.classification import ClassificationContract, write_classification_recipe

MODEL = {
    "class_path": "modules.colorization_probe.ColorizationProbe",
    "init_args": {"n_classes": 10, "size": 24, "base_channels": 4, "n_features": 300, "learning_rate": 3e-3},
}


class TestColorizationProbe(ClassificationContract):
    model = MODEL
    deterministic_model = "modules.colorization_probe.ColorizationProbe"
    training_overrides = ["--model.total_images", "8000", "--val_every_images", "8000", "--data.batch_size", "32"]
    min_accuracy = 40  # 65 ... 75 over eight seeds


def test_features_are_means_of_the_blocks_of_the_colorization_network(workdir):
    torch.manual_seed(0)
    source = ColorfulColorization(base_channels=4).eval()
    for layer in source.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
    save_file(inference_state_dict(source, source.state_dict()), workdir / "network.safetensors")
    probe = ColorizationProbe(str(workdir / "network.safetensors"), n_classes=3, size=48, base_channels=4, n_features=200)
    probe.setup("fit")
    probe.train()  # the network keeps its statistics
    lightness = 100 * torch.rand(2, 1, 48, 48)
    maps, expected = (lightness - 50) / 100, []
    for block, classifier, side in zip(source.network, probe.classifiers, (7, 5, 3, 2, 2), strict=False):
        maps = block(maps)
        length = maps.shape[-1]
        bounds = [(length * i // side, -(-length * (i + 1) // side)) for i in range(side)]
        cells = [maps[:, :, a:b, c:d].mean((2, 3)) for a, b in bounds for c, d in bounds]  # (N, C) each
        expected.append(classifier(torch.stack(cells, dim=2).flatten(1)))
    assert torch.allclose(probe(lightness), torch.stack(expected, 1), atol=1e-5)
    assert probe.file_hashes()["colorization network"]


def test_network_is_not_trained_and_its_checkpoint_contains_it(workdir):
    recipe = write_classification_recipe(workdir / "tiny.yaml", MODEL)
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "40", "--data.batch_size", "20"]) == 0
    state = torch.load(workdir / "runs/tiny/r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(0)
    start = ColorizationProbe(**MODEL["init_args"]).state_dict()
    assert state.keys() == start.keys()
    for name, value in state.items():
        assert torch.equal(value, start[name]) != name.startswith("classifiers"), name


def test_losses_are_those_of_separate_classifiers():
    """The reference is scikit-learn's logistic regression with the same weights."""
    torch.manual_seed(0)
    probe = ColorizationProbe(n_classes=10, size=24, base_channels=4, n_features=150)
    data = Classification("digits/train", "digits/val", size=24, resize=24)
    data.setup("fit")
    images, labels = torch.stack(list(data.val_images.images[:50])).float() / 255, data.val_images.labels[:50]
    batch = {"image": images, "label": labels}
    lightness = torch.from_numpy(rgb2lab(images.permute(0, 2, 3, 1).numpy()))[..., 0][:, None].float()
    losses, logits, maps = probe.losses(batch), probe.validation_step(batch, 0)["logits"], (lightness - 50) / 100
    assert list(losses) == list(logits) == list(LAYERS)
    for i, layer in enumerate(LAYERS):
        maps = probe.network[i](maps)
        features = F.adaptive_avg_pool2d(maps, probe.sides[i]).flatten(1).numpy()
        reference = LogisticRegression()
        reference.classes_ = np.arange(10)
        reference.coef_, reference.intercept_ = (value.detach().numpy() for value in probe.classifiers[i].parameters())
        assert losses[layer].item() == pytest.approx(log_loss(labels, reference.predict_proba(features)), rel=1e-4)
        assert logits[layer].detach().numpy() == pytest.approx(reference.decision_function(features), abs=1e-4)


def test_wrong_settings_are_refused(workdir, capfd):
    data = Classification("digits/train", "digits/val", size=24, resize=28)
    data.setup("fit")
    with pytest.raises(UserError, match=r"model.n_classes: 7.*10 classes"):
        ColorizationProbe(n_classes=7, size=24, base_channels=4).inspect_data(data)
    recipe = write_classification_recipe(workdir / "tiny.yaml", MODEL)
    some = workdir / "some_digits"
    (some / "9").rename(workdir / "nine")  # labels would still be right, but those after an absent class would not
    assert forked(main, ["fit", str(recipe), "--run", "r", "--model.total_images", "8"]) == 2
    assert "some_digits: it has 9 folders of classes" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"model.n_features: 20.*32 channels"):
        ColorizationProbe(n_classes=10, size=24, base_channels=4, n_features=20)
    with pytest.raises(UserError, match=r"data.size: 30.*Use 32"):
        Classification("digits/train", "digits/val", size=30)
    with pytest.raises(UserError, match=r"model.weights: no file absent.ckpt"):
        ColorizationProbe("absent.ckpt", n_classes=10).setup("fit")
    torch.save({"a": torch.zeros(1)}, workdir / "other.pth")
    with pytest.raises(UserError, match=r"other.pth does not fit this model"):
        ColorizationProbe(str(workdir / "other.pth"), n_classes=10).setup("fit")


def test_labels_are_those_of_image_folder(workdir, photos, monkeypatch):
    """Only some of the folders have images that the pattern of a split selects."""
    from torchvision.datasets import ImageFolder

    for i, path in enumerate(sorted(photos.iterdir())[:6]):
        folder = workdir / "data/ImageNet/val" / f"n{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_0000{i}.JPEG").write_bytes(path.read_bytes())
        (folder / f"ILSVRC2012_val_0001{i}.JPEG").write_bytes(path.read_bytes())
    for path in (workdir / "data/ImageNet/val/n1").glob("*_0001*"):
        path.unlink()
    expected = dict(ImageFolder(str(workdir / "data/ImageNet/val")).samples)
    data = Classification("imagenet-val/test", "imagenet-val/val", size=32, resize=32, streaming=True)
    data.setup("fit")
    assert data.train_class_count() == 3
    found = {str(path): int(label) for path, label in zip(data.crops.files, data.crops.labels, strict=True)}
    assert found == {path: label for path, label in expected.items() if "_0001" in path}
    crops = data.crops[0, np.array([0, 3])]
    assert crops["label"].tolist() == [int(data.crops.labels[i]) for i in (0, 3)]
    monkeypatch.chdir(workdir / "data/ImageNet/val/n0")
    data = Classification(".", ".", size=32, resize=32)
    data.setup("fit")
    assert data.crops.labels.tolist() == [0] * len(data.crops)
    assert data.train_class_count() == 3
