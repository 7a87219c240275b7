import pytest
import segmentation_models_pytorch as smp
import torch

from datamodules.errors import UserError
from modules.smp import SMPSegmenter
from tests.tasks.segmentation import SegmentationContract

SMALL = {"architecture": "deeplabv3plus", "encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None}


class TestDeepLab(SegmentationContract):
    learns_slowly = True
    model = {
        "class_path": "modules.smp.SMPSegmenter",
        "init_args": {**SMALL, "channels": 1, "num_classes": 2, "tile_size": 64},
    }
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicSMPSegmenter"
    samples = {"crop": 32, "margin": 0, "downscale": 4}
    training_overrides = [
        "--model.total_images",
        "1200",
        "--val_every_images",
        "400",
        "--data.batch_size",
        "16",
        "--model.learning_rate",
        "0.006",
    ]
    min_score = 0.5  # best of the validations; 8 seeds, AVX-512: 0.63 ... 0.81; background everywhere: 0.31
    bf16_rtol = 0.05

    @pytest.mark.slow  # two minutes: depthwise convolutions in float64
    @pytest.mark.parametrize("micro_batches", [1, 2])
    def test_two_ranks_match_one_rank(self, workdir, recipe, micro_batches):
        super().test_two_ranks_match_one_rank(workdir, recipe, micro_batches)


@pytest.mark.parametrize("architecture", ["unet", "unetplusplus", "fpn", "deeplabv3", "pspnet"])
def test_probabilities_cover_every_pixel_with_any_architecture(architecture):
    method = SMPSegmenter(architecture, "resnet18", None, num_classes=5, tile_size=64).eval()
    with torch.no_grad():
        probabilities = method.probabilities(torch.rand(1, 3, 70, 41))
    assert probabilities.shape == (1, 5, 70, 41)
    assert torch.allclose(probabilities.sum(1), torch.ones(1, 70, 41), atol=1e-5)


def test_margin_is_cropped_on_every_side():
    method = SMPSegmenter("unet", "resnet18", None, num_classes=2, tile_size=64, margin=64).eval()
    image = torch.rand(2, 3, 128, 128)
    assert torch.equal(method(image), method.network((image - method.mean) / method.std)[..., 32:-32, 32:-32])


def test_invalid_input_sizes_raise_user_error():
    method = SMPSegmenter("deeplabv3plus", "resnet18", None, num_classes=2, tile_size=64)
    with pytest.raises(UserError, match=r"data\.crop and data\.margin: .*100 "):
        method(torch.rand(2, 3, 100, 100))
    with pytest.raises(UserError, match=r"data\.batch_size: .*two images"):
        method(torch.rand(1, 3, 64, 64))
    with pytest.raises(UserError, match=r"model\.margin: 20"):
        SMPSegmenter("unet", "resnet18", None, margin=20)


def test_setup_loads_pretrained_encoder_and_channel_stats(monkeypatch):
    pretrained = smp.encoders.get_encoder("resnet18", weights=None)
    monkeypatch.setattr(smp.encoders, "get_encoder", lambda name, in_channels, weights: pretrained)
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda name, weights: {"mean": [0.5] * 3, "std": None})
    method = SMPSegmenter("unet", "resnet18", "imagenet")
    method.setup("fit")
    assert all(torch.equal(value, pretrained.state_dict()[name]) for name, value in method.network.encoder.state_dict().items())
    assert method.mean.flatten().tolist() == [0.5] * 3
    assert method.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_output_stride_sets_the_encoder_downsampling():
    for stride in (8, 16):
        method = SMPSegmenter("deeplabv3", "resnet18", None, output_stride=stride, num_classes=2).eval()
        assert method.network.encoder(torch.rand(1, 3, 64, 64))[-1].shape[-1] == 64 // stride


def test_unknown_architecture_or_encoder_raises_user_error():
    with pytest.raises(UserError, match=r"model\.architecture unett, model\.encoder_name resnet18"):
        SMPSegmenter("unett", "resnet18", None)
    with pytest.raises(UserError, match=r"model\.architecture unet, model\.encoder_name resnet17"):
        SMPSegmenter("unet", "resnet17", None)
    with pytest.raises(UserError, match=r"model\.tile_size: 100"):
        SMPSegmenter("unet", "resnet18", None, tile_size=100)


def test_unavailable_weights_raise_user_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    method = SMPSegmenter("unet", "resnet18", "imagenet")
    method.setup("test")
    with pytest.raises(
        UserError, match=r"model\.encoder_weights: imagenet weights of resnet18 .*--model\.encoder_weights null"
    ):
        method.setup("fit")


def test_schedule_is_polynomial():
    method = SMPSegmenter("unet", "resnet18", None, total_images=1000, learning_rate=0.1)
    assert [method.schedule(images_seen) for images_seen in (0, 500, 1000)] == pytest.approx([0.1, 0.1 * 0.5**0.9, 0])
