from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.catalog.catalog import DatasetNotFound, catalog, resolve_images
from datamodules.catalog.domains import load_domains
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.unpaired import Unpaired


@pytest.fixture
def folder(workdir):
    """Return a folder of images with distinct values: reddish in domain A, bluish in domain B."""
    for split, count in (("trainA", 5), ("trainB", 7), ("testA", 2), ("testB", 3)):
        (workdir / "mine" / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((40 + i, 50, 3), 10 * i, dtype=np.uint8)
            pixels[..., 0 if split.endswith("A") else 2] = 200
            pixels[:, :25, 1] += 40
            Image.fromarray(pixels).save(workdir / "mine" / split / f"{i}.png")
    return workdir / "mine"


def unpaired(**options):
    data = Unpaired(**{"train": "mine/train", "val": "mine/test", "test": ["mine/test"], "crop": 16, "resize": 20, **options})
    data.setup("fit")
    return data


def image_indices(batch):
    """Return the image index of each sample, for each domain."""
    return {domain: (batch[domain][:, channel, 0, 0] / 10).tolist() for domain, channel in (("A", 2), ("B", 0))}


def test_domains_are_shuffled_independently(folder):
    data = unpaired(resize=None, batch_size=1, hflip=False)
    indices_by_domain = {"A": [], "B": []}
    for _, batch in zip(range(35), data.train_dataloader(), strict=False):
        for domain, indices in image_indices(batch).items():
            indices_by_domain[domain] += [int(index) for index in indices]
    for domain, count in (("A", 5), ("B", 7)):
        passes = np.array(indices_by_domain[domain]).reshape(-1, count)
        assert all(sorted(pass_) == list(range(count)) for pass_ in passes.tolist())
        assert len({tuple(pass_) for pass_ in passes.tolist()}) > 1
    crops = data.train_crops
    crops.images_b = crops.images_b[: len(crops.images_a)]  # equal lengths, so that equal orders are possible
    batches = [image_indices(batch) for _, batch in zip(range(20), data.train_dataloader(), strict=False)]
    assert sum(batch["A"] == batch["B"] for batch in batches) < 12


def test_train_batches_have_documented_shapes_and_range(folder):
    data = unpaired(batch_size=3)
    batch = data.prepare_train_batch(next(iter(data.train_dataloader())))
    for images in batch.values():
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert batch["A"][:, 0].min() > 0.7 and batch["B"][:, 2].min() > 0.7
    assert batch["A"][:, 2].max() < 0.4 and batch["B"][:, 0].max() < 0.4


def test_stream_resumes_at_position_and_is_split_over_ranks(folder):
    full = unpaired(batch_size=4)
    batches = [batch for _, batch in zip(range(6), full.train_dataloader(), strict=False)]
    resumed = unpaired(batch_size=4)
    resumed.position = lambda: 12
    for domain in "AB":
        assert torch.equal(next(iter(resumed.train_dataloader()))[domain], batches[3][domain])

    class SecondRank:
        global_rank, world_size = 1, 2
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

    second_rank = unpaired(batch_size=4)
    second_rank.trainer = SecondRank()
    local_batch = next(iter(second_rank.train_dataloader()))
    for domain in "AB":
        assert torch.equal(
            second_rank.prepare_train_batch(local_batch)[domain], full.prepare_train_batch(batches[0])[domain][2:]
        )


def test_crops_have_random_positions_and_half_are_flipped(folder):
    data = unpaired(batch_size=64, resize=None)
    uint8_batch = next(iter(data.train_dataloader()))
    edge = (uint8_batch["A"][:, 1, 0] > uint8_batch["A"][:, 1, 0, -1:]).sum(1)  # columns of the left half within the crop
    assert len(edge.unique()) > 8
    batch = data.prepare_train_batch(uint8_batch)
    assert torch.equal(batch["A"], uint8_batch["A"] / 255)
    unflipped = next(iter(unpaired(batch_size=64, resize=None, hflip=False).train_dataloader()))
    pairs = [
        (crop, original / 255)
        for crop, original in zip(batch["A"], unflipped["A"], strict=True)
        if original[1].unique().numel() > 1
    ]
    assert all(torch.equal(crop, original) or torch.equal(crop, original.flip(2)) for crop, original in pairs)
    n_flipped = sum(torch.equal(crop, original.flip(2)) for crop, original in pairs)
    assert 0.25 * len(pairs) < n_flipped < 0.75 * len(pairs)
    assert len(pairs) > 20


def test_resize_square_matches_pillow_bicubic(folder):
    domain_image = load_domains("mine/train")[0][3]
    actual = domain_image.resize_square(domain_image.pixels(), 20).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(Image.open(domain_image.image.path).resize((20, 20), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(actual - expected).max() <= 1


def test_eval_items_have_documented_fields(folder):
    data = unpaired()
    data.setup("test")
    items = [data.test_images[i] for i in range(len(data.test_images))]
    assert [item["direction"] for item in items] == [["AtoB"]] * 2 + [["BtoA"]] * 3
    assert [item["name"] for item in items] == [["A/0"], ["A/1"], ["B/0"], ["B/1"], ["B/2"]]
    assert all(item["image"].shape == (1, 3, 16, 16) and item["dataset"] == ["mine-test"] for item in items)
    assert len(unpaired(max_val_images=1).val_images) == 2


def test_texture_splits_are_columns_of_skimage_textures():
    (grass,), (gravel,) = load_domains("textures/grass2gravel/train")
    (test_part,), _ = load_domains("textures/grass2gravel/test")
    original = np.asarray(Image.open(resolve_images("textures/grass")[0]))
    assert np.array_equal(np.concatenate([grass.pixels()[0], test_part.pixels()[0]], 1), original)
    assert grass.pixels().shape == (3, 512, 384) and gravel.image.path.name == "gravel.png"


def test_datasets_with_masks_yield_images_and_label_maps(with_real_data):
    images, labels = load_domains("camvid/val")
    assert len(images) == len(labels) == 21
    assert labels[0].pixels().shape == images[0].pixels().shape == (3, 360, 480)
    assert set(map(tuple, labels[0].resize_square(labels[0].pixels(), 64).flatten(1).T.tolist())) <= set(
        map(tuple, labels[0].pixels().flatten(1).T.tolist())
    )
    data = Unpaired("camvid/val", "camvid/val", ["camvid/val"], 64, 72)
    data.setup("test")
    first, last = data.test_images[0], data.test_images[41]
    assert first["mask"].shape == last["mask"].shape == (1, 360, 480)
    assert first["image"].shape == last["image"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("spec", "error", "pattern"),
    [
        ("mine/tset", DatasetNotFound, r"mine/tset: .*mine/tsetA"),
        ("hors2zebra/train", UserError, r"'hors2zebra'; did you mean 'horse2zebra'"),
        (
            "textures/grass2gravel/val",
            UserError,
            r"textures/grass2gravel/val: .*grass, gravel, brick and train or test",
        ),
        ("textures/grass2moss/train", UserError, r"textures/grass2moss/train: .*grass, gravel, brick"),
        ("textures/train", UserError, r"textures/train: .*grass, gravel, brick"),
        ("digits/train", UserError, r"digits/train "),
        ("horse2zebra/val", UserError, r"horse2zebra/val .*horse2zebra/test, horse2zebra/train"),
        ("horse2zebra/train", DatasetNotFound, r"horse2zebra/trainA .*manually, in .*horse2zebra\.zip"),
    ],
)
def test_invalid_domains_raise(folder, spec, error, pattern):
    with pytest.raises(error, match=pattern):
        load_domains(spec)


def test_unusable_images_raise(folder):
    (folder / "trainA" / "3.png").write_bytes(b"")
    Image.new("RGB", (12, 60)).save(folder / "trainB" / "small.png")
    with pytest.raises(InvalidImage, match=r"1 of 5 .*trainA/3\.png: empty file"):
        unpaired()
    (folder / "trainA" / "3.png").unlink()
    with pytest.raises(InvalidImage, match=r"1 of 8 .*small\.png: 12x60 .*16x16"):
        unpaired(resize=None)
    unpaired()  # resized images are never too small


def test_resize_below_crop_raises():
    with pytest.raises(UserError, match=r"data\.resize: 10 .*data\.crop: 16"):
        Unpaired("textures/grass2gravel/train", "textures/grass2gravel/test", crop=16, resize=10)


def test_every_cyclegan_dataset_is_in_the_catalog():
    names = "apple2orange summer2winter_yosemite horse2zebra monet2photo cezanne2photo ukiyoe2photo vangogh2photo maps facades"
    for name in [*names.split(), "iphone2dslr_flower"]:
        assert {"trainA", "trainB", "testA", "testB"} == set(catalog()[name].splits)
