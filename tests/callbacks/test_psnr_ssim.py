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
    """Three equally large cuttings of photographs, enlarged bicubically, beside their originals."""
    pictures = SREvalImages(list_image_refs("photographs/test"), 3)
    batches = [pictures[i] for i in range(3)]
    prediction = torch.cat([Bicubic(3)(batch["input"])[..., 30:189, 30:201] for batch in batches])
    return prediction, torch.cat([batch["target"][..., 30:189, 30:201] for batch in batches])


def levels(image, crop_border):
    return np.floor(image.numpy() * 255.0 + 0.5).clip(0, 255)[0, crop_border:-crop_border, crop_border:-crop_border]


@pytest.mark.parametrize("crop_border", [2, 3, 4])
def test_psnr_is_skimages(pair, crop_border):
    for i, value in enumerate(psnr_y(*pair, crop_border)):
        ours, theirs = (levels(side[i], crop_border) for side in pair)
        assert value.item() == pytest.approx(peak_signal_noise_ratio(theirs, ours, data_range=255), abs=1e-4)


@pytest.mark.parametrize("crop_border", [2, 3, 4])
def test_ssim_is_skimages_over_inner_windows(pair, crop_border):
    for i, value in enumerate(ssim_y(*pair, crop_border)):
        ours, theirs = (levels(side[i], crop_border).astype(np.float64) for side in pair)
        _, full = structural_similarity(
            theirs, ours, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        assert value.item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-4)


def test_a_perfect_picture(pair):
    assert psnr_y(pair[1], pair[1], 3).tolist() == [float("inf")] * 3
    assert ssim_y(pair[1], pair[1], 3) == pytest.approx(torch.ones(3))


def test_too_small_for_a_window_is_said():
    with pytest.raises(UserError, match="11x11 pixels"):
        ssim_y(torch.zeros(1, 1, 16, 40), torch.zeros(1, 1, 16, 40), 3)


class Stage:
    """As much of a Trainer and a module as the callback asks for, in a process group that is real."""

    world_size = 1
    device = torch.device("cpu")
    state = type("State", (), {"fn": "test"})

    def __init__(self, world_size=1):
        self.world_size, self.logged = world_size, {}

    def log_dict(self, figures, sync_dist):
        self.logged = figures


def measured(pair, batches, rank=0, world=1):
    """What the callback logs if the pictures `batches` (lists of numbers) reach this process."""
    stage, callback = Stage(world), PSNRSSIM(3)
    callback.on_test_epoch_start(stage, stage)
    for numbers in batches:
        outputs = {
            "prediction": pair[0][numbers],
            "target": pair[1][numbers],
            "name": [f"picture{n}" for n in numbers],
            "dataset": ["set"] * len(numbers),
        }
        callback.on_test_batch_end(stage, stage, outputs, None, 0)
    callback.on_test_epoch_end(stage, stage)
    return stage.logged


def test_any_batch_size_gives_the_same_figures(pair):
    one_by_one = measured(pair, [[0], [1], [2]])
    assert one_by_one.keys() == {"set/psnr-y/crop3", "set/ssim-y/crop3"}
    assert one_by_one == pytest.approx(measured(pair, [[0, 1, 2]]), abs=1e-12)
    assert one_by_one["set/psnr-y/crop3"] == pytest.approx(psnr_y(*pair, 3).mean().item(), abs=1e-12)


def _process(rank, pair, store, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put(measured(pair, [[0], [2]] if rank == 0 else [[1]], rank, 2))
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_shares_give_the_same_figures(pair, tmp_path):
    queue = SERVER.SimpleQueue()
    processes = [SERVER.Process(target=_process, args=(r, pair, tmp_path / "store", queue)) for r in (0, 1)]
    for process in processes:
        process.start()
    results = [queue.get(), queue.get()]
    for process in processes:
        process.join()
    assert results[0] == results[1] == measured(pair, [[0], [1], [2]])


def test_earlier_figures_are_forgotten(pair):
    stage, callback = Stage(), PSNRSSIM(3)
    callback.state = {"set": {"sanity": {"psnr-y/crop3": 0.0, "ssim-y/crop3": 0.0}}}
    callback.on_validation_epoch_start(stage, stage)
    assert callback.state == {}


@pytest.mark.parametrize(
    ("scale", "set5", "set14", "set14_grey"),
    [(2, 33.66, 30.23, 30.14), (3, 30.39, 27.54, 27.45), (4, 28.42, 26.00, 25.91)],
)
def test_published_bicubic_rows(with_real_data, scale, set5, set14, set14_grey):
    """The SRCNN, VDSR and ESPCN papers' rows; the last column counts `man` as grey."""
    for name, published in {"set5": set5, "set14": set14, "set14-grey": set14_grey}.items():
        pictures = SREvalImages(list_image_refs(name), scale)
        batches = [pictures[i] for i in range(len(pictures))]
        values = [psnr_y(Bicubic(scale)(batch["input"]), batch["target"], scale).item() for batch in batches]
        assert np.mean(values) == pytest.approx(published, abs=0.006)
