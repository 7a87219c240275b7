"""Classifiers with published weights, and the accuracy of their predictions on recolored images."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights

from callbacks.metrics.accuracy import Accuracy
from callbacks.metrics.classifier_accuracy import ClassifierAccuracy
from datamodules.colorization import Colorization
from datamodules.errors import UserError
from datamodules.io.image_io import read_image
from datamodules.io.paths import find_file
from modules.networks.classifiers import find_classifier
from tests.helpers.fake_datasets import lay_out


def with_statistics(network):
    """Give batch normalization statistics other than the initial ones."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval()


def test_torchvision_classifier_equals_torchvision_on_files(workdir, photos):
    torch.manual_seed(0)
    network = with_statistics(get_model("shufflenet_v2_x0_5"))
    torch.save(network.state_dict(), workdir / "weights.pth")
    classifier = find_classifier("shufflenet_v2_x0_5")
    classifier.load(workdir / "weights.pth")
    transforms = get_model_weights("shufflenet_v2_x0_5")["DEFAULT"].transforms()
    for path in sorted(photos.iterdir())[:2]:
        expected = network(transforms(Image.open(path).convert("RGB"))[None])
        found = classifier(read_image(path).expand(3, -1, -1)[None])
        # PIL and torch resize with a difference of at most one level
        assert (found - expected).abs().max() < 0.02 * expected.std(), path


