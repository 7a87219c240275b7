import pytest
import torch

from modules.srcnn import SRCNN
from tests.tasks.superresolution import SuperResolutionContract


class TestSRCNN(SuperResolutionContract):
    model = {"class_path": "modules.srcnn.SRCNN", "init_args": {"scale": 3}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicSRCNN"
    training_overrides = ["--model.total_images", "800", "--val_every_images", "200", "--model.warmup", "80"]
    min_psnr_gain_db = 2  # 8 seeds, AVX-512: 7.1 ... 12.4; untrained: 0


@pytest.mark.parametrize(("kernels", "weights"), [("9-1-5", 8_032), ("9-5-5", 57_184)])
def test_weight_counts_match_the_paper(kernels, weights):
    assert sum(p.numel() for name, p in SRCNN(3, kernels).named_parameters() if name.endswith("weight")) == weights


def test_forward_valid_equals_the_interior_of_forward():
    network, lr_image = SRCNN(3), torch.rand(2, 1, 20, 21)
    margin = 12
    inside = network(lr_image)[..., margin:-margin, margin:-margin]
    assert torch.allclose(network.forward_valid(lr_image), inside, atol=1e-6)
