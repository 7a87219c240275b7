from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks.metrics.linear_probe import LinearProbe, balanced_subset, features
from datamodules.errors import UserError
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import Square
from modules.dcgan import DCGAN


def test_features_are_max_pooled_activations_of_every_layer():
    discriminator = DCGAN(1, 32, 4, 8).discriminator.eval()
    images = torch.rand(2, 1, 32, 32)
    activations = []
    hooks = [layer.register_forward_hook(lambda *arguments: activations.append(arguments[2])) for layer in discriminator]
    discriminator(images * 2 - 1)
    pooled_layers = [
        maps for layer, maps in zip(discriminator, activations, strict=True) if type(layer).__name__ == "LeakyReLU"
    ]
    expected = [
        maps.unflatten(3, (4, -1)).unflatten(2, (4, -1)).amax((3, 5)).flatten(1) for maps in pooled_layers
    ]  # (N, C, 4, h, 4, w)
    for hook in hooks:
        hook.remove()
    assert [maps.shape[1:] for maps in pooled_layers] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert torch.allclose(features(discriminator, images), torch.cat(expected, 1))


def test_number_of_features_matches_the_paper():
    """Section 5.1 of the paper: 28,672 = 16 * (256 + 512 + 1024)."""
    discriminator = DCGAN(3, 32, 5, 256).discriminator.eval()
    assert features(discriminator, torch.rand(1, 3, 32, 32)).shape == (1, 28_672)


def test_balanced_subsets_have_equal_class_counts_and_differ():
    labels = np.arange(100) % 10
    first, second = (balanced_subset(labels, 4, repeat) for repeat in (0, 1))
    assert np.bincount(labels[first]).tolist() == [4] * 10
    assert len(set(first)) == 40
    assert set(first) != set(second)
    with pytest.raises(UserError, match="per_class: 11, but class 0 has only 10 images"):
        balanced_subset(labels, 11, 0)


@pytest.mark.slow
def test_probe_of_pixels_has_the_error_of_a_linear_svm():
    """Direct use of scikit-learn's LinearSVC gives a test error of 12% to 20% with 1,000 digits, and 14% to 20% with 500.

    The features of an untrained discriminator give a lower error than chance, which is 90%.
    """
    logged = {}
    module = SimpleNamespace(
        discriminator=DCGAN(1, 28, 4, 8).discriminator.eval(),
        device=torch.device("cpu"),
        log_dict=lambda metrics, sync_dist: logged.update(metrics),
    )
    data = SimpleNamespace(size=28, channels=1, crop_region=Square(), data_report=DataReport())
    trainer = SimpleNamespace(datamodule=data, world_size=1, global_rank=0)
    LinearProbe("digits/train", "digits/val", "digits/test", per_class=100, repeats=2).on_test_epoch_end(trainer, module)
    sets = ("digits/val", "digits/val", "digits/test")
    LinearProbe(*sets, per_class=None, metric="accuracy").on_test_epoch_end(trainer, module)
    assert 8 < logged["digits-test/svm-error-pixels/1000-labels"] < 20
    assert logged["digits-test/svm-error/1000-labels"] < 60
    assert 78 < logged["digits-test/svm-accuracy-pixels/500-labels"] < 90
    assert logged["digits-test/svm-accuracy/500-labels/std"] == 0  # a single subset