def test_resnet_of_cifar10_equals_its_definition(workdir):
    """The reference follows He et al., Section 4.2, on a file in the layout of `nn.DataParallel`."""
    torch.manual_seed(0)
    classifier = with_statistics(find_classifier("cifar10-resnet20").build_network())
    weights = classifier.state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, workdir / "weights.th")
    loaded = find_classifier("cifar10-resnet20")
    loaded.load(workdir / "weights.th")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def normalize(maps, name):
        values = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(maps, *values)

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    maps = (images.permute(0, 2, 3, 1) / 255 - mean).div(std).permute(0, 3, 1, 2)
    maps = F.relu(normalize(F.conv2d(maps, weights["conv1.weight"], padding=1), "bn1"))
    for layer in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            inner = F.relu(normalize(F.conv2d(maps, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            inner = normalize(F.conv2d(inner, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(maps), maps.shape[1] // 2, *inner.shape[-2:])
                maps = torch.cat([zeros, maps[:, :, ::2, ::2], zeros], dim=1)
            maps = F.relu(maps + inner)
    expected = F.linear(maps.mean((2, 3)), weights["linear.weight"], weights["linear.bias"])
    assert torch.allclose(loaded(images), expected, atol=1e-4)
    assert sum(parameter.numel() for parameter in loaded.network.parameters()) == pytest.approx(
        0.27e6, rel=0.02
    )  # their Table 6


@pytest.mark.parametrize("name", ["vgg-16", "fasterrcnn_resnet50_fpn", "cifar10-resnet18"])
def test_other_classifiers_are_refused(name):
    with pytest.raises(UserError, match=f"classifier: '{name}'"):
        find_classifier(name)


def test_files_of_other_networks_are_refused(workdir):
    for name, content in (("tensors", {"a": torch.zeros(1)}), ("list", [torch.zeros(1)]), ("nested", {"state_dict": 3})):
        torch.save(content, workdir / f"{name}.pth")
        with pytest.raises(UserError, match=f"{name}.pth does not contain the weights of the classifier"):
            find_classifier("cifar10-resnet20").load(workdir / f"{name}.pth")


def set_up(workdir, metric, spec):
    """Return a trainer with a dataset, after the setup of the metric with random weights."""
    torch.manual_seed(0)
    torch.save(with_statistics(find_classifier("cifar10-resnet20").build_network()).state_dict(), workdir / "weights.pth")
    data = Colorization("cifar10-jpeg/train", "cifar10-jpeg/val", [spec], size=32, resize=32)
    data.setup("test")
    trainer = SimpleNamespace(
        datamodule=data,
        is_global_zero=True,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        state=SimpleNamespace(fn="test"),
    )
    metric.setup(trainer, None, "test")
    return trainer


def evaluate(metric, trainer, change):
    """Evaluate the metric on the test images, where the prediction is `change` of an image."""
    module = SimpleNamespace(log_dict=lambda *args, **kwargs: None, images_seen=0)
    metric.on_test_epoch_start(trainer, module)
    for i, batch in enumerate(trainer.datamodule.test_dataloader()):
        outputs = trainer.datamodule.prepare_eval_batch(batch)
        metric.on_test_batch_end(trainer, module, {**outputs, "prediction": change(outputs["image"])}, None, i)
    metric.on_test_epoch_end(trainer, module)
    return metric.results


def test_accuracy_is_that_of_the_classifier_on_8_bit_images(workdir):
    lay_out("cifar10-jpeg")
    metric = ClassifierAccuracy("cifar10-resnet20", "weights.pth")
    trainer = set_up(workdir, metric, "cifar10-jpeg/test")
    results = evaluate(metric, trainer, lambda image: 0.7 * image + 0.004)["cifar10-jpeg-test"]["all"]
    images = torch.stack(trainer.datamodule.test_images.images)
    labels = trainer.datamodule.test_images.labels
    classifier = find_classifier("cifar10-resnet20")
    classifier.load(workdir / "weights.pth")
    changed = (0.7 * images.double() + 0.004 * 255).round().clamp(0, 255).to(torch.uint8)
    for name, pixels in (("top1", changed), ("top1-real", images)):
        expected = 100 * float((classifier(pixels).argmax(1) == labels).double().mean())
        assert results[f"{name}/cifar10-resnet20"] == pytest.approx(expected)
    assert metric.evaluator_hash


def test_datasets_with_other_classes_are_reported_and_skipped(workdir, photos, capsys):
    lay_out("cifar10-jpeg")
    metric = ClassifierAccuracy("cifar10-resnet20", "weights.pth")
    trainer = set_up(workdir, metric, str(photos))
    assert evaluate(metric, trainer, lambda image: image) == {photos.name: {"all": {}}}
    assert f"skipped   top1/cifar10-resnet20 on {photos.name}" in capsys.readouterr().out


def test_missing_weights_are_an_error_unless_the_metric_is_skipped(workdir, capsys):
    lay_out("cifar10-jpeg")
    with pytest.raises(UserError, match=r"absent.pth.*on_missing_weights skip"):
        set_up(workdir, ClassifierAccuracy("cifar10-resnet20", "absent.pth"), "cifar10-jpeg/test")
    metric = ClassifierAccuracy("cifar10-resnet20", "absent.pth", on_missing_weights="skip")
    assert evaluate(metric, set_up(workdir, metric, "cifar10-jpeg/test"), lambda image: image)["cifar10-jpeg-test"] == {
        "all": {}
    }
    assert "absent.pth" in capsys.readouterr().out
    with pytest.raises(UserError, match="classifier: 'resnet20'"):
        set_up(workdir, ClassifierAccuracy("resnet20", "absent.pth", on_missing_weights="skip"), "cifar10-jpeg/test")


def test_published_resnets_have_their_accuracy_on_the_images(with_real_data):
    """The weights have 81 % on these JPEGs."""
    weights = "weights/cifar10-resnet/resnet20-12fca82f.th"
    data = Colorization("cifar10-jpeg/train", "cifar10-jpeg/val", ["cifar10-jpeg/test"], size=32, resize=32)
    data.setup("test")
    classifier = find_classifier("cifar10-resnet20")
    classifier.load(find_file(weights, "weights"))
    images, labels = torch.stack(data.test_images.images), data.test_images.labels
    hits = torch.cat([classifier(part).argmax(1) for part in images.split(250)]) == labels
    assert 100 * hits.double().mean() == pytest.approx(81, abs=1)


def test_accuracy_of_classification_counts_the_highest_scores():
    metric = Accuracy()
    metric.class_counts = {"set": 2}
    logits = {"a": torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]] * 4)}
    outputs = {"logits": logits, "label": torch.tensor([1, 0, 0, 0]), "dataset": ["set"] * 4}
    states = [metric.update(outputs, i) for i in range(4)]
    assert metric.compute(states, None) == {"top1/a": 75.0, "top1/b": 25.0}
