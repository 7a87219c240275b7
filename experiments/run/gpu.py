"""Settings of CUDA, and a check that torch can use the GPU of the machine."""

import os
import warnings
from pathlib import Path

import torch

from datamodules.errors import UserError

# Torch 2.9 announces new names of these settings, which its older versions do not have.
warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU, if NVIDIA's driver is loaded


def configure_tf32(enabled: bool) -> None:
    """Let float32 convolutions and matrix products on GPUs use TF32, with ten bits of precision, or not; see `--tf32`."""
    torch.backends.cudnn.allow_tf32 = enabled
    torch.backends.cuda.matmul.allow_tf32 = enabled


def check_gpu() -> None:
    """Check that the CPU is not used because torch cannot use the GPU of the machine.

    Raises:
        UserError: there is a GPU, torch is a version for CUDA, and CUDA does not start, for example with an old driver.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or torch.version.cuda is None or is_hidden or not NVIDIA_GPUS.is_dir():
        return
    if not any(NVIDIA_GPUS.iterdir()):
        return
    try:
        torch.cuda.init()
        reason = "no device is available"
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
    raise UserError(
        f"torch {torch.__version__} cannot use the GPU of this machine: {reason.rstrip('.')}. "
        "Install a driver or a torch that fit each other, or hide the GPU: CUDA_VISIBLE_DEVICES=-1"
    )
