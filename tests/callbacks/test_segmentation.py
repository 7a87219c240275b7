"""Compare IoU, Dice, accuracy, SEG and the ISBI 2012 errors with other implementations and worked examples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, label
from skimage.measure import euler_number
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from callbacks.metrics.isbi2012 import ISBI2012Errors, best_errors, error_counts, simple_neighborhoods, warp_topology
from callbacks.metrics.seg_ctc import CTCSeg, seg_scores, touching_objects
from callbacks.metrics.segmentation import SegmentationMetrics, confusion, metrics_from_confusion
from tests.helpers.subprocess_helpers import SERVER

NAMES = ["sky", "traffic light", "car"]


class FakeTrainer:
    """The part of Trainer and LightningModule that the metrics use."""

    def __init__(self, world_size=1, names=NAMES):
        self.world_size, self.images_seen, self.logged = world_size, 0, {}
        self.state = SimpleNamespace(fn="test")
        self.sanity_checking = False
        self.datamodule = SimpleNamespace(class_names=names)

    def log_dict(self, metrics, sync_dist):
        self.logged.update(metrics)


def random_batches(count=5, classes=3, seed=0):
    """Return mostly correct predictions, and masks with ignored pixels and without the last class."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(count):
        mask = torch.randint(0, classes - 1, (1, 9, 7), generator=generator)
        predicted_mask = torch.where(
            torch.rand(1, 9, 7, generator=generator) < 0.7, mask, torch.randint(0, classes, (1, 9, 7), generator=generator)
        )
        mask[torch.rand(1, 9, 7, generator=generator) < 0.1] = 255
        prediction = torch.nn.functional.one_hot(predicted_mask, classes).movedim(-1, 1).float()
        batches.append(
            {"prediction": prediction, "mask": mask, "instance_ids": (mask == 1).int(), "name": [f"p{i}"], "dataset": ["set"]}
        )
    return batches


def evaluate(callback, batches, world_size=1, names=NAMES):
    trainer = FakeTrainer(world_size, names)
    callback.on_test_epoch_start(trainer, trainer)
    for batch in batches:
        callback.on_test_batch_end(trainer, trainer, batch, batch, 0)
    callback.on_test_epoch_end(trainer, trainer)
    return trainer.logged


def concatenated(batches):
    """Concatenate batches."""
    lists = {key: [item for batch in batches for item in batch[key]] for key in batches[0]}
    return {key: torch.stack(items) if torch.is_tensor(items[0]) else items for key, items in lists.items()}


def test_pooled_metrics_match_other_libraries():
    batches = random_batches()
    mask = torch.cat([image["mask"].flatten() for image in batches])
    predicted_mask = torch.cat([image["prediction"].argmax(1).flatten() for image in batches])
    valid = mask != 255
    truth, predicted = mask[valid].numpy(), predicted_mask[valid].numpy()
    logged = evaluate(SegmentationMetrics(), batches)
    class_iou = jaccard_score(truth, predicted, labels=[0, 1, 2], average=None)
    assert logged["set/iou/sky"] == pytest.approx(class_iou[0])
    assert logged["set/iou/traffic-light"] == pytest.approx(class_iou[1])
    assert logged["set/miou/pooled"] == pytest.approx(class_iou.mean())
    reference = multiclass_jaccard_index(predicted_mask, mask, 3, ignore_index=255)
    assert logged["set/miou/pooled"] == pytest.approx(reference.item(), abs=1e-6)
    assert logged["set/dice/pooled"] == pytest.approx(
        f1_score(truth, predicted, labels=[0, 1, 2], average="macro", zero_division=0)
    )
    assert logged["set/pixel-accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert logged["set/class-accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))


def test_confusion_matrix_has_true_classes_in_rows():
    image = random_batches(1)[0]
    mask, predicted_mask = image["mask"][0], image["prediction"][0].argmax(0)
    valid = mask != 255
    expected = confusion_matrix(mask[valid], predicted_mask[valid], labels=[0, 1, 2])
    assert (confusion(predicted_mask, mask, 3).numpy() == expected).all()


