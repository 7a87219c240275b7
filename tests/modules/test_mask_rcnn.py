import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from datamodules.errors import UserError
from datamodules.transforms.objects import enclosing_boxes
from experiments.cli.main import main
from modules.mask_rcnn import MaskRCNN, keypoint_loss
from modules.networks import rcnn
from modules.networks.weights import load_weights
from modules.tasks.detection import batch_images, to_image_size
from tests.helpers.deterministic_variants import DeterministicMaskRCNN
from tests.helpers.subprocess_helpers import forked
from tests.tasks.detection import SMALL_NETWORK, DetectionContract


class TestMaskRCNN(DetectionContract):
    learns_slowly = True
    model = {"class_path": "modules.mask_rcnn.MaskRCNN", "init_args": {**SMALL_NETWORK, "learning_rate": 0.01}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicMaskRCNN"
    training_overrides = [
        "--model.optimizer",
        "adamw",
        "--model.total_images",
        "800",
        "--val_every_images",
        "200",
        "--model.learning_rate",
        "0.003",
    ]
    min_score = 25  # 8 seeds, AVX2: 42 ... 70

    @pytest.mark.slow
    def test_bench_reports_metrics(self, workdir, recipe, capfd):
        assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "1", "--json"]) == 0
        metrics = json.loads(capfd.readouterr().out)
        assert metrics["ms_per_image"] > 0
        assert metrics["images_per_second_pil"] > 0


def two_objects(height, width, num_keypoints=0):
    """Return two objects, with random masks and keypoints."""
    generator = torch.Generator().manual_seed(0)
    objects = {
        "boxes": torch.tensor([[10.0, 10, 60, 80], [30, 20, 100, 90]], dtype=torch.float64),
        "labels": torch.tensor([1, 1]),
        "masks": (torch.rand(2, height, width, generator=generator) > 0.5).byte(),
    }
    if num_keypoints:
        points = 10 + 60 * torch.rand(2, num_keypoints, 2, generator=generator)
        visibility = torch.randint(0, 3, (2, num_keypoints, 1), generator=generator)
        objects["keypoints"] = torch.cat([points, visibility], dim=-1)
    return objects


def torchvision_model(num_keypoints):
    """Return a detector of torchvision with random weights, as it is built for its weights for COCO, in float64."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    backbone = _resnet_fpn_extractor(body, 5)
    settings = {"min_size": 128, "max_size": 200, "box_score_thresh": 0.0, "box_detections_per_img": 4}
    settings |= {f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")}
    settings["box_batch_size_per_image"] = 16
    if num_keypoints:
        model = KeypointRCNN(backbone, 2, num_keypoints=num_keypoints, **settings)
    else:
        model = TorchvisionMaskRCNN(backbone, 91, **settings)
    overwrite_eps(model, 0.0)
    model.transform._skip_resize = True  # in training
    return model.double()


def old_names(weights):
    """Return weights with the names in torchvision's files, which are older than its code."""
    renamed = {}
    for name, value in weights.items():
        if "fpn." in name and "_blocks." in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if name.startswith("roi_heads.mask_head."):
            _, _, index, _, kind = name.split(".")
            name = f"roi_heads.mask_head.mask_fcn{int(index) + 1}.{kind}"
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("num_keypoints", [0, pytest.param(17, marks=pytest.mark.slow)])
def test_weights_of_torchvision_give_its_detections_and_losses(num_keypoints, workdir, monkeypatch):
    reference = torchvision_model(num_keypoints)
    torch.save(old_names(reference.state_dict()), workdir / "weights.pth")
    method = MaskRCNN(
        num_classes=2 if num_keypoints else 91,
        masks=not num_keypoints,
        num_keypoints=num_keypoints,
        backbone="resnet18",
        released=True,
        score_threshold=0.0,
        min_size=128,
        max_size=200,
        max_detections=4,
        train_proposals=50,
        test_proposals=50,
        rois_per_image=16,
    ).double()
    load_weights(method, workdir / "weights.pth")
    images = [torch.rand(3, 120, 170).double(), torch.rand(3, 90, 61).double()]
    with torch.no_grad():
        expected, found = reference.eval()(images), method.eval().predict(images)
    for theirs, ours in zip(expected, found, strict=True):
        assert len(ours["boxes"]) == 4
        assert torch.equal(theirs["labels"], ours["labels"])
        for name in ("boxes", "scores"):
            assert torch.allclose(theirs[name], ours[name], rtol=1e-6)  # torchvision scales boxes in float32
        if num_keypoints:
            assert torch.allclose(theirs["keypoints"].double(), ours["keypoints"], rtol=1e-5)
            assert torch.allclose(theirs["keypoints_scores"].double(), ours["keypoint_scores"].double(), rtol=1e-5)
        else:
            assert torch.equal(theirs["masks"][:, 0] > 0.5, ours["masks"])
    monkeypatch.setattr(rcnn, "BOX_BETA", 1 / 9)  # as in torchvision
    objects = two_objects(120, 170, num_keypoints)
    torch.manual_seed(0)
    expected_losses = reference.train()(images[:1], [objects])
    torch.manual_seed(0)
    losses = method.train().losses({"image": images[:1], "objects": [objects]})
    names = {"class": "loss_classifier", "box": "loss_box_reg", "objectness": "loss_objectness", "proposal": "loss_rpn_box_reg"}
    names["keypoint" if num_keypoints else "mask"] = "loss_keypoint" if num_keypoints else "loss_mask"
    assert losses.keys() == names.keys()
    for name, theirs in names.items():
        assert losses[name].item() == pytest.approx(expected_losses[theirs].item(), rel=1e-6)


