import pytest
import torch

from callbacks.metrics.modes import ModeCoverage
from datamodules.toys import Ring
from datamodules.transforms.draw import image_grid, scatter_plot, split_grid
from experiments.run.recipes import find_recipe
from tests.helpers.method_contract import fit
from tests.helpers.subprocess_helpers import forked


def test_bilinear_game_stays_on_its_ellipse(workdir):
    """Alternating steps, x' = x - r y and y' = y + r x', preserve x**2 + y**2 - r x y: an ellipse around (0, 0)."""
    assert forked(fit, find_recipe("gan/xy").path, "--run", "r") == 0
    state = torch.load(workdir / "runs/gan/xy/r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trajectory = state["trajectory"].double()
    assert len(trajectory) == 401
    invariant = trajectory[:, 0] ** 2 + trajectory[:, 1] ** 2 - 0.1 * trajectory[:, 0] * trajectory[:, 1]
    assert invariant.numpy() == pytest.approx(1.9, rel=1e-4)
    quadrants = (trajectory > 0).long() @ torch.tensor([1, 2])
    assert quadrants.unique().tolist() == [0, 1, 2, 3]  # the trajectory circles the origin
    assert (workdir / "runs/gan/xy/r/samples/000000400.png").exists()


def test_ring_has_requested_modes():
    ring = Ring(modes=5, radius=3, std=0.1)
    centers = ring.reference_sets["ring"].pixels
    assert centers.norm(dim=1).tolist() == pytest.approx([3.0] * 5)
    distance, nearest = torch.cdist(ring.points, centers).min(dim=1)
    assert torch.bincount(nearest).tolist() == [20_000] * 5
    assert distance.square().mean().item() == pytest.approx(2 * 0.1**2, rel=0.02)


def test_mode_coverage_counts_modes():
    centers = Ring().reference_sets["ring"].pixels
    near = centers[[0, 0, 3]] + 0.01
    far = centers[[5]] * 0.8
    metrics = ModeCoverage().compute(torch.cat([near, far]), centers, None)
    assert metrics == {"modes/3-sigma": 2, "modes/populated": 3, "high-quality/3-sigma": 0.75}


@pytest.mark.slow
def test_ring_gan_collapses_to_few_modes(workdir):
    """The generator covers few modes, although the data have eight."""
    overrides = ["--model.total_images", "250000", "--val_every_images", "50000", "--run", "r"]
    assert forked(fit, find_recipe("gan/ring").path, *overrides) == 0
    log = (workdir / "runs/gan/ring/r/metrics.csv").read_text().splitlines()
    populated = [float(line.split(",")[3]) for line in log if "modes/populated" in line]
    assert len(populated) == 6
    assert 1 <= populated[-1] <= 3  # 8 seeds, AVX-512: 1 ... 2


def test_scatter_plot_places_and_colors_points():
    image = scatter_plot(torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, -1.0]]), side=101)[0]
    red = (image[0] - image[1] > 0.5).nonzero().float().mean(0)
    gray = ((image[0] == image[1]) & (image[0] < 1)).nonzero().float().mean(0)
    assert red.tolist() == pytest.approx([50 - 50 / 1.2, 50 + 50 / 1.2], abs=2)  # row, column: top right
    assert gray.tolist() == pytest.approx([50 + 50 / 1.2, 50 - 50 / 1.2], abs=2)


def test_image_grid_is_square_and_in_row_order():
    images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 1, 4, 4) / 9
    grid = image_grid(images)[0]
    assert grid.shape == (3, 3 * 6 + 2, 3 * 6 + 2)
    assert [grid[0, 3 + 6 * i, 3 + 6 * j].item() for i in range(3) for j in range(3)] == pytest.approx(
        [i / 9 for i in range(9)]
    )


@pytest.mark.parametrize("count", [1, 5, 50, 64])
def test_split_grid_returns_the_images_of_a_grid(count):
    images = torch.rand(count, 3, 8, 8)
    assert torch.equal(split_grid(image_grid(images)[0], 8), images)
