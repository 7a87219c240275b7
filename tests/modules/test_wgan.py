"""Wasserstein GANs on points: constraints of the critic, toy data, and training runs."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from sklearn.datasets import make_swiss_roll

from callbacks.run.csv_logger import read_metrics_csv
from datamodules.toys import Grid, SwissRoll
from datamodules.transforms.draw import contour_plot
from experiments.run.recipes import find_recipe
from modules.wgan import WGAN
from tests.helpers.method_contract import fit
from tests.helpers.subprocess_helpers import forked


def test_clipping_follows_each_update_of_the_critic():
    """The reference is RMSProp with a clamp after each step."""
    torch.manual_seed(0)
    method, reference = (WGAN("clipping", base_channels=4) for _ in range(2))
    reference.load_state_dict(method.state_dict())
    optimizer, plain = method.make_optimizers()["critic"], torch.optim.RMSprop(reference.critic.parameters())
    for seed in range(3):
        points = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
        for critic, step in ((method.critic, optimizer), (reference.critic, plain)):
            step.zero_grad()
            critic(points).square().sum().backward()
            step.step()
        for parameter in reference.critic.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        assert all(torch.equal(a, b) for a, b in zip(method.critic.parameters(), reference.critic.parameters(), strict=True))
    assert max(parameter.abs().max() for parameter in method.critic.parameters()) <= 0.01


def test_grid_and_roll_have_their_shapes():
    grid = Grid(side=3, spacing=2, std=0.1)
    centers = grid.reference_sets["grid"].pixels
    assert sorted(map(tuple, centers.tolist())) == [(x, y) for x in (-2, 0, 2) for y in (-2, 0, 2)]
    distance, nearest = torch.cdist(grid.points, centers).min(dim=1)
    assert np.ptp(torch.bincount(nearest).numpy()) <= 1
    assert distance.square().mean().item() == pytest.approx(2 * 0.1**2, rel=0.02)
    roll = SwissRoll(radius=2, std=0.0)
    radius, angle = roll.points.norm(dim=1), torch.atan2(roll.points[:, 1], roll.points[:, 0])
    turn = radius / 2 * 4.5 * torch.pi  # the radius is proportional to the angle
    assert (turn.min().item(), turn.max().item()) == pytest.approx((1.5 * torch.pi, 4.5 * torch.pi), rel=1e-3)
    assert torch.allclose((turn - angle).cos(), torch.ones(len(turn)), atol=1e-3)


def test_contour_plot_has_bands_of_equal_area_and_points_at_their_places():
    value = torch.linspace(-1, 1, 120).expand(120, 120)  # rises from left to right
    image = contour_plot(value, torch.tensor([[1.0, 1.0]]), torch.empty(0, 2), levels=4)[0]
    columns = [column.item() for column in image[2, 300].unique_consecutive()]
    assert columns == sorted(columns)
    widths = [int((image[2, 300] == column).sum()) for column in columns]
    assert widths == pytest.approx([90] * 4, abs=3)
    orange = ((image[0] > 0.9) & (image[2] < 0.2)).nonzero().float().mean(0)
    assert orange.tolist() == pytest.approx([180 - 180 / 1.2, 180 + 180 / 1.2], abs=2)  # row, column: top right


@pytest.mark.parametrize(
    "name", ["demo_clipping", *(f"{data}_{kind}" for data in ("ring", "grid", "roll") for kind in ("penalty", "clipping"))]
)
def test_critic_separates_real_points_from_fakes(name, workdir):
    """The estimate of the distance becomes positive; clipped weights stay within their limit."""
    overrides = ["--model.total_images", "60000", "--val_every_images", "30000", "--model.base_channels", "64"]
    assert forked(fit, find_recipe(f"wgan/{name}").path, "--run", "r", *overrides) == 0
    folder = workdir / "runs/wgan" / name / "r"
    log = read_metrics_csv(folder / "metrics.csv")
    real, fake = ([float(row["value"]) for row in log if row["name"] == f"train/critic/{kind}"] for kind in ("real", "fake"))
    assert -(real[-1] + fake[-1]) > 0
    critic = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    largest = max(value.abs().max().item() for key, value in critic.items() if key.startswith("critic"))
    assert (largest <= 0.0101) == name.endswith("clipping")
    assert (folder / "samples/000060160.png").exists()


@pytest.mark.slow
def test_generator_covers_the_ring(workdir):
    """The saturating GAN on the same data covers one or two of eight Gaussians."""
    overrides = ["--model.total_images", "400000", "--val_every_images", "100000", "--run", "r"]
    assert forked(fit, find_recipe("wgan/demo").path, *overrides) == 0
    log = read_metrics_csv(workdir / "runs/wgan/demo/r/metrics.csv")
    assert [float(row["value"]) for row in log if row["name"] == "ring/modes/populated"][-1] >= 6


def test_default_points_are_those_of_the_authors():
    """Standard deviations that their code divides by; the roll is scikit-learn's."""
    assert Grid().points.std(0).tolist() == pytest.approx([1, 1], rel=0.01)
    roll = make_swiss_roll(100_000, noise=0.25, random_state=0)[0][:, [0, 2]] / 7.5
    points = SwissRoll().points.numpy()
    assert points.std(0) == pytest.approx(roll.std(0), rel=0.01)
    assert wasserstein_distance(np.linalg.norm(points, axis=1), np.linalg.norm(roll, axis=1)) < 0.01


def test_fixed_generator_adds_noise_to_real_points():
    method = WGAN(generator="fixed", base_channels=8)
    batch = {"point": torch.randn(6, 2), "sample_ids": range(6), "repeat_index": 0}
    noise = method.shared_forward(batch)["fake"] - batch["point"]
    assert torch.allclose(noise, method.batch_latents(batch), atol=1e-6)
    assert list(method.make_optimizers()) == ["critic"]
