"""Autoencoders: plain, linear, denoising, and one that fills in what is missing.

G. E. Hinton, R. R. Salakhutdinov. Reducing the Dimensionality of Data with Neural Networks. Science 313, 2006.
P. Vincent, H. Larochelle, Y. Bengio, P.-A. Manzagol. Extracting and Composing Robust Features with Denoising Autoencoders.
ICML 2008.
D. Pathak et al. Context Encoders: Feature Learning by Inpainting. CVPR 2016. arXiv:1604.07379.

What we do differently, and why:

1. All layers are trained together, from Glorot's weights and by Adam; the first two papers trained them one by one, which ReLU
   and Adam have made unnecessary. Encoder and decoder share no weights.
2. The loss is the mean squared error for all of them (Vincent's is the cross-entropy), so that their figures can be compared.
3. A missing block is black and anywhere in the picture, and the loss is that of the whole picture; Pathak's has an adversarial
   loss beside it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from datamodules.errors import UserError
from modules.losses.precision import to_float32
from modules.networks.init import xavier_init_
from modules.networks.mlp_conv import Activation, NetworkType, decoder, encoder, to_hw
from modules.training.method import NOISE_SAMPLERS, Batch, Method

Corruption = Literal["none", "noise", "masking", "block"]


class Autoencoder(Method):
    """An encoder into a narrow code, and a decoder back.

    Args:
        channels: of a picture, 1 or 3.
        size: a picture's side in pixels, or its height and width.
        network: fully connected or convolutional.
        hidden_dims: units of the layers between a picture and its code; none, and it is linear; see `modules.networks.mlp_conv`.
        latent_size: numbers of a code.
        activation: of the hidden layers.
        corruption: of what the encoder sees: "none"; "noise", Gaussian, cut to [0, 1]; "masking" (Vincent et al., Section
            2.3), values put to zero; "block" (Pathak et al., Section 3.3), a rectangle put to zero.
        corruption_level: of it: the noise's deviation, the share of the values, the rectangle's sides as a share of the picture's.
        total_images: training budget.
        learning_rate: of Adam, falling to zero along half a cosine.
        seed: of the corruption in training.
    """

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
            raise UserError(f"model.corruption_level: {corruption_level} of model.corruption: {corruption} makes no sense")
        if corruption == "block" and round(corruption_level * min(to_hw(size))) < 1:
            raise UserError(f"model.corruption_level: {corruption_level} of {min(to_hw(size))} pixels is no block")
        self.corruption, self.corruption_level = corruption, corruption_level
        shape = (channels, *to_hw(size))
        self.encoder = encoder(network, shape, hidden_dims, latent_size, activation)
        self.decoder = decoder(network, latent_size, hidden_dims, shape, activation)
        self.sigmoid_output = bool(hidden_dims)  # a linear one makes what it makes
        xavier_init_(self)

    def forward(self, image: Tensor) -> Tensor:
        """What comes back: (N, C, H, W) in [0, 1] to the same; a linear one's values have no bounds."""
        return self.decode(self.encoder(image))

    def decode(self, code: Tensor) -> Tensor:
        """Pictures from codes (N, latent_size)."""
        logits = to_float32(self.decoder(code))
        return logits.sigmoid() if self.sigmoid_output else logits

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error per pixel between what comes back of the corrupted pictures and the sound ones."""
        image = batch["image"]
        corrupted = image
        if self.corruption != "none":
            corrupted = self.corrupt(image, self.batch_noise(batch, "corruption", self.noise_dim(image), self.noise_kind))
        return {"mse": F.mse_loss(self(corrupted), image)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), fused=True)

    @property
    def noise_kind(self) -> str:
        """Of the draws."""
        return "fast-normal" if self.corruption == "noise" else "uniform"

    def noise_dim(self, image: Tensor) -> int:
        """How many a picture's corruption takes."""
        return 2 if self.corruption == "block" else image[0].numel()

    def corrupt(self, image: Tensor, noise: Tensor) -> Tensor:
        """Pictures (N, C, H, W) as the encoder sees them, by draws (N, draws)."""
        if self.corruption == "noise":
            return (image + self.corruption_level * noise.view(image.shape)).clamp(0, 1)
        if self.corruption == "masking":
            return image * (noise.view(image.shape) >= self.corruption_level)
        height, width = image.shape[-2:]
        hole_sizes = [round(self.corruption_level * length) for length in (height, width)]
        inside = []  # of the rows, then of the columns that the square covers
        for length, side, draw in zip((height, width), hole_sizes, noise.T, strict=True):
            first = (draw * (length - side + 1)).long().clamp(max=length - side)[:, None]
            places = torch.arange(length, device=image.device)
            inside.append((places >= first) & (places < first + side))
        rows, columns = inside
        return image * ~(rows[:, :, None] & columns[:, None, :])[:, None]

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Codes, and what comes back of pictures, corrupted as their numbers say and always in the same way."""
        image = batch["image"].to(self.dtype)
        if self.corruption == "none":
            code = self.encoder(image)
            return {**batch, "code": code, "prediction": self.decode(code)}
        draw = NOISE_SAMPLERS[self.noise_kind]
        drawn = draw(0, f"corruption/{batch['dataset'][0]}", batch["index"].tolist(), self.noise_dim(image))
        corrupted = self.corrupt(image, torch.from_numpy(drawn).to(image))
        code = self.encoder(corrupted)
        return {**batch, "input": corrupted, "code": code, "prediction": self.decode(code)}

    test_step = validation_step
