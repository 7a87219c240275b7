import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.catalog.coco_annotations import mirrored_keypoints
from datamodules.transforms import mask_buffer
from datamodules.transforms.augment_objects import ObjectAugment
from datamodules.transforms.mask_buffer import MaskBuffer
from datamodules.transforms.objects import decode_masks, enclosing_boxes, encode_masks, label_map
from datamodules.transforms.window import Window, crop_boxes, crop_keypoints, move_boxes, move_image, move_keypoints

HEIGHT, WIDTH = 40, 60
WHOLE = Window(0, 0, HEIGHT, WIDTH, HEIGHT, WIDTH)
WINDOWS = {
    "mirrored": WHOLE._replace(mirrored=True),
    "upside down": WHOLE._replace(upside_down=True),
    "transposed": WHOLE._replace(transposed=True),
    "turned": WHOLE._replace(mirrored=True, transposed=True),
    "cropped": Window(5, 10, 30, 40, 30, 40),
    "enlarged": WHOLE._replace(new_height=2 * HEIGHT, new_width=3 * WIDTH),
    "all": Window(5, 10, 30, 40, 60, 80, True, True, True),
}


def scene() -> tuple[Tensor, dict[str, Tensor]]:
    """Return a random image and three objects, with boxes that enclose their masks, and a keypoint at a corner of each mask."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (top, left, height, width) in zip(masks, ((2, 3, 10, 20), (15, 30, 20, 15), (30, 5, 8, 9)), strict=True):
        mask[top : top + height, left : left + width] = 1
    boxes = enclosing_boxes(masks)
    keypoints = torch.stack([torch.cat([boxes[:, :2], torch.full((3, 1), 2.0)], 1), torch.zeros(3, 3)], 1)
    return image, {"boxes": boxes, "masks": masks, "keypoints": keypoints}


def move(window: Window) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the image and the objects of `scene` in a window."""
    image, objects = scene()
    boxes, _ = crop_boxes(objects["boxes"].numpy(), window)
    keypoints = move_keypoints(crop_keypoints(objects["keypoints"].numpy(), window), window, [0, 1])
    masks = MaskBuffer(encode_masks(objects["masks"])).paste(np.arange(3), window)
    moved = {"boxes": torch.from_numpy(move_boxes(boxes, window)), "masks": masks, "keypoints": torch.from_numpy(keypoints)}
    return move_image(image, window), moved


def random_windows(count: int) -> list[Window]:
    rng = np.random.default_rng(0)
    augment = ObjectAugment(short_sides=[30, 50, 90], zoom=1.5, crop=24, symmetries=True)
    return [augment.window(HEIGHT, WIDTH, rng.random(7)) for _ in range(count)]


def random_masks() -> Tensor:
    """Return masks of scattered pixels in boxes of all sizes, one of them without pixels."""
    rng = np.random.default_rng(1)
    masks = np.zeros((7, HEIGHT, WIDTH), np.uint8)
    for mask in masks[1:]:
        (top, bottom), (left, right) = (np.sort(rng.choice(length + 1, 2, replace=False)) for length in (HEIGHT, WIDTH))
        mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.3
    return torch.from_numpy(masks)


def test_pasted_masks_are_those_before():
    masks = torch.cat([scene()[1]["masks"], random_masks()])
    buffer = MaskBuffer(encode_masks(masks))
    assert [tuple(place[2:4]) for place in buffer.places[:4]] == [(10, 20), (20, 15), (8, 9), (0, 0)]
    assert torch.equal(buffer.paste(np.arange(len(masks)), WHOLE), masks)
    assert torch.equal(buffer.paste(np.array([2, 0]), WHOLE), masks[[2, 0]])
    assert MaskBuffer([]).paste(np.arange(0), WHOLE).shape == (0, HEIGHT, WIDTH)


def test_masks_in_windows_equal_whole_masks_that_are_cropped_resized_and_flipped(monkeypatch):
    monkeypatch.setattr(mask_buffer, "CHUNK", 2000)
    masks = random_masks()
    buffer, ids = MaskBuffer(encode_masks(masks)), np.arange(len(masks))
    for window in random_windows(100):
        part = masks[:, window.top :, window.left :][:, : window.height, : window.width]
        assert torch.equal(torch.from_numpy(buffer.boxes_within(ids, window)), enclosing_boxes(part))
        size = (window.new_height, window.new_width)
        expected = torch.nn.functional.interpolate(part[None].float(), size, mode="nearest")[0].byte()
        expected = expected.flip(2) if window.mirrored else expected
        expected = expected.flip(1) if window.upside_down else expected
        expected = expected.transpose(1, 2) if window.transposed else expected
        assert torch.equal(buffer.paste(ids, window), expected)
        assert torch.equal(buffer.paste_on_device(ids, window), expected)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_move_boxes_masks_and_keypoints_together(name):
    pixels, moved = move(WINDOWS[name])
    assert moved["masks"].shape[1:] == pixels.shape[1:] == WINDOWS[name].final_shape
    assert torch.equal(moved["boxes"], enclosing_boxes(moved["masks"]))
    assert (moved["keypoints"][:, 1] == 0).all()  # an absent keypoint remains absent


