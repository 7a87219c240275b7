"""The contract of all methods, for tiny methods with features that no bundled method uses.

The features are stages that change the network and the batch size, two phases with one optimizer, a loss of a frozen network,
pairs of images, and lists of images of different sizes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks.metrics.base import ImageMetric
from datamodules.base import ResumableDataModule
from datamodules.catalog.catalog import resolve_images
from datamodules.io.image_io import read_image
from datamodules.transforms.draw import image_row
from experiments.cli.main import main
from modules.espcn import ESPCN
from modules.losses.adversarial import bce_fake, bce_real
from modules.networks.crop import center_crop
from modules.tasks.generation import GenerativeMethod
from modules.tasks.superresolution import SuperResolutionMethod
from modules.training.method import Method
from modules.training.phases import Batch, Phase
from modules.training.stages import Stage
from tests.helpers.method_contract import Contract, checkpoint, fit
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import write_yaml
from tests.tasks.generation import GenerativeContract, write_generative_recipe
from tests.tasks.superresolution import SuperResolutionContract, write_recipe


class GrowingGAN(GenerativeMethod):
    """A GAN with two stages: 14 x 14 pixels in batches of 8, then 28 x 28 pixels.

    The second stage uses the batch size of the datamodule, and resets the optimizers.
    """

    def __init__(self, total_images: int = 60, learning_rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__(8, "normal", total_images, learning_rate, seed=seed)
        self.save_hyperparameters()
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.Softplus())
        self.to_pixels = nn.ModuleList(nn.Linear(64, side**2) for side in (14, 28))
        self.from_pixels = nn.ModuleList(nn.Linear(side**2, 64) for side in (14, 28))
        self.discriminator = nn.Sequential(nn.Softplus(), nn.Linear(64, 1))

    def stages(self) -> list[Stage]:
        return [Stage(batch_size=8), Stage(self.total_images // 4, reset_optimizers=True)]

    @property
    def level(self) -> int:
        return int(self.images_seen >= self.total_images // 4)

    def generate(self, latents: Tensor) -> Tensor:
        side = (14, 28)[self.level]
        return self.to_pixels[self.level](self.generator(latents)).sigmoid().view(-1, 1, side, side)

    def discriminate(self, image: Tensor) -> Tensor:
        return self.discriminator(self.from_pixels[self.level](image.flatten(1)))

    def sample(self, latents: Tensor) -> Tensor:
        return F.interpolate(self.generate(latents), (28, 28))

    def forward(self, latents: Tensor) -> Tensor:
        return self.sample(latents)

    def phases(self) -> list[Phase]:
        def constant(images_seen: int) -> dict[str, float]:
            return {"lr": self.learning_rate}

        return [Phase("D", self.discriminator_losses, constant), Phase("G", self.generator_losses, constant)]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        networks = {"D": (self.from_pixels, self.discriminator), "G": (self.generator, self.to_pixels)}
        return {
            name: torch.optim.Adam([p for part in parts for p in part.parameters()], betas=(0.5, 0.99), eps=1e-3)
            for name, parts in networks.items()
        }

    def shared_forward(self, batch: Batch) -> Batch:
        real = batch["image"] if self.level else F.avg_pool2d(batch["image"], 2)
        return {"real": real, "fake": self.generate(self.batch_latents(batch))}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        real, fake = self.discriminate(batch["real"]), self.discriminate(batch["fake"].detach())
        return {"real": bce_real(real), "fake": bce_fake(fake)}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"adversarial": bce_real(self.discriminate(batch["fake"]))}


class LazyGAN(GrowingGAN):
    """A GAN that regularizes the discriminator twice in every third step, with the discriminator's optimizer (StyleGAN2)."""

    level = 1

    def stages(self) -> list[Stage]:
        return [Stage()]

    def phases(self) -> list[Phase]:
        first, second = super().phases()
        lazy = Phase("R1", self.regularization, first.schedule, optimizer="D", every_n_steps=3, n_updates=2)
        return [first, lazy, second]

    def regularization(self, batch: Batch) -> dict[str, Tensor]:
        return {"scores": 0.1 * self.discriminate(batch["real"]).square().mean()}


class TestGrowingGAN(GenerativeContract):
    learns_slowly = True
    model = {"class_path": "tests.modules.test_step_features.GrowingGAN", "init_args": {}}
    deterministic_model = "tests.modules.test_step_features.GrowingGAN"
    max_fid = 2.4
    training_overrides = ["--model.total_images", "12800", "--val_every_images", "3200", "--data.batch_size", "16"]

    def test_validations_follow_multiples_of_the_interval(self, workdir, recipe):
        """The first stage has the images 0 ... 15 in batches of 8; then the batches have 4 images."""
        assert forked(fit, recipe, "--run", "full", "--val_every_images", "12") == 0
        samples = workdir / "runs" / recipe.stem / "full" / "samples"
        assert sorted(int(file.stem) for file in samples.glob("*.png") if file.stem.isdigit()) == [16, 24, 36, 48, 60]


