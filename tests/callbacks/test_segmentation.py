"""IoU, Dice, accuracies, SEG and the EM challenge's errors, against other implementations and worked examples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from skimage.measure import euler_number
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from callbacks.metrics.isbi2012 import ISBI2012Errors, best_errors, error_counts, simple_neighbourhoods, warp_topology
from callbacks.metrics.seg_ctc import CTCSeg, seg_scores
from callbacks.metrics.segmentation import SegmentationMetrics, confusion, metrics_from_confusion
from tests.helpers.subprocess_helpers import SERVER

NAMES = ["sky", "traffic light", "car"]


class Stage:
    """A Trainer and a module, as far as a callback of measures sees them."""

    def __init__(self, world_size=1, names=NAMES):
        self.world_size, self.images_seen, self.logged = world_size, 0, {}
        self.state = SimpleNamespace(fn="test")
        self.sanity_checking = False
        self.datamodule = SimpleNamespace(class_names=names)

    def log_dict(self, metrics_from_confusion, sync_dist):
        self.logged.update(metrics_from_confusion)


def pictures(count=5, classes=3, seed=0):
    """Predictions that are mostly right, masks with ignored pixels; no picture has all classes, none has the last."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        mask = torch.randint(0, classes - 1, (1, 9, 7), generator=generator)
        guess = torch.where(
            torch.rand(1, 9, 7, generator=generator) < 0.7, mask, torch.randint(0, classes, (1, 9, 7), generator=generator)
        )
        mask[torch.rand(1, 9, 7, generator=generator) < 0.1] = 255
        prediction = torch.nn.functional.one_hot(guess, classes).movedim(-1, 1).float()
        made.append({"prediction": prediction, "mask": mask, "cells": (mask == 1).int(), "name": [f"p{i}"], "dataset": ["set"]})
    return made


def measured(callback, batches, world_size=1, names=NAMES):
    stage = Stage(world_size, names)
    callback.on_test_epoch_start(stage, stage)
    for batch in batches:
        callback.on_test_batch_end(stage, stage, batch, batch, 0)
    callback.on_test_epoch_end(stage, stage)
    return stage.logged


def joined(batches):
    """Several batches as one."""
    lists = {key: [item for batch in batches for item in batch[key]] for key in batches[0]}
    return {key: torch.stack(items) if torch.is_tensor(items[0]) else items for key, items in lists.items()}


def test_pooled_figures_are_those_of_other_libraries():
    made = pictures()
    mask = torch.cat([picture["mask"].flatten() for picture in made])
    guess = torch.cat([picture["prediction"].argmax(1).flatten() for picture in made])
    counted = mask != 255
    truth, found = mask[counted].numpy(), guess[counted].numpy()
    logged = measured(SegmentationMetrics(), made)
    each = jaccard_score(truth, found, labels=[0, 1, 2], average=None)
    assert logged["set/iou/sky"] == pytest.approx(each[0])
    assert logged["set/iou/traffic-light"] == pytest.approx(each[1])
    assert logged["set/miou/pooled"] == pytest.approx(each.mean())
    theirs = multiclass_jaccard_index(guess, mask, 3, ignore_index=255)
    assert logged["set/miou/pooled"] == pytest.approx(theirs.item(), abs=1e-6)
    assert logged["set/dice/pooled"] == pytest.approx(
        f1_score(truth, found, labels=[0, 1, 2], average="macro", zero_division=0)
    )
    assert logged["set/pixel-accuracy"] == pytest.approx(accuracy_score(truth, found))
    assert logged["set/class-accuracy"] == pytest.approx(balanced_accuracy_score(truth, found))


def test_a_confusion_matrix_has_the_masks_in_its_rows():
    picture = pictures(1)[0]
    mask, guess = picture["mask"][0], picture["prediction"][0].argmax(0)
    counted = mask != 255
    expected = confusion_matrix(mask[counted], guess[counted], labels=[0, 1, 2])
    assert (confusion(guess, mask, 3).numpy() == expected).all()