def test_windows_flip_crop_and_resize_images():
    image, objects = scene()
    flipped, moved = move(WINDOWS["mirrored"])
    assert torch.equal(flipped, image.flip(-1))
    assert (moved["keypoints"][:, 0, 0] == moved["boxes"][:, 2]).all()
    assert torch.equal(move(WINDOWS["turned"])[0], image.rot90(1, (1, 2)))
    cropped, moved = move(WINDOWS["cropped"])
    assert torch.equal(cropped, image[:, 5:35, 10:50])
    assert moved["keypoints"][:, 0, 2].tolist() == [0, 2, 0]  # the corners of the first and the last mask are outside
    assert moved["boxes"].tolist() == [[0, 0, 13, 7], [20, 10, 35, 30], [0, 25, 4, 30]]
    resized, moved = move(WINDOWS["enlarged"])
    assert torch.equal(resized[:, 0, 0], image[:, 0, 0])
    assert torch.equal(moved["boxes"], objects["boxes"] * torch.tensor([3.0, 2, 3, 2]))


def test_masks_are_resized_as_in_torchvision():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    image, objects = scene()
    transform = GeneralizedRCNNTransform(64, 1000, [0.0] * 3, [1.0] * 3)
    images, targets = transform([image.float()], [objects])
    height, width = images.image_sizes[0]
    resized, moved = move(WHOLE._replace(new_height=height, new_width=width))
    assert torch.equal(moved["masks"], targets[0]["masks"])
    assert torch.allclose(moved["boxes"], targets[0]["boxes"])
    assert torch.allclose(moved["keypoints"], targets[0]["keypoints"])
    assert (resized - images.tensors[0, :, : resized.shape[1], : resized.shape[2]]).abs().max() <= 0.5


def test_keypoints_exchange_sides_in_a_flip():
    assert mirrored_keypoints(["nose", "left_eye", "right_eye", "left_ear"]) == [0, 2, 1, 3]
    assert mirrored_keypoints(["Left eye", "Right eye"]) == [1, 0]
    keypoints = scene()[1]["keypoints"].numpy()
    flipped = move_keypoints(keypoints, WINDOWS["mirrored"], [1, 0])
    assert (flipped[:, 1, 0] == WIDTH - keypoints[:, 0, 0]).all()
    transposed = move_keypoints(keypoints, WINDOWS["transposed"], [1, 0])
    assert (transposed[:, 1, :2] == keypoints[:, 0, [1, 0]]).all()
    turned = move_keypoints(keypoints, WINDOWS["turned"], [1, 0])  # with a flip, a rotation, which exchanges no sides
    assert (turned[:, 0, 1] == WIDTH - keypoints[:, 0, 0]).all()


def test_symmetries_are_those_of_the_square():
    image = scene()[0][:, :, :HEIGHT]
    augment = ObjectAugment(symmetries=True)
    views = set()
    for bits in range(8):
        noise = np.array([0.5] * 4 + [0.1 if bits & 1 << i else 0.9 for i in range(3)])
        views.add(move_image(image, augment.window(HEIGHT, HEIGHT, noise)).numpy().tobytes())
    expected = {v.contiguous().numpy().tobytes() for k in range(4) for v in (image.rot90(k, (1, 2)), image.mT.rot90(k, (1, 2)))}
    assert views == expected


def test_crops_of_a_zoomed_image_have_the_size_of_the_crop():
    rng = np.random.default_rng(0)
    augment = ObjectAugment(short_sides=[80, 100], zoom=1.5, crop=32)
    for _ in range(50):
        window = augment.window(HEIGHT, WIDTH, rng.random(7))
        assert window.final_shape == (32, 32)
        assert 0 <= window.top <= HEIGHT - window.height
        assert 0 <= window.left <= WIDTH - window.width
    image, _ = scene()
    window = ObjectAugment(crop=64, hflip=False).window(HEIGHT, WIDTH, rng.random(7))
    assert torch.equal(move_image(image, window), image)  # smaller than the crop


def test_label_maps_prefer_the_first_mask():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 1:3] = True, True
    assert label_map(masks).tolist() == [[1, 1, 2, 0]] * 3
    assert label_map(masks[:0]).tolist() == [[0] * 4] * 3
    assert torch.equal(decode_masks(encode_masks(masks), 3, 4), masks.byte())