class TestLazyGAN(GenerativeContract):
    learns_slowly = True
    model = {"class_path": "tests.modules.test_step_features.LazyGAN", "init_args": {}}
    deterministic_model = "tests.modules.test_step_features.LazyGAN"
    max_fid = 2.4
    training_overrides = ["--model.total_images", "12800", "--val_every_images", "3200", "--data.batch_size", "16"]


class FeatureLoss(ESPCN):
    """Squared error of a frozen network's features, as in a perceptual loss."""

    def __init__(
        self,
        scale: Literal[2, 3, 4] = 3,
        weights: str = "features.pth",
        total_images: int = 60,
        learning_rate: float = 3e-3,
        warmup: int = 8,
    ) -> None:
        super().__init__(scale, "tanh", total_images, learning_rate, warmup)
        self.save_hyperparameters()
        network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.add_reference("features", network, lambda: Path(weights))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        prediction = self.forward_valid(batch["input"])
        features = self.references["features"].network
        target = center_crop(batch["target"], prediction.shape[-2:])
        return {"pixels": F.mse_loss(prediction, target), "features": F.mse_loss(features(prediction), features(target))}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-3)


def write_features(path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    torch.save(network.state_dict(), path)


class TestFeatureLoss(SuperResolutionContract):
    learns_slowly = True
    model = {"class_path": "tests.modules.test_step_features.FeatureLoss", "init_args": {}}
    deterministic_model = "tests.modules.test_step_features.FeatureLoss"
    training_overrides = ["--model.total_images", "6400", "--val_every_images", "160", "--data.batch_size", "16"]
    min_psnr_gain_db = 2

    @pytest.fixture
    def recipe(self, workdir: Path, photos: Path, three_photos: Path) -> Path:
        write_features(workdir / "features.pth")
        return write_recipe(workdir / "tiny.yaml", photos, self.model, test=[str(three_photos)])


class PairGAN(SuperResolutionMethod):
    """A GAN with a discriminator of pairs: the input, and the target or the prediction (pix2pix)."""

    def __init__(self, scale: int = 3, total_images: int = 60, learning_rate: float = 1e-3, warmup: int = 8) -> None:
        super().__init__(scale, total_images, learning_rate, warmup)
        self.save_hyperparameters()
        self.generator = nn.Sequential(nn.Conv2d(1, 16, 5), nn.Softplus(), nn.Conv2d(16, scale**2, 3), nn.PixelShuffle(scale))
        self.discriminator = nn.Sequential(nn.Conv2d(2, 8, 3, stride=2), nn.Softplus(), nn.Conv2d(8, 1, 3))
        self.min_patch_size = 13

    def forward_valid(self, lr_image: Tensor) -> Tensor:
        return self.generator(lr_image)

    def forward(self, lr_image: Tensor) -> Tensor:
        return self.generator(F.pad(lr_image, (3,) * 4, mode="replicate"))

    def phases(self) -> list[Phase]:
        return [Phase("D", self.discriminator_losses), Phase("G", self.generator_losses)]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        networks = {"D": self.discriminator, "G": self.generator}
        return {name: torch.optim.Adam(network.parameters(), eps=1e-3) for name, network in networks.items()}

    def shared_forward(self, batch: Batch) -> Batch:
        fake = self.generator(batch["input"])
        size = fake.shape[-2:]
        condition = center_crop(F.interpolate(batch["input"], scale_factor=self.scale), size)
        return {"condition": condition, "real": center_crop(batch["target"], size), "fake": fake}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        real, fake = (
            self.discriminator(torch.cat([batch["condition"], image], 1)) for image in (batch["real"], batch["fake"].detach())
        )
        return {"real": bce_real(real), "fake": bce_fake(fake)}

    def generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        score = self.discriminator(torch.cat([batch["condition"], batch["fake"]], 1))
        return {"adversarial": 0.01 * bce_real(score), "mse": 10 * F.mse_loss(batch["fake"], batch["real"])}


class TestPairGAN(SuperResolutionContract):
    learns_slowly = True
    model = {"class_path": "tests.modules.test_step_features.PairGAN", "init_args": {}}
    deterministic_model = "tests.modules.test_step_features.PairGAN"
    training_overrides = ["--model.total_images", "6400", "--val_every_images", "1600", "--data.batch_size", "16"]
    min_psnr_gain_db = 2


class RaggedCrops(ResumableDataModule):
    """Lists of crops of a photograph, of different sizes, with their mean gray values."""

    def __init__(self, batch_size: int = 4, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.test = ["crops"]

    def setup(self, stage: str) -> None:
        self.crops = Crops()

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train_loader(self.crops, 64)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(NamedCrops(self.crops), 5)

    test_dataloader = val_dataloader

    def prepare_train_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": [image.float() / 255 for image in batch["image"]], "mean": batch["mean"]}

    def prepare_eval_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, **self.prepare_train_batch(batch)}


class Crops(Dataset[dict[str, Any]]):
    """64 crops with heights of 8 to 23 pixels, for batches of `InfiniteBatchSampler`."""

    def __init__(self) -> None:
        self.photograph = read_image(resolve_images("photographs/test")[0])[:1]

    def crop(self, item: int) -> Tensor:
        side = 8 + item % 16
        return self.photograph[:, 7 * item : 7 * item + side, 5 * item : 5 * item + side + item % 3]

    def __getitem__(self, slice_: tuple[int, np.ndarray]) -> dict[str, Any]:
        images = [self.crop(int(item)) for item in slice_[1]]
        return {"image": images, "mean": torch.stack([image.float().mean() / 255 for image in images])}


class NamedCrops(Dataset[dict[str, Any]]):
    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.crops[0, np.array([index])], "name": [f"{index}"], "dataset": ["crops"]}

    def __len__(self) -> int:
        return 5