def test_absent_class_has_pooled_iou_nan_and_per_image_iou_1():
    empty, correct, wrong = torch.tensor([[[9, 0], [0, 0]], [[5, 0], [0, 4]], [[8, 1], [0, 0]]])
    logged = metrics_from_confusion(torch.stack([empty, correct, wrong]), ["background", "cell"])
    assert logged["iou/per-image-cell"] == pytest.approx((1 + 1 + 0) / 3)  # neither in the mask nor predicted: 1
    assert logged["miou/per-image"] == pytest.approx((1 + 1 + (8 / 9 + 0) / 2) / 3)  # empty masks: background only
    absent = metrics_from_confusion(torch.tensor([[[3, 1, 0], [0, 4, 0], [0, 0, 0]]]), NAMES)
    assert absent["iou/car"] != absent["iou/car"]  # NaN
    assert absent["miou/pooled"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    predicted = metrics_from_confusion(torch.tensor([[[3, 0, 1], [0, 4, 0], [0, 0, 0]]]), NAMES)  # in no mask, but predicted
    assert predicted["iou/car"] == 0
    assert predicted["class-accuracy"] == pytest.approx((3 / 4 + 1) / 2)


@pytest.mark.parametrize("metric", [SegmentationMetrics, CTCSeg])
def test_metrics_do_not_depend_on_the_batch_size(metric):
    batches = random_batches()
    one_by_one = evaluate(metric(), batches)
    assert one_by_one
    assert (
        one_by_one
        == evaluate(metric(), [concatenated(batches)])
        == evaluate(metric(), [concatenated(batches[3:]), concatenated(batches[:3])])
    )


def _evaluate_rank(rank, metric, store, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put(evaluate(metric(), random_batches()[rank * 4 :][:4], 2))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("metric", [SegmentationMetrics, CTCSeg])
def test_two_ranks_with_unequal_numbers_of_images_give_the_same_metrics(metric, tmp_path):
    queue = SERVER.Queue()
    processes = [SERVER.Process(target=_evaluate_rank, args=(rank, metric, tmp_path / "store", queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120), queue.get(timeout=120)]
    for process in processes:
        process.join()
    assert results[0] == results[1] == evaluate(metric(), random_batches())


# SEG


def seg_by_definition(true, predicted):
    """Compute SEG for each object, as the challenge defines it."""
    scores = []
    for true_label in np.unique(true[true > 0]):
        reference = true == true_label
        if reference.sum() < 2:
            continue
        score = 0.0
        for predicted_label in np.unique(predicted[predicted > 0]):
            segment = predicted == predicted_label
            intersection = (reference & segment).sum()
            if intersection > 0.5 * reference.sum():
                score = intersection / (reference | segment).sum()
        scores.append(score)
    return np.array(scores)


def test_seg_matches_its_definition():
    generator = np.random.default_rng(0)
    for _ in range(20):
        true = label(generator.random((20, 20)) < 0.6)[0] * 3  # labels with gaps
        predicted = label(generator.random((20, 20)) < 0.5)[0]
        predicted = np.where(generator.random((20, 20)) < 0.5, true, predicted)
        assert seg_scores(true, predicted) == pytest.approx(seg_by_definition(true, predicted))


def test_seg_matches_a_worked_example():
    true = np.array([[1, 1, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 4]])
    predicted = np.array([[1, 1, 1, 0], [1, 0, 0, 2], [0, 0, 0, 0], [5, 0, 0, 0]])
    assert seg_scores(true, predicted).tolist() == [
        3 / 5,
        0,
        0,
    ]  # object 2: an overlap of exactly half is not a match; object 3 has only one pixel
    assert seg_scores(true, np.zeros_like(true)).tolist() == [0, 0, 0]
    assert seg_scores(np.zeros_like(true), predicted).tolist() == []


def test_touching_objects_have_neighboring_pixels():
    generator = np.random.default_rng(0)
    for _ in range(20):
        true = generator.integers(0, 40, (12, 12)) * (generator.random((12, 12)) < 0.4)
        expected = []
        for true_label in np.unique(true[true > 0]):
            pixels = true == true_label
            around = np.unique(true[binary_dilation(pixels, np.ones((3, 3)))])
            if pixels.sum() > 1:
                expected.append(bool(set(around) - {0, true_label}))
        assert touching_objects(true).tolist() == expected
    assert touching_objects(np.zeros((4, 4), dtype=np.int32)).tolist() == []


# ISBI 2012


def same_cell(labels):
    """Return a matrix that is True for pairs of pixels in the same cell. A membrane pixel pairs only with itself."""
    equal = labels[:, None] == labels
    return np.where((labels == 0)[:, None], np.eye(len(labels), dtype=bool), equal)


def rand_error_by_pairs(truth, prediction):
    """Compute 1 - F over all pairs of pixels of true cells."""
    in_truth, in_both = (same_cell(label(image)[0][truth]) for image in (truth, prediction))
    shared = (in_truth & in_both).sum()
    precision, recall = shared / in_both.sum(), shared / in_truth.sum()
    return 1 - 2 * precision * recall / (precision + recall)


def errors(truth, prediction):
    """Return the errors of one slice at one threshold."""
    return best_errors(np.array([error_counts(truth, prediction)]))


def test_pixel_and_rand_error_match_their_definitions():
    generator = np.random.default_rng(0)
    for _ in range(5):
        truth, prediction = generator.random((2, 15, 15)) < 0.7
        result = errors(truth, prediction)
        assert result["pixel-error"] == np.mean(truth ^ prediction)
        assert result["pixel-error/f"] == pytest.approx(1 - f1_score(truth.ravel(), prediction.ravel()))
        assert result["rand-error"] == pytest.approx(rand_error_by_pairs(truth, prediction), abs=1e-9)


def test_pixels_of_a_missed_cell_count_as_single_cells():
    truth = np.pad(np.ones((4, 4), dtype=bool), 1)
    assert errors(truth, truth)["rand-error"] == 0
    assert errors(truth, np.zeros_like(truth))["rand-error"] == pytest.approx(1 - 2 * 16 / (16 + 256))  # 16 cells of one pixel


def test_rand_error_pools_the_pairs_of_all_slices():
    """F is computed from the sums over slices."""
    generator = np.random.default_rng(1)
    slices = [tuple(generator.random((2, 12, 12)) < 0.7) for _ in range(2)]
    result = best_errors(np.sum([[error_counts(*pair)] for pair in slices], axis=0))
    sums = np.zeros(3)
    for truth, prediction in slices:
        in_truth, in_both = (same_cell(label(image)[0][truth]) for image in (truth, prediction))
        sums += [(in_truth & in_both).sum(), in_truth.sum(), in_both.sum()]
    assert result["rand-error"] == pytest.approx(1 - 2 * sums[0] / (sums[1] + sums[2]))


def cells(columns, thickness=4, side=30):
    """Return an image with vertical membranes that start at the given columns."""
    image = np.ones((side, side), dtype=bool)
    for column in columns:
        image[:, column : column + thickness] = False
    return image


def test_shifted_membrane_has_no_warping_error():
    assert (warp_topology(cells([10]), cells([12])) == cells([12])).all()
    result = errors(cells([10]), cells([12]))
    assert result["pixel-error"] == pytest.approx(4 / 30)
    assert result["warping-error/with-additions"] == 0


def test_warping_error_counts_splits_and_mergers_and_optionally_additions():
    full, gap, none = cells([10]), cells([10]), cells([])
    gap[12:15] = True  # two cells merged through a gap in the membrane
    split, spotted, added = cells([]), cells([]), ~cells([])
    split[:, 10] = False
    spotted[5:7, 5:7] = False  # a hole in a cell
    added[5:8, 5:8] = True  # an additional cell
    expected = {
        "gap": (full, gap, 3, 3),
        "bridge": (none, split, 1, 1),
        "hole": (none, spotted, 0, 4),
        "cell": (~none, added, 0, 9),
    }
    for name, (truth, prediction, split_or_merged, mismatch) in expected.items():
        result = errors(truth, prediction)
        assert round(900 * result["warping-error"]) == split_or_merged, name
        assert round(900 * result["warping-error/with-additions"]) == mismatch, name


def test_warping_keeps_the_topology_and_reduces_the_difference():
    generator = np.random.default_rng(0)
    for _ in range(5):
        truth, target = generator.random((2, 24, 24)) < 0.6
        warped = warp_topology(truth, target)
        assert label(warped)[1] == label(truth)[1]
        outsides = np.pad(~truth, 1, constant_values=True), np.pad(~warped, 1, constant_values=True)
        counts = [label(outside, np.ones((3, 3)))[1] for outside in outsides]
        assert counts[0] == counts[1]
        assert euler_number(warped, 1) == euler_number(truth, 1)
        assert ((warped == truth) | (warped == target)).all()
        assert (warped != target).sum() < (truth != target).sum()


def test_116_neighborhoods_are_simple():
    """Of the 256 neighborhoods, 116 are simple (see thinning algorithms: Lam, Lee, Suen, 1992)."""
    assert sum(simple_neighborhoods()) == 116


def slice_batches():
    batches = []
    for level in (0.42, 0.73):  # probability inside cells, just above a threshold
        inside = torch.where(torch.from_numpy(cells([10, 20])), level, level - 0.1)
        batches.append(
            {
                "prediction": torch.stack([1 - inside, inside])[None],
                "mask": torch.from_numpy(cells([10, 20])).long()[None],
                "name": [str(level)],
                "dataset": ["em"],
            }
        )
    return batches


def test_errors_use_the_best_threshold_over_all_slices():
    assert set(evaluate(ISBI2012Errors(), slice_batches()[:1]).values()) == {0}
    both = evaluate(ISBI2012Errors(), slice_batches())
    assert both["em/pixel-error"] == pytest.approx(0.5 * (8 / 30))  # at 0.4 the second slice has no membrane
    assert both == evaluate(ISBI2012Errors(), [concatenated(slice_batches())])
