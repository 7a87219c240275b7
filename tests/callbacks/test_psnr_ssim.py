import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from callbacks.metrics.psnr_ssim import PSNRSSIM, psnr_y, ssim_y
from datamodules.errors import UserError
from datamodules.io.image_refs import list_image_refs
from datamodules.superresolution_datasets import SREvalImages
from modules.bicubic import Bicubic
from tests.helpers.subprocess_helpers import SERVER


@pytest.fixture(scope="module")
def pair():
    """Return bicubic predictions for three photographs, and their targets, cropped to equal size."""
    images = SREvalImages(list_image_refs("photographs/test"), 3)
    batches = [images[i] for i in range(3)]
    prediction = torch.cat([Bicubic(3)(batch["input"])[..., 30:189, 30:201] for batch in batches])
    return prediction, torch.cat([batch["target"][..., 30:189, 30:201] for batch in batches])


def levels(image, crop_border):
    return np.floor(image.numpy() * 255.0 + 0.5).clip(0, 255)[0, crop_border:-crop_border, crop_border:-crop_border]


@pytest.mark.parametrize("crop_border", [2, 3, 4])
def test_psnr_matches_skimage(pair, crop_border):
    for i, value in enumerate(psnr_y(*pair, crop_border)):
        prediction, target = (levels(images[i], crop_border) for images in pair)
        assert value.item() == pytest.approx(peak_signal_noise_ratio(target, prediction, data_range=255), abs=1e-4)


@pytest.mark.parametrize("crop_border", [2, 3, 4])
def test_ssim_matches_skimage_over_inner_windows(pair, crop_border):
    for i, value in enumerate(ssim_y(*pair, crop_border)):
        prediction, target = (levels(images[i], crop_border).astype(np.float64) for images in pair)
        _, full = structural_similarity(
            target, prediction, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        assert value.item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-4)


def test_perfect_image_has_infinite_psnr_and_ssim_1(pair):
    assert psnr_y(pair[1], pair[1], 3).tolist() == [float("inf")] * 3
    assert ssim_y(pair[1], pair[1], 3) == pytest.approx(torch.ones(3))


def test_image_smaller_than_the_window_raises():
    with pytest.raises(UserError, match="11x11 pixels"):
        ssim_y(torch.zeros(1, 1, 16, 40), torch.zeros(1, 1, 16, 40), 3)


class FakeTrainer:
    """The part of Trainer and LightningModule that the callback uses."""

    world_size = 1
    device = torch.device("cpu")
    state = type("State", (), {"fn": "test"})

    def __init__(self, world_size=1):
        self.world_size, self.logged = world_size, {}

    def log_dict(self, metrics, sync_dist):
        self.logged = metrics


def evaluate(pair, batches, rank=0, world=1):
    """Return the metrics logged on a rank that receives `batches`, which are lists of image indices."""
    trainer, callback = FakeTrainer(world), PSNRSSIM(3)
    callback.on_test_epoch_start(trainer, trainer)
    for indices in batches:
        outputs = {
            "prediction": pair[0][indices],
            "target": pair[1][indices],
            "name": [f"image{n}" for n in indices],
            "dataset": ["set"] * len(indices),
        }
        callback.on_test_batch_end(trainer, trainer, outputs, None, 0)
    callback.on_test_epoch_end(trainer, trainer)
    return trainer.logged


def test_metrics_do_not_depend_on_the_batch_size(pair):
    one_by_one = evaluate(pair, [[0], [1], [2]])
    assert one_by_one.keys() == {"set/psnr-y/crop3", "set/ssim-y/crop3"}
    assert one_by_one == pytest.approx(evaluate(pair, [[0, 1, 2]]), abs=1e-12)
    assert one_by_one["set/psnr-y/crop3"] == pytest.approx(psnr_y(*pair, 3).mean().item(), abs=1e-12)


def _evaluate_rank(rank, pair, store, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put(evaluate(pair, [[0], [2]] if rank == 0 else [[1]], rank, 2))
    torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_numbers_of_images_give_the_same_metrics(pair, tmp_path):
    queue = SERVER.Queue()
    processes = [SERVER.Process(target=_evaluate_rank, args=(r, pair, tmp_path / "store", queue)) for r in (0, 1)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120), queue.get(timeout=120)]
    for process in processes:
        process.join()
    assert results[0] == results[1] == evaluate(pair, [[0], [1], [2]])


def test_state_is_reset_before_a_validation(pair):
    trainer, callback = FakeTrainer(), PSNRSSIM(3)
    callback.state = {"set": {"sanity": {"psnr-y/crop3": 0.0, "ssim-y/crop3": 0.0}}}
    callback.on_validation_epoch_start(trainer, trainer)
    assert callback.state == {}


@pytest.mark.parametrize(
    ("scale", "set5", "set14", "set14_gray"),
    [(2, 33.66, 30.23, 30.14), (3, 30.39, 27.54, 27.45), (4, 28.42, 26.00, 25.91)],
)
def test_bicubic_psnr_matches_published_values(with_real_data, scale, set5, set14, set14_gray):
    """The values are from the SRCNN, VDSR and ESPCN papers. In the last column, `man` is a grayscale image."""
    for name, published in {"set5": set5, "set14": set14, "set14-gray": set14_gray}.items():
        images = SREvalImages(list_image_refs(name), scale)
        batches = [images[i] for i in range(len(images))]
        values = [psnr_y(Bicubic(scale)(batch["input"]), batch["target"], scale).item() for batch in batches]
        assert np.mean(values) == pytest.approx(published, abs=0.006)