def test_absent_classes_and_empty_masks_are_as_defined():
    empty, right, wrong = torch.tensor([[[9, 0], [0, 0]], [[5, 0], [0, 4]], [[8, 1], [0, 0]]])
    logged = metrics_from_confusion(torch.stack([empty, right, wrong]), ["ground", "cell"])
    assert logged["iou/per-image-cell"] == pytest.approx((1 + 1 + 0) / 3)  # neither there nor predicted: 1
    assert logged["miou/per-image"] == pytest.approx((1 + 1 + (8 / 9 + 0) / 2) / 3)  # there, of the ground alone
    nowhere = metrics_from_confusion(torch.tensor([[[3, 1, 0], [0, 4, 0], [0, 0, 0]]]), NAMES)
    assert nowhere["iou/car"] != nowhere["iou/car"]  # NaN
    assert nowhere["miou/pooled"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    predicted = metrics_from_confusion(torch.tensor([[[3, 0, 1], [0, 4, 0], [0, 0, 0]]]), NAMES)  # in no mask, but predicted
    assert predicted["iou/car"] == 0
    assert predicted["class-accuracy"] == pytest.approx((3 / 4 + 1) / 2)


@pytest.mark.parametrize("kind", [SegmentationMetrics, CTCSeg])
def test_any_batch_size_gives_the_same_figures(kind):
    made = pictures()
    one_by_one = measured(kind(), made)
    assert one_by_one
    assert one_by_one == measured(kind(), [joined(made)]) == measured(kind(), [joined(made[3:]), joined(made[:3])])


def _process(rank, kind, store, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put(measured(kind(), pictures()[rank * 4 :][:4], 2))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [SegmentationMetrics, CTCSeg])
def test_two_processes_with_uneven_shares_give_the_same_figures(kind, tmp_path):
    queue = SERVER.SimpleQueue()
    processes = [SERVER.Process(target=_process, args=(rank, kind, tmp_path / "store", queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    results = [queue.get(), queue.get()]
    for process in processes:
        process.join()
    assert results[0] == results[1] == measured(kind(), pictures())


# SEG


def seg_by_definition(true, predicted):
    """Object by object, as the challenge words it."""
    found = []
    for number in np.unique(true[true > 0]):
        reference = true == number
        if reference.sum() < 2:
            continue
        score = 0.0
        for other in np.unique(predicted[predicted > 0]):
            segment = predicted == other
            both = (reference & segment).sum()
            if both > 0.5 * reference.sum():
                score = both / (reference | segment).sum()
        found.append(score)
    return np.array(found)


def test_seg_is_its_definition():
    generator = np.random.default_rng(0)
    for _ in range(20):
        true = label(generator.random((20, 20)) < 0.6)[0] * 3  # numbers with gaps
        predicted = label(generator.random((20, 20)) < 0.5)[0]
        predicted = np.where(generator.random((20, 20)) < 0.5, true, predicted)
        assert seg_scores(true, predicted) == pytest.approx(seg_by_definition(true, predicted))


def test_seg_of_a_worked_example():
    true = np.array([[1, 1, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 4]])
    predicted = np.array([[1, 1, 1, 0], [1, 0, 0, 2], [0, 0, 0, 0], [5, 0, 0, 0]])
    assert seg_scores(true, predicted).tolist() == [
        3 / 5,
        0,
        0,
    ]  # half of object 2 is not more than half; object 3 is one pixel
    assert seg_scores(true, np.zeros_like(true)).tolist() == [0, 0, 0]
    assert seg_scores(np.zeros_like(true), predicted).tolist() == []


# The EM challenge


def together(numbers):
    """Which pixels are in one cell with which; where there is membrane, only with themselves."""
    same = numbers[:, None] == numbers
    return np.where((numbers == 0)[:, None], np.eye(len(numbers), dtype=bool), same)


def rand_error_by_pairs(truth, prediction):
    """1 - F over all pairs of pixels of true cells."""
    in_truth, in_both = (together(label(picture)[0][truth]) for picture in (truth, prediction))
    shared = (in_truth & in_both).sum()
    precision, recall = shared / in_both.sum(), shared / in_truth.sum()
    return 1 - 2 * precision * recall / (precision + recall)


def errors(truth, prediction):
    """At one level, of one slice."""
    return best_errors(np.array([error_counts(truth, prediction)]))


def test_pixel_and_rand_error_are_their_definitions():
    generator = np.random.default_rng(0)
    for _ in range(5):
        truth, prediction = generator.random((2, 15, 15)) < 0.7
        found = errors(truth, prediction)
        assert found["pixel-error"] == np.mean(truth ^ prediction)
        assert found["pixel-error/f"] == pytest.approx(1 - f1_score(truth.ravel(), prediction.ravel()))
        assert found["rand-error"] == pytest.approx(rand_error_by_pairs(truth, prediction), abs=1e-9)


def test_a_cell_that_is_predicted_to_be_membrane_is_no_cell():
    truth = np.pad(np.ones((4, 4), dtype=bool), 1)
    assert errors(truth, truth)["rand-error"] == 0
    assert errors(truth, np.zeros_like(truth))["rand-error"] == pytest.approx(1 - 2 * 16 / (16 + 256))  # 16 cells of a pixel


def test_pairs_of_all_slices_count_together():
    """Two slices: the sums are added before F is taken."""
    generator = np.random.default_rng(1)
    slices = [tuple(generator.random((2, 12, 12)) < 0.7) for _ in range(2)]
    found = best_errors(np.sum([[error_counts(*pair)] for pair in slices], axis=0))
    sums = np.zeros(3)
    for truth, prediction in slices:
        in_truth, in_both = (together(label(picture)[0][truth]) for picture in (truth, prediction))
        sums += [(in_truth & in_both).sum(), in_truth.sum(), in_both.sum()]
    assert found["rand-error"] == pytest.approx(1 - 2 * sums[0] / (sums[1] + sums[2]))


def cells(columns, thickness=4, side=30):
    """Upright membranes from these columns on."""
    picture = np.ones((side, side), dtype=bool)
    for column in columns:
        picture[:, column : column + thickness] = False
    return picture


def test_a_shifted_membrane_costs_no_warping_error():
    assert (warp_topology(cells([10]), cells([12])) == cells([12])).all()
    found = errors(cells([10]), cells([12]))
    assert found["pixel-error"] == pytest.approx(4 / 30)
    assert found["warping-error/with-additions"] == 0


def test_splits_and_mergers_count_and_spots_and_lost_cells_only_among_all():
    whole, holed, none = cells([10]), cells([10]), cells([])
    holed[12:15] = True  # two cells merged through a gap: it is closed where it is one pixel thick
    split, spotted, lonely = cells([]), cells([]), ~cells([])
    split[:, 10] = False
    spotted[5:7, 5:7] = False  # a hole in a cell
    lonely[5:8, 5:8] = True  # a cell where none is
    expected = {
        "gap": (whole, holed, 3, 3),
        "bridge": (none, split, 1, 1),
        "hole": (none, spotted, 0, 4),
        "cell": (~none, lonely, 0, 9),
    }
    for name, (truth, prediction, split_or_merged, unlike) in expected.items():
        found = errors(truth, prediction)
        assert round(900 * found["warping-error"]) == split_or_merged, name
        assert round(900 * found["warping-error/with-additions"]) == unlike, name


def test_warping_keeps_the_topology_and_only_approaches():
    generator = np.random.default_rng(0)
    for _ in range(5):
        truth, goal = generator.random((2, 24, 24)) < 0.6
        found = warp_topology(truth, goal)
        assert label(found)[1] == label(truth)[1]
        around = np.pad(~truth, 1, constant_values=True), np.pad(~found, 1, constant_values=True)
        parts = [label(outside, np.ones((3, 3)))[1] for outside in around]
        assert parts[0] == parts[1]
        assert euler_number(found, 1) == euler_number(truth, 1)
        assert ((found == truth) | (found == goal)).all()
        assert (found != goal).sum() < (truth != goal).sum()


def test_there_are_116_simple_neighbourhoods():
    """Of 256: a count known from thinning algorithms (Lam, Lee, Suen, 1992)."""
    assert sum(simple_neighbourhoods()) == 116


def slices():
    made = []
    for level in (0.42, 0.73):  # what is inside lies just above
        inside = torch.where(torch.from_numpy(cells([10, 20])), level, level - 0.1)
        made.append(
            {
                "prediction": torch.stack([1 - inside, inside])[None],
                "mask": torch.from_numpy(cells([10, 20])).long()[None],
                "name": [str(level)],
                "dataset": ["em"],
            }
        )
    return made


def test_the_best_level_counts_and_the_slices_count_together():
    assert set(measured(ISBI2012Errors(), slices()[:1]).values()) == {0}
    both = measured(ISBI2012Errors(), slices())
    assert both["em/pixel-error"] == pytest.approx(0.5 * (8 / 30))  # at 0.4 the second slice has no membrane
    assert both == measured(ISBI2012Errors(), [joined(slices())])
