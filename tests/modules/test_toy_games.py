import pytest
import torch

from callbacks.metrics.modes import ModeCoverage
from callbacks.visualization.previews import scatter_plot, sheet
from datamodules.toys import Ring
from experiments.run.recipes import find_recipe
from tests.helpers.method_contract import fit
from tests.helpers.subprocess_helpers import forked


def test_the_game_never_ends(workplace):
    """Steps in turn, x' = x - r y and y' = y + r x', keep x**2 + y**2 - r x y as it is: an ellipse around (0, 0)."""
    assert forked(fit, find_recipe("gan/xy").path, "--run", "r") == 0
    path = torch.load(workplace / "runs/gan/xy/r/checkpoints/last.ckpt", weights_only=True)["state_dict"]["trajectory"].double()
    assert len(path) == 401
    kept = path[:, 0] ** 2 + path[:, 1] ** 2 - 0.1 * path[:, 0] * path[:, 1]
    assert kept.numpy() == pytest.approx(1.9, rel=1e-4)
    quarters = (path > 0).long() @ torch.tensor([1, 2])
    assert quarters.unique().tolist() == [0, 1, 2, 3]  # all the way round
    assert (workplace / "runs/gan/xy/r/samples/000000400.png").exists()


def test_a_ring_is_what_it_says():
    ring = Ring(modes=5, radius=3, std=0.1)
    centres = ring.reference_sets["ring"].pixels
    assert centres.norm(dim=1).tolist() == pytest.approx([3.0] * 5)
    distance, nearest = torch.cdist(ring.points, centres).min(dim=1)
    assert torch.bincount(nearest).tolist() == [20_000] * 5
    assert distance.square().mean().item() == pytest.approx(2 * 0.1**2, rel=0.02)


def test_modes_are_counted():
    centres = Ring().reference_sets["ring"].pixels
    near = centres[[0, 0, 3]] + 0.01
    far = centres[[5]] * 0.8
    figures = ModeCoverage().compute(torch.cat([near, far]), centres, None)
    assert figures == {"modes/3-sigma": 2, "modes/populated": 3, "high-quality/3-sigma": 0.75}


def test_the_ring_loses_modes(workplace):
    """The lecture's point: the generator sits on a mode or two, although it has seen all eight."""
    words = ["--model.total_images", "250000", "--val_every_images", "50000", "--run", "r"]
    assert forked(fit, find_recipe("gan/ring").path, *words) == 0
    log = (workplace / "runs/gan/ring/r/metrics.csv").read_text().splitlines()
    crowds = [float(line.split(",")[3]) for line in log if "modes/populated" in line]
    assert len(crowds) == 6
    assert 1 <= crowds[-1] <= 3


def test_points_are_drawn_where_they_are():
    picture = scatter_plot(torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, -1.0]]), side=101)[0]
    red = (picture[0] - picture[1] > 0.5).nonzero().float().mean(0)
    grey = ((picture[0] == picture[1]) & (picture[0] < 1)).nonzero().float().mean(0)
    assert red.tolist() == pytest.approx([50 - 50 / 1.2, 50 + 50 / 1.2], abs=2)  # row, column: above, right
    assert grey.tolist() == pytest.approx([50 + 50 / 1.2, 50 - 50 / 1.2], abs=2)


def test_a_sheet_is_square_and_in_order():
    images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 1, 4, 4) / 9
    picture = sheet(images)[0]
    assert picture.shape == (3, 3 * 6 + 2, 3 * 6 + 2)
    assert [picture[0, 3 + 6 * i, 3 + 6 * j].item() for i in range(3) for j in range(3)] == pytest.approx(
        [i / 9 for i in range(9)]
    )
