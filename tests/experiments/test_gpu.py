"""Settings of CUDA that can be tested without a GPU."""

import pytest
import torch

from datamodules.errors import UserError
from experiments.cli.main import main
from experiments.run import gpu
from experiments.run.gpu import check_gpu
from modules.losses.precision import full_precision
from tests.helpers.subprocess_helpers import forked
from tests.tasks.superresolution import write_recipe


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def fit_and_compare_flags(argv, expected):
    assert main(argv) == 0
    assert flags() == expected
    with full_precision():
        assert flags() == (False, False)
    assert flags() == expected


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_tf32_only_on_request(workdir, photos, capfd, tf32):
    """The option is part of the run's configuration; another value on resuming is named."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = str(write_recipe(workdir / "tiny.yaml", photos, model))
    argv = ["fit", recipe, "--run", "one", "--data.test", "[]"]
    assert forked(fit_and_compare_flags, [*argv, *(["--tf32", "true"] if tf32 else [])], (tf32, tf32)) == 0
    assert forked(main, [*argv, "--model.total_images", "80", "--tf32", "true"]) == 0
    said = "tf32 True instead of False: not bit-identical to an uninterrupted run" in capfd.readouterr().out
    assert said == (not tf32)


def test_gpu_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(gpu, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpu()  # no driver
    (tmp_path / "gpus").mkdir()
    check_gpu()  # no GPU
    (tmp_path / "gpus/0000:01:00.0").mkdir()
    with pytest.raises(UserError, match=r"cannot use the GPU of this machine: The NVIDIA driver .* too old .*accelerator cpu$"):
        check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpu()  # hidden
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    check_gpu()  # a version of torch for CPUs