class MeanRegression(Method):
    """Estimates the mean of each image of a list."""

    def __init__(self, total_images: int = 60, learning_rate: float = 1e-2, seed: int = 0) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)[:, 0]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        prediction = torch.cat([self(image[None]) for image in batch["image"]])
        return {"mse": F.mse_loss(prediction, batch["mean"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), eps=1e-3)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {**batch, "prediction": [self(image[None].to(self.dtype)) for image in batch["image"]]}

    test_step = validation_step
    predict_step = validation_step

    preview_limit = 3

    def preview(self, outputs: dict[str, Any]) -> Tensor:
        return image_row(outputs["image"][0][None])


class MeanError(ImageMetric):
    """Absolute error of the mean."""

    required_outputs = ("prediction", "mean")

    def update(self, outputs: dict[str, Any], i: int) -> float:
        return (outputs["prediction"][i] - outputs["mean"][i]).abs().item()

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        return {"error": sum(states) / len(states)}


class TestMeanRegression(Contract):
    model = {"class_path": "tests.modules.test_step_features.MeanRegression", "init_args": {}}
    deterministic_model = "tests.modules.test_step_features.MeanRegression"
    training_overrides = ["--model.total_images", "3200", "--val_every_images", "800"]

    @pytest.fixture
    def recipe(self, workdir: Path) -> Path:
        data = {"class_path": "tests.modules.test_step_features.RaggedCrops", "init_args": {"batch_size": 4}}
        metric = {"class_path": "tests.modules.test_step_features.MeanError"}
        return write_yaml(workdir / "tiny.yaml", self.model, data, [metric])

    def has_learned(self, log: list[dict[str, str]]) -> bool:
        errors = [float(row["value"]) for row in log if row["name"] == "crops/error"]
        return errors[-1] < 0.1  # error of predicting the mean of all crops: 0.31

    def example(self) -> Tensor:
        return torch.rand(1, 1, 12, 14)


def test_metric_without_its_required_outputs_is_rejected_before_training(workdir, capfd):
    data = {"class_path": "tests.modules.test_step_features.RaggedCrops", "init_args": {"batch_size": 4}}
    metric = {"class_path": "callbacks.metrics.cycle_l1.CycleL1"}
    recipe = write_yaml(workdir / "tiny.yaml", TestMeanRegression.model, data, [metric])
    assert forked(main, ["fit", str(recipe)]) == 2
    error = capfd.readouterr().err
    assert "CycleL1: needs the outputs" in error
    assert "MeanRegression has no reconstruction, identity, direction" in error


def test_reference_networks_are_frozen_recorded_and_not_in_checkpoints(workdir, photos, capfd):
    recipe = write_recipe(workdir / "tiny.yaml", photos, TestFeatureLoss.model)
    assert forked(main, ["fit", str(recipe), "--run", "r"]) == 2
    assert "features.pth cannot be read as weights" in capfd.readouterr().err
    write_features(workdir / "features.pth")
    assert forked(main, ["fit", str(recipe), "--run", "r"]) == 0
    assert set(checkpoint(workdir, recipe, "r")["state_dict"]) == set(ESPCN().state_dict())
    record = json.loads((workdir / "runs/tiny/r/record.json").read_text())
    expected = hashlib.sha256((workdir / "features.pth").read_bytes()).hexdigest()
    assert record["reference_weights"] == {"features": expected}
    method = FeatureLoss().double()
    assert not any(parameter.requires_grad for parameter in method.references["features"].network.parameters())
    assert next(method.references["features"].network.parameters()).dtype == torch.float64


def test_optimizers_are_reset_at_the_start_of_a_stage(workdir, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    recipe = write_generative_recipe(workdir / "tiny.yaml", TestGrowingGAN.model)
    assert forked(fit, recipe, "--run", "r") == 0
    saved = checkpoint(workdir, recipe, "r")
    assert (saved["global_step"], saved["images_seen"]) == (13, 60)  # 2 steps of 8, 11 of 4
    steps = {int(state["step"]) for optimizer in saved["optimizer_states"] for state in optimizer["state"].values()}
    assert steps == {11}


def test_lazy_phase_updates_its_specified_optimizer(workdir, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    recipe = write_generative_recipe(workdir / "tiny.yaml", TestLazyGAN.model)
    assert forked(fit, recipe, "--run", "r") == 0
    states = checkpoint(workdir, recipe, "r")["optimizer_states"]
    steps = [{int(state["step"]) for state in optimizer["state"].values()} for optimizer in states]
    assert steps == [{15 + 2 * 5}, {15}]
