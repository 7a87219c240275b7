"""Autoencoders: plain, linear, denoising, and inpainting.

G. E. Hinton, R. R. Salakhutdinov. Reducing the Dimensionality of Data with Neural Networks. Science 313, 2006.
P. Vincent, H. Larochelle, Y. Bengio, P.-A. Manzagol. Extracting and Composing Robust Features with Denoising Autoencoders.
ICML 2008.
D. Pathak et al. Context Encoders: Feature Learning by Inpainting. CVPR 2016. arXiv:1604.07379.

Differences from the papers, with reasons:

1. All layers are trained jointly by Adam from Glorot initialization. In the first two papers, layers are trained one by one,
   which is unnecessary with ReLU and Adam. Encoder and decoder share no weights.
2. The loss is the mean squared error for all variants, so that their metrics are comparable; Vincent et al. use cross-entropy.
3. A missing block is black and at a random position, and the loss is over the full image. Pathak et al. add an adversarial
   loss.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from datamodules.batches import ReconstructionEvalBatch, ReconstructionOutputs
from datamodules.errors import UserError
from datamodules.random.noise import NOISE_SAMPLERS
from datamodules.transforms.draw import PREVIEW_IMAGES, stack_rows
from modules.losses.precision import to_float32
from modules.networks.init import xavier_init_
from modules.networks.mlp_conv import Activation, NetworkType, decoder, encoder, to_hw
from modules.training.method import Batch, Method

Corruption = Literal["none", "noise", "masking", "block"]


class Autoencoder(Method):
    """Autoencoder: an encoder to a low-dimensional code, and a decoder.

    Args:
        channels: image channels, 1 or 3.
        size: image side in pixels, or height and width.
        network: "fully-connected" or "convolutional".
        hidden_dims: units of the hidden layers of the encoder; empty for a linear model; see `modules.networks.mlp_conv`.
        latent_size: dimension of the code.
        activation: activation of the hidden layers.
        corruption: corruption of the encoder input: "none"; "noise", Gaussian noise, clipped to [0, 1]; "masking", random
            zeros (Vincent et al., Section 2.3); "block", a rectangle of zeros (Pathak et al., Section 3.3).
        corruption_level: standard deviation of the noise, fraction of masked values, or block side as a fraction of the
            image side; 0 for no corruption.
        total_images: training budget.
        learning_rate: Adam learning rate; falls to zero along a half cosine.
        seed: seed of the corruption in training.

    Raises:
        UserError: `corruption_level` is not valid for `corruption`, or the block is empty; also see
            `modules.networks.mlp_conv.encoder`.
    """

    compiled_losses = ("losses",)

    def __init__(
        self,
        channels: int = 1,
        size: int | Sequence[int] = 28,
        network: NetworkType = "fully-connected",
        hidden_dims: Sequence[PositiveInt] = (512, 128),
        latent_size: PositiveInt = 32,
        activation: Activation = "relu",
        corruption: Corruption = "none",
        corruption_level: float = 0.0,
        total_images: int = 1_200_000,
        learning_rate: PositiveFloat = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, learning_rate, seed=seed)
        self.save_hyperparameters()
        if (
            (corruption == "none") != (corruption_level == 0)
            or corruption_level < 0
            or (corruption != "noise" and corruption_level >= 1)
        ):
            raise UserError(
                f"model.corruption_level: {corruption_level} is not valid for model.corruption {corruption}. "
                "Use 0 for none, above 0 for noise, between 0 and 1 for masking and block"
            )
        if corruption == "block" and round(corruption_level * min(to_hw(size))) < 1:
            raise UserError(
                f"model.corruption_level: a block of {corruption_level} * {min(to_hw(size))} pixels is empty. "
                "Increase the level"
            )
        self.corruption, self.corruption_level = corruption, corruption_level
        shape = (channels, *to_hw(size))
        self.encoder = encoder(network, shape, hidden_dims, latent_size, activation)
        self.decoder = decoder(network, latent_size, hidden_dims, shape, activation)
        self.sigmoid_output = bool(hidden_dims)  # outputs of a linear model are not bounded
        xavier_init_(self)

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct images (N, C, H, W) in [0, 1]; the output of a linear model is not bounded."""
        return self.decode(self.encoder(image))

    def decode(self, code: Tensor) -> Tensor:
        """Decode codes (N, latent_size) to images (N, C, H, W) in (0, 1), or unbounded for a linear model."""
        logits = to_float32(self.decoder(code))
        return logits.sigmoid() if self.sigmoid_output else logits

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean squared error between clean images and reconstructions of corrupted ones, as "mse"."""
        image = batch["image"]
        corrupted = image
        if self.corruption != "none":
            corrupted = self.corrupt(image, self.batch_noise(batch, "corruption", self.noise_dim(image), self.noise_kind))
        return {"mse": F.mse_loss(self(corrupted), image)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the Adam optimizer."""
        return torch.optim.Adam(self.parameters(), fused=True)

    @property
    def noise_kind(self) -> str:
        """Distribution of the corruption noise; see `Method.batch_noise`."""
        return "fast-normal" if self.corruption == "noise" else "uniform"

    def noise_dim(self, image: Tensor) -> int:
        """Return the number of noise values per image (C, H, W) of a batch."""
        return 2 if self.corruption == "block" else image[0].numel()

    def corrupt(self, image: Tensor, noise: Tensor) -> Tensor:
        """Corrupt images (N, C, H, W) in [0, 1] with noise (N, noise_dim)."""
        if self.corruption == "noise":
            return (image + self.corruption_level * noise.view(image.shape)).clamp(0, 1)
        if self.corruption == "masking":
            return image * (noise.view(image.shape) >= self.corruption_level)
        height, width = image.shape[-2:]
        hole_sizes = [round(self.corruption_level * length) for length in (height, width)]
        covered = []  # masks of the rows, then of the columns inside the block
        for length, side, draw in zip((height, width), hole_sizes, noise.T, strict=True):
            first = (draw * (length - side + 1)).long().clamp(max=length - side)[:, None]
            indices = torch.arange(length, device=image.device)
            covered.append((indices >= first) & (indices < first + side))
        rows, columns = covered
        return image * ~(rows[:, :, None] & columns[:, None, :])[:, None]

    def validation_step(self, batch: ReconstructionEvalBatch, batch_idx: int) -> ReconstructionOutputs:
        """Add "code", "prediction" and, if corrupted, "input"; the corruption depends only on the dataset and the index."""
        image = batch["image"].to(self.dtype)
        if self.corruption == "none":
            code = self.encoder(image)
            return {**batch, "code": code, "prediction": self.decode(code)}
        draw = NOISE_SAMPLERS[self.noise_kind]
        draws = draw(0, f"corruption/{batch['dataset'][0]}", batch["index"].tolist(), self.noise_dim(image))
        corrupted = self.corrupt(image, torch.from_numpy(draws).to(image))
        code = self.encoder(corrupted)
        return {**batch, "input": corrupted, "code": code, "prediction": self.decode(code)}

    test_step = validation_step

    preview_limit = 1

    def preview(self, outputs: Batch) -> Tensor:
        """Draw images, corrupted inputs, and reconstructions."""
        return stack_rows(
            *(outputs[name][: PREVIEW_IMAGES // 4] for name in ("image", "input", "prediction") if name in outputs)
        )
