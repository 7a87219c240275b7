import numpy as np
import torch

from datamodules.catalog.coco_annotations import mirrored_keypoints
from datamodules.transforms.augment_objects import ObjectAugment
from datamodules.transforms.objects import (
    crop_masks,
    crop_objects,
    decode_masks,
    enclosing_boxes,
    encode_masks,
    flip_objects,
    label_map,
    paste_masks,
    resize_objects,
    transpose_objects,
)

HEIGHT, WIDTH = 40, 60


def scene():
    """Return a random image and three objects, with boxes that enclose their masks, and a keypoint at a corner of each mask."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (top, left, height, width) in zip(masks, ((2, 3, 10, 20), (15, 30, 20, 15), (30, 5, 8, 9)), strict=True):
        mask[top : top + height, left : left + width] = 1
    boxes = enclosing_boxes(masks)
    keypoints = torch.stack([torch.cat([boxes[:, :2], torch.full((3, 1), 2.0)], 1), torch.zeros(3, 3)], 1)
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks, "keypoints": keypoints}


def test_masks_cropped_to_their_boxes_are_pasted_back():
    _, objects = scene()
    masks = torch.cat([objects["masks"], torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)])
    masks[0, 3, 4] = 0
    cropped = crop_masks(encode_masks(masks), HEIGHT, WIDTH)
    assert [tuple(mask.pixels.shape) for mask in cropped] == [(10, 20), (20, 15), (8, 9), (0, 0)]
    assert torch.equal(paste_masks(cropped, HEIGHT, WIDTH), masks)


def test_transforms_move_boxes_masks_and_keypoints_together():
    image, objects = scene()
    for transform in (
        lambda: flip_objects(image, objects, [0, 1]),
        lambda: transpose_objects(image, objects, [0, 1]),
        lambda: crop_objects(image, objects, 5, 10, 30, 40),
        lambda: resize_objects(image, objects, 2 * HEIGHT, 3 * WIDTH),
    ):
        pixels, moved = transform()
        assert moved["masks"].shape[1:] == pixels.shape[1:]
        assert torch.equal(moved["boxes"], enclosing_boxes(moved["masks"]))
        assert (moved["keypoints"][:, 1] == 0).all()  # an absent keypoint remains absent
    flipped, moved = flip_objects(image, objects, [0, 1])
    assert torch.equal(flipped, image.flip(-1))
    assert (moved["keypoints"][:, 0, 0] == moved["boxes"][:, 2]).all()
    again = flip_objects(flipped, moved, [0, 1])
    assert torch.equal(again[1]["boxes"], objects["boxes"])
    cropped, moved = crop_objects(image, objects, 5, 10, 30, 40)
    assert moved["labels"].tolist() == [1, 2, 3]
    assert torch.equal(cropped, image[:, 5:35, 10:50])
    assert moved["keypoints"][:, 0, 2].tolist() == [0, 2, 0]  # the corners of the first and the last mask are outside
    assert crop_objects(image, objects, 0, 0, 14, 60)[1]["labels"].tolist() == [1]
    resized, moved = resize_objects(image, objects, 2 * HEIGHT, 3 * WIDTH)
    assert torch.equal(resized[:, 0, 0], image[:, 0, 0])
    assert torch.equal(moved["boxes"], objects["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    without = {name: values for name, values in objects.items() if name in ("boxes", "labels")}
    boxes = crop_objects(image, without, 5, 10, 30, 40)[1]["boxes"]
    assert boxes.tolist() == [[0, 0, 13, 7], [20, 10, 35, 30], [0, 25, 4, 30]]


def test_masks_are_resized_as_in_torchvision():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    image, objects = scene()
    transform = GeneralizedRCNNTransform(64, 1000, [0.0] * 3, [1.0] * 3)
    images, targets = transform([image.float()], [objects])
    resized, moved = resize_objects(image, objects, *images.image_sizes[0])
    assert torch.equal(moved["masks"], targets[0]["masks"])
    assert torch.allclose(moved["boxes"], targets[0]["boxes"])
    assert torch.allclose(moved["keypoints"], targets[0]["keypoints"])
    assert (resized - images.tensors[0, :, : resized.shape[1], : resized.shape[2]]).abs().max() <= 0.5


def test_keypoints_exchange_sides_in_a_flip():
    assert mirrored_keypoints(["nose", "left_eye", "right_eye", "left_ear"]) == [0, 2, 1, 3]
    assert mirrored_keypoints(["Left eye", "Right eye"]) == [1, 0]
    image, objects = scene()
    flipped = flip_objects(image, objects, [1, 0])[1]["keypoints"]
    assert torch.equal(flipped[:, 1, 0], WIDTH - objects["keypoints"][:, 0, 0])
    transposed = transpose_objects(image, objects, [1, 0])  # with a flip, a rotation, which exchanges no sides
    assert torch.equal(transposed[1]["keypoints"][:, 1, :2], objects["keypoints"][:, 0, [1, 0]])
    assert torch.equal(flip_objects(*transposed, [1, 0])[1]["keypoints"][:, 0, 1], objects["keypoints"][:, 0, 0])


def test_symmetries_are_those_of_the_square():
    image, objects = scene()
    image = image[:, :, :HEIGHT]
    augment = ObjectAugment(symmetries=True)
    objects = {"boxes": objects["boxes"][:1], "labels": objects["labels"][:1]}
    views = set()
    for bits in range(8):
        noise = np.array([0.5] * 4 + [0.1 if bits & 1 << i else 0.9 for i in range(3)])
        view, _ = augment.transform(image, objects, augment.window(HEIGHT, HEIGHT, noise), noise)
        views.add(view.numpy().tobytes())
    expected = {v.contiguous().numpy().tobytes() for k in range(4) for v in (image.rot90(k, (1, 2)), image.mT.rot90(k, (1, 2)))}
    assert views == expected


def test_crops_of_a_zoomed_image_have_the_size_of_the_crop():
    rng = np.random.default_rng(0)
    augment = ObjectAugment(short_sides=[80, 100], zoom=1.5, crop=32)
    for _ in range(50):
        window = augment.window(HEIGHT, WIDTH, rng.random(7))
        assert (window.new_height, window.new_width) == (32, 32)
        assert 0 <= window.top <= HEIGHT - window.height
        assert 0 <= window.left <= WIDTH - window.width
    image, objects = scene()
    window = ObjectAugment(crop=64).window(HEIGHT, WIDTH, rng.random(7))
    whole, _ = ObjectAugment(crop=64, hflip=False).transform(image, objects, window, rng.random(7))
    assert torch.equal(whole, image)  # smaller than the crop


def test_label_maps_prefer_the_first_mask():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 1:3] = True, True
    assert label_map(masks).tolist() == [[1, 1, 2, 0]] * 3
    assert label_map(masks[:0]).tolist() == [[0] * 4] * 3
    assert torch.equal(decode_masks(encode_masks(masks), 3, 4), masks.byte())