def test_parameters_match_the_published_number():
    """44,401,393 in the description of torchvision's weights."""
    with torch.device("meta"):
        network = MaskRCNN(num_classes=91, released=True)
    assert sum(parameter.numel() for parameter in network.parameters()) == 44_401_393


def test_aligned_masks_of_small_objects_are_exact():
    """The target of an ellipse, taken as a prediction, gives back the ellipse; without alignment, a small one is distorted."""
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for aligned, lowest, highest in ((True, 0.97, 1.0), (False, 0.5, 0.9)):
        method, overlaps = small(aligned=aligned), []
        for i in range(20):
            center, axes = 20 + 0.37 * i, (6.2, 4.1)
            ellipse = ((columns - center) / axes[0]) ** 2 + ((rows - 30.4) / axes[1]) ** 2 <= 1
            box = enclosing_boxes(ellipse[None])
            target = method.mask_targets(ellipse[None].float(), box, torch.tensor([0]), 28)
            found = to_image_size({"boxes": box, "masks": target[None]}, (64, 64), (64, 64), aligned)["masks"][0]
            overlaps.append(((found & ellipse).sum() / (found | ellipse).sum()).item())
        assert lowest < sum(overlaps) / 20 <= highest


def test_anchors_have_the_strides_of_the_levels():
    """At 800 x 1344, torchvision computes a stride of 61 for the last level, which has 13 x 21 cells."""
    images = batch_images([torch.zeros(3, 800, 1344)])
    features = [torch.zeros(1, 1, -(-800 // stride), -(-1344 // stride)) for stride in (4, 8, 16, 32, 64)]
    (exact,) = small().rpn.anchor_generator(images, features)
    last = exact[-1].view(2, 2).mean(0)  # center
    assert last.tolist() == [64 * 20, 64 * 12]
    (inferred,) = small(released=True).rpn.anchor_generator(images, features)
    assert inferred[-1].view(2, 2).mean(0).tolist() == [64 * 20, 61 * 12]


def small(**init_args):
    torch.manual_seed(0)
    return MaskRCNN(**{**SMALL_NETWORK, **init_args})


def test_small_images_have_the_levels_of_their_strides():
    """torchvision infers the strides from the size of the first image, which is wrong if it is much smaller than its padding."""
    method = small().eval()
    assert method.roi_heads.box_roi_pool.level_strides == [4, 8, 16, 32]
    assert [found["masks"].shape[1:] for found in method.predict([torch.rand(3, 33, 35)])] == [(33, 35)]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_mask_loss_is_that_of_the_true_class(activation):
    """Section 3: with sigmoid, the other classes do not contribute; with softmax, all classes compete for each pixel."""
    method = small(num_classes=4, mask_activation=activation)
    logits = torch.randn(3, 4, 28, 28, requires_grad=True)
    masks = torch.zeros(2, 56, 56, dtype=torch.uint8)
    masks[0, :28], masks[1, :, 28:] = 1, 1
    targets = [{"masks": masks, "labels": torch.tensor([2, 3])}]
    boxes, matches = [torch.tensor([[0.0, 0, 56, 56]] * 3)], [torch.tensor([0, 1, 1])]
    loss = method.mask_loss(logits, boxes, matches, targets)
    loss.backward()
    labels = [2, 3, 3]
    padded = F.pad(masks[[0, 1, 1]].float(), (0, 2, 0, 2), mode="replicate")
    for _ in range(2):  # along each axis, a value at half the resolution is the mean of two points between three pixels
        padded = ((padded[:, :-2:2] + 2 * padded[:, 1:-1:2] + padded[:, 2::2]) / 4).mT
    inside = padded if activation == "sigmoid" else (padded >= 0.5).float()
    terms = []
    for i, label in enumerate(labels):
        if activation == "sigmoid":
            p = logits[i, label].sigmoid()
            terms.append(-(inside[i] * p.log() + (1 - inside[i]) * (1 - p).log()).mean())
        else:
            p = logits[i].softmax(0)
            terms.append(-(inside[i] * p[label].log() + (1 - inside[i]) * p[0].log()).mean())
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    others = [[c for c in range(4) if c != label] for label in labels]
    gradients = torch.stack([logits.grad[i, c].abs().max() for i in range(3) for c in others[i]])
    assert (gradients == 0).all() if activation == "sigmoid" else (gradients > 0).all()
    probabilities = method.mask_probabilities(logits.detach(), torch.tensor(labels))
    expected = logits.detach().sigmoid() if activation == "sigmoid" else logits.detach().softmax(1)
    assert torch.equal(probabilities, torch.stack([expected[i, label] for i, label in enumerate(labels)]))


def test_keypoint_loss_is_the_entropy_of_visible_positions():
    """Section 5: one-hot targets over the positions of the RoI; keypoints that are absent or outside have no target."""
    logits = torch.randn(1, 3, 56, 56)
    points = torch.tensor([[[8.0, 4, 2], [3, 3, 0], [200, 3, 2]]])  # visible, absent, outside
    box = torch.tensor([[0.0, 0, 112, 112]])
    loss = keypoint_loss(logits, [box], [torch.tensor([0])], [{"keypoints": points}])
    expected = -logits[0, 0].flatten().log_softmax(0)[2 * 56 + 4]  # row 4 / 2, column 8 / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    none = keypoint_loss(logits.requires_grad_(), [box], [torch.tensor([0])], [{"keypoints": points * 0}])
    none.backward()
    assert none == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("num_keypoints", [0, 3])
def test_losses_of_a_batch_are_the_mean_of_its_images(num_keypoints):
    """Images have different numbers of objects, and one has none: its targets are infinite, its mask loss is zero."""
    method = DeterministicMaskRCNN(**{**SMALL_NETWORK, "num_keypoints": num_keypoints, "keypoint_channels": 4}).double()
    objects = two_objects(96, 96, num_keypoints)
    counts = (2, 1, 0)
    images = [torch.rand(3, 96, 96).double() for _ in counts]
    targets = [{name: values[:count] for name, values in objects.items()} for count in counts]
    together = method.losses({"image": images, "objects": targets})
    alone = [method.losses({"image": [image], "objects": [target]}) for image, target in zip(images, targets, strict=True)]
    assert alone[2]["mask"] == 0
    assert alone[0]["mask"] > 0
    for name, value in together.items():
        assert value.item() == pytest.approx(torch.stack([losses[name] for losses in alone]).mean().item(), rel=1e-6)
    sum(together.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())


def test_boxes_are_float32_under_autocast():
    """In bf16, a coordinate near 1000 would be a multiple of 4 or 8."""
    method = small()
    boxes = []
    method.rpn.register_forward_hook(lambda module, inputs, outputs: boxes.extend(outputs[0]))
    method.rpn.eval()
    images = batch_images([torch.rand(3, 64, 1000)])
    with torch.no_grad():
        method.rpn(images, method.backbone(images.tensors))
        with torch.autocast("cpu", torch.bfloat16):
            features = method.backbone(images.tensors)
            assert features["0"].dtype == torch.bfloat16
            method.rpn(images, features)
            anchors = method.rpn.anchor_generator(images, list(features.values()))
    assert boxes[1].dtype == torch.float32
    assert torch.equal(anchors[0], method.rpn.anchor_generator(images, [v.float() for v in features.values()])[0])


VARIANTS = {
    "faster": {"masks": False},
    "c4": {"neck": "c4", "anchor_sizes": [16, 32], "train_proposals": 20, "test_proposals": 20},
    "c4 resnet": {"neck": "c4", "backbone": "resnet18", "anchor_sizes": [16, 32]},
    "c5": {"neck": "c5", "anchor_sizes": [16, 32], "roi_layer": "pool"},
    "mlp": {"mask_head": "mlp", "mask_layers": 2},
    "class agnostic": {"class_agnostic_masks": True},
    "softmax": {"mask_activation": "softmax"},
    "align_max": {"roi_layer": "align_max"},
    "keypoints": {"num_keypoints": 3, "keypoint_layers": 2, "keypoint_channels": 4},
    "resnext": {"backbone": "resnext50_32x4d"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_predict(name):
    method = small(num_classes=4, score_threshold=0.0, max_detections=5, **VARIANTS[name])
    num_keypoints = VARIANTS[name].get("num_keypoints", 0)
    objects = {key: value.float() if value.is_floating_point() else value for key, value in
               two_objects(96, 128, num_keypoints).items()}  # fmt: skip
    losses = method.losses({"image": [torch.rand(3, 96, 128)], "objects": [objects]})
    sum(losses.values()).backward()
    assert ("mask" in losses) == (name != "faster")
    assert ("keypoint" in losses) == bool(num_keypoints)
    assert all(parameter.grad is not None for parameter in method.parameters())
    with torch.no_grad():
        (found,) = method.eval().predict([torch.rand(3, 60, 90)])
    assert len(found["boxes"]) == 5
    assert ("masks" in found) == (name != "faster")
    if "masks" in found:
        assert found["masks"].shape == (5, 60, 90)
    if num_keypoints:
        assert found["keypoints"].shape == (5, 3, 3)
    if name.startswith("c4"):  # Figure 4, left: the fifth stage on features of 7 x 7, without its stride
        strides = [layer.stride for layer in method.roi_heads.box_head.modules() if isinstance(layer, nn.Conv2d)]
        assert set(strides) == {(1, 1)}
        assert method.rpn.head.cls_logits.out_channels == 6


def test_no_detections_give_empty_outputs():
    method = small(score_threshold=1.0, num_keypoints=3, keypoint_channels=4).eval()
    with torch.no_grad():
        (found,) = method.predict([torch.rand(3, 40, 50)])
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 40, 50)
    assert found["keypoints"].shape == (0, 3, 3)


def test_pretrained_weights_freeze_the_first_stages(workdir, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(workdir))
    torch.manual_seed(1)
    classifier = torchvision.models.resnet18()
    (workdir / "hub/checkpoints").mkdir(parents=True)
    torch.save(classifier.state_dict(), workdir / "hub/checkpoints/resnet18-f37072fd.pth")
    for neck in ("fpn", "c4"):
        sizes = {"anchor_sizes": [16, 32]} if neck == "c4" else {}
        method = small(backbone="resnet18", backbone_weights="imagenet", neck=neck, **sizes)
        method.setup("fit")
        assert torch.equal(method.backbone.body.layer3[0].conv1.weight, classifier.layer3[0].conv1.weight)
        stage = method.roi_heads.box_head if neck == "c4" else method.backbone.body.layer4
        assert torch.equal(stage[1].bn2.running_mean, classifier.layer4[1].bn2.running_mean)
        trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
        assert not any(name.startswith(("backbone.body.conv1", "backbone.body.layer1")) for name in trained)
        assert "backbone.body.layer2.0.conv1.weight" in trained
        assert len(method.file_hashes()["backbone weights"]) == 64
    (workdir / "hub/checkpoints/resnet18-f37072fd.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="resnet18-f37072fd"):
        method.setup("fit")


def test_deterministic_roi_pool_on_a_gpu_is_refused(monkeypatch):
    method = MaskRCNN(roi_layer="pool", **SMALL_NETWORK)
    method._device = torch.device("cuda:0")  # Lightning asks for the index otherwise
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(UserError, match=r"torchvision has no deterministic RoIPool for GPUs. Use --model.roi_layer align"):
        method.on_fit_start()


def test_schedule_has_a_warmup_and_steps():
    method = small(warmup=100, learning_rate_steps={1000: 0.002}, learning_rate=0.02, total_images=2000)
    rates = [method.schedule(images) for images in (0, 50, 100, 999, 1000)]
    assert rates == pytest.approx([0.02 / 3, 0.02 * 2 / 3, 0.02, 0.02, 0.002])
    assert [stage.start for stage in method.stages()] == [0, 100, 1000]


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"backbone": "vgg16"}, r"model\.backbone: there is no 'vgg16'"),
        ({"anchor_sizes": [16]}, r"model\.anchor_sizes: 1 sizes for the 5 levels"),
        ({"neck": "c4", "num_keypoints": 17}, r"model\.neck: c4"),
        ({"class_agnostic_masks": True, "mask_activation": "softmax"}, r"model\.class_agnostic_masks"),
    ],
)
def test_invalid_options_raise_user_error(init_args, message):
    with pytest.raises(UserError, match=message):
        small(**init_args)
