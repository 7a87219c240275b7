"""`import darkroom`: the notebook page, and metrics that refuse what they are not defined for."""

import re
import subprocess
import sys

import pytest
import torch

import darkroom
from experiments import ROOT


@pytest.mark.slow
def test_page_runs(workdir):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "NOTEBOOK.md").read_text(), re.DOTALL | re.MULTILINE)
    code += "print(sum(p.numel() for p in trained.parameters()), run.record.exists(), trained.training)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=workdir).stdout
    assert "espcn/t91_x3" in output
    assert output.splitlines()[-1] == "22729 True False"


def test_load_gives_the_network_of_predict():
    network = darkroom.load("espcn/t91_x3")
    assert not network.training
    with torch.no_grad():
        assert network(torch.rand(1, 1, 8, 9)).shape == (1, 1, 24, 27)
    assert (
        darkroom.load("espcn/t91_x4", "--ckpt", str(ROOT / "experiments/methods/espcn/weights/t91_x4.safetensors")).scale == 4
    )
    with pytest.raises(darkroom.UserError, match="did you mean 'espcn/t91_x3'"):
        darkroom.load("espcn/t91x3")


def test_recipes_of_a_method():
    assert "dcgan/mnist" in darkroom.recipes("dcgan")
    assert set(darkroom.recipes("dcgan")) < set(darkroom.recipes())
    with pytest.raises(darkroom.UserError, match="no method"):
        darkroom.recipes("dcgann")


def test_metrics_agree_with_torchmetrics():
    from torchmetrics.functional.segmentation import mean_iou

    x, y = torch.rand(2, 1, 32, 33, dtype=torch.float64), torch.rand(2, 1, 32, 33, dtype=torch.float64)
    levels = [(image * 255).round() for image in (x, y)]
    expected = [10 * torch.log10(255**2 / (a - b).square().mean()) for a, b in zip(*levels, strict=True)]
    torch.testing.assert_close(darkroom.psnr_y(x, y, 0), torch.stack(expected))
    assert (darkroom.ssim_y(x, x, 2) == 1).all()
    ids, mask = torch.randint(0, 3, (2, 9, 9)), torch.randint(0, 3, (2, 9, 9))
    values = darkroom.segmentation_metrics(ids, mask, ["a", "b", "c"])
    pooled = mean_iou(ids.view(1, 18, 9), mask.view(1, 18, 9), num_classes=3, input_format="index")
    assert values["miou/pooled"] == pytest.approx(pooled.item(), rel=1e-5)
    noise = torch.randint(0, 256, (4, 3, 176, 176), dtype=torch.uint8)
    torch.testing.assert_close(darkroom.ms_ssim(noise, noise), torch.ones(4, dtype=torch.float64))


IMAGE = torch.rand(1, 3, 20, 20)
IDS = torch.zeros(1, 4, 4, dtype=torch.long)
BYTES = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: darkroom.psnr_y((IMAGE * 255).byte(), IMAGE, 3), "prediction: torch.uint8"),
        (lambda: darkroom.psnr_y(IMAGE, IMAGE * 255, 3), r"target: values are not in \[0, 1\]"),
        (lambda: darkroom.psnr_y(IMAGE, IMAGE[0], 3), r"target: .* \(3, 20, 20\)"),
        (lambda: darkroom.psnr_y(IMAGE, IMAGE[:, :1], 3), "target: shape"),
        (lambda: darkroom.psnr_y(IMAGE * float("nan"), IMAGE, 3), "prediction: values"),
        (lambda: darkroom.psnr_y(IMAGE * 1.4, IMAGE, 3), "prediction: values .* clamp the output"),
        (lambda: darkroom.psnr_y(IMAGE.numpy(), IMAGE, 3), "prediction: ndarray is not a tensor"),
        (lambda: darkroom.ms_ssim([1], IMAGE), "first: list is not a tensor"),
        (lambda: darkroom.psnr_y(IMAGE, IMAGE, 1.5), r"crop_border: 1\.5 leaves nothing"),
        (lambda: darkroom.segmentation_metrics(IDS[:0], IDS[:0], ["a", "b"]), "mask: no images"),
        (lambda: darkroom.segmentation_metrics(IDS, IDS, ["a", "a"]), "class_names: a, a are not different"),
        (lambda: darkroom.fit("espcn/demo", "--run", "x", run="y"), "run: y, but words contain --run"),
        (lambda: darkroom.ssim_y(IMAGE, IMAGE, 10), "crop_border: 10"),
        (lambda: darkroom.ssim_y(IMAGE, IMAGE, 5), "SSIM needs at least 11x11"),
        (lambda: darkroom.ms_ssim(BYTES, BYTES.float()), "second: torch.float32"),
        (lambda: darkroom.ms_ssim(BYTES, BYTES[..., :9]), "second: shape"),
        (lambda: darkroom.segmentation_metrics(IDS.float(), IDS, ["a", "b"]), "prediction: torch.float32"),
        (lambda: darkroom.segmentation_metrics(IDS + 2, IDS, ["a", "b"]), "prediction: ids 2 to 2"),
        (lambda: darkroom.segmentation_metrics(IDS, IDS - 1, ["a", "b"]), "mask: ids -1"),
        (lambda: darkroom.fid(BYTES[:1], BYTES), "samples: 1 images"),
        (lambda: darkroom.fid(BYTES, BYTES.float()), "real: torch.float32"),
    ],
)
def test_metrics_refuse_other_shapes_types_and_ranges(call, message):
    with pytest.raises(darkroom.UserError, match=message):
        call()
