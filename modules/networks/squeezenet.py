"""SqueezeNet 1.0 as a feature extractor.

F. N. Iandola, S. Han, M. W. Moskewicz, K. Ashraf, W. J. Dally, K. Keutzer. SqueezeNet: AlexNet-level accuracy with 50x fewer
parameters and < 0.5 MB model size. 2016. arXiv:1602.07360.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import squeezenet1_0

from datamodules.errors import UserError

# Outputs at each resolution, by index in torchvision's `features`: conv1, fire4 and fire8 (before pooling), and fire9.
FEATURE_LAYERS = (1, 5, 10, 12)
FIRE_INDICES = {2: 3, 3: 4, 4: 5, 5: 7, 6: 8, 7: 9, 8: 10, 9: 12}
CAFFE_NAMES = {"squeeze": "conv1x1_1", "expand1x1": "conv1x1_2", "expand3x3": "conv3x3_2"}


class SqueezeNetFeatures(nn.Module):
    """The convolutional layers of SqueezeNet 1.0, with the weights of the Caffe model.

    Args:
        weights: .npz file with `<layer>.weight` and `<layer>.bias` of each layer, `conv1` ... `fire9/conv3x3_2`.

    Raises:
        UserError: the file cannot be read, or does not contain the weights.
    """

    mean: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.layers = squeezenet1_0().features
        names = {"0": "conv1"}
        for fire, index in FIRE_INDICES.items():
            names |= {f"{index}.{ours}": f"fire{fire}/{caffe}" for ours, caffe in CAFFE_NAMES.items()}
        try:
            arrays = np.load(weights, allow_pickle=False)
            state = {
                f"{n}.{kind}": torch.from_numpy(arrays[f"{names[n]}.{kind}"]) for n in names for kind in ("weight", "bias")
            }
            self.layers.load_state_dict(state)
        except (
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{weights} does not contain the weights of SqueezeNet 1.0: {reason}. Replace the file") from None
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1))  # BGR
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute the features of images (N, 3, H, W), RGB in [0, 1], at `FEATURE_LAYERS`: (N, C, h, w) each."""
        maps = image.flip(1) * 255 - self.mean
        outputs = []
        for index, layer in enumerate(self.layers):
            maps = layer(maps)
            if index in FEATURE_LAYERS:
                outputs.append(maps)
        return outputs
