"""Squared reconstruction error, compared with PCA."""

from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.protocols import HasEncoder, ReconstructionData
from datamodules.errors import UserError
from datamodules.io.image_set import load_image_set


class ReconstructionSSE(ImageMetric):
    """Squared error, summed over the values in [0, 1] of an image and averaged over a set, at tests only.

    G. E. Hinton, R. R. Salakhutdinov. Science 313, 2006, in the text next to Figure 2.

    - `sse/network`: error of the reconstruction.
    - `sse/pca`: error of the projection on the first D principal components of the training images (scikit-learn), where D is
      the dimension of the code.

    Required outputs: {"image", "prediction": (N, C, H, W), "code": (N, D)}.
    """

    set_protocols = ()
    required_outputs = ("image", "prediction", "code")

    def __init__(self) -> None:
        super().__init__(on_validation=False)
        self.pca: PCA | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Require an autoencoder on full sets of square images.

        Raises:
            UserError: the model has no encoder, or the data have excluded classes or are not square.
        """
        if not isinstance(pl_module, HasEncoder) or not isinstance(trainer.datamodule, ReconstructionData):
            raise UserError(
                f"ReconstructionSSE: {type(pl_module).__name__} on {type(trainer.datamodule).__name__} has no codes. Use "
                "modules.autoencoder.Autoencoder on datamodules.reconstruction.Reconstruction"
            )
        if trainer.datamodule.image_hw or trainer.datamodule.exclude_classes:
            raise UserError(
                "ReconstructionSSE: PCA needs all classes and square images. Remove data.exclude_classes, set one data.size"
            )

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Fit the components once, then evaluate each image of a batch."""
        self._require_outputs(outputs, pl_module, batch_idx)
        if self.pca is None:
            data = trainer.datamodule
            pixels = load_image_set(data.train, data.size, data.channels, data.crop_region, data.data_report).pixels
            self.pca = PCA(outputs["code"].shape[1]).fit(pixels.flatten(1).float().numpy() / 255)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def update(self, outputs: dict[str, Any], i: int) -> tuple[float, float]:
        """Return the two errors of the image."""
        image, prediction = (outputs[name][i].flatten().double().cpu() for name in ("image", "prediction"))
        assert self.pca is not None
        projected = self.pca.inverse_transform(self.pca.transform(image[None].numpy()))
        return (prediction - image).square().sum().item(), float((torch.from_numpy(projected)[0] - image).square().sum())

    def compute(self, states: list[Any], trainer: Any) -> dict[str, float]:
        """Return the metrics in the docstring of the class."""
        network, pca = np.mean(states, axis=0)
        return {"sse/network": float(network), "sse/pca": float(pca)}
