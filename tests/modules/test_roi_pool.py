import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign

from modules.networks.roi_pool import RoIPooler


@pytest.mark.parametrize("layer", ["align", "align_max", "pool"])
def test_roi_layers_on_a_pyramid(layer):
    """RoIAlign is compared with torchvision's pooler, the others with their definitions at one level."""
    torch.manual_seed(0)
    features = {str(i): torch.rand(2, 3, 64 >> i, 64 >> i) for i in range(4)}
    boxes = [torch.tensor([[3.3, 5.2, 40.1, 44.9], [0.0, 0, 250, 250]]), torch.tensor([[10.0, 60, 130, 199]])]
    pooled = RoIPooler(layer, 7, [4, 8, 16, 32], False)(features, boxes, [(256, 256)] * 2)
    if layer == "align":
        reference = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        assert torch.equal(pooled, reference(features, boxes, [(256, 256)] * 2))
        return
    x1, y1, x2, y2 = (boxes[0][0] / 4).tolist()  # at stride 4
    if layer == "pool":
        left, top, right, bottom = (round(v) for v in (x1, y1, x2, y2))
        width, height = right - left + 1, bottom - top + 1
        for i in range(7):
            rows = slice(top + i * height // 7, top + -(-(i + 1) * height // 7))
            columns = slice(left + 2 * width // 7, left + -(-3 * width // 7))
            assert torch.equal(pooled[0, :, i, 2], features["0"][0][:, rows, columns].amax((1, 2)))
        return
    for i in range(7):
        samples = [
            F.grid_sample(
                features["0"][:1],
                torch.tensor([[[[2 * x / 63 - 1, 2 * y / 63 - 1]]]]),
                align_corners=True,
            )[0, :, 0, 0]
            for y in (y1 + (y2 - y1) / 7 * (i + 0.25), y1 + (y2 - y1) / 7 * (i + 0.75))
            for x in (x1 + (x2 - x1) / 7 * 2.25, x1 + (x2 - x1) / 7 * 2.75)
        ]
        assert torch.allclose(pooled[0, :, i, 2], torch.stack(samples).amax(0), atol=1e-5)


@pytest.mark.parametrize("layer", ["align", "align_max", "pool"])
def test_roi_layers_work_in_float32_under_autocast(layer):
    features = {"0": torch.rand(1, 2, 32, 32).bfloat16()}
    boxes = [torch.tensor([[100.3, 5.2, 400.1, 444.9]])]
    pooler = RoIPooler(layer, 7, [16], False)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pooler(features, boxes, [(512, 512)])
    assert torch.equal(pooled, pooler({"0": features["0"].float()}, boxes, [(512, 512)]))


def test_aligned_features_are_those_at_the_centers_of_cells():
    """A linear function of the position is sampled without an offset: at the centers of the bins."""
    columns = (torch.arange(64.0) + 0.5) * 4  # position of the center of each cell in pixels
    features = {"0": columns.expand(1, 1, 64, 64)}
    box = torch.tensor([[30.0, 30, 100, 100]])
    pooled = RoIPooler("align", 7, [4], True)(features, [box], [(256, 256)])
    assert torch.allclose(pooled[0, 0, 0], torch.arange(35.0, 100, 10), atol=1e-4)
    shifted = RoIPooler("align", 7, [4], False)(features, [box], [(256, 256)])
    assert torch.allclose(shifted[0, 0, 0], torch.arange(37.0, 102, 10), atol=1e-4)
