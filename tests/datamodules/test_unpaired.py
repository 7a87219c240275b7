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
def folder(workplace):
    """Numbered pictures: A's are reddish, B's bluish, none twice the same."""
    for part, count in (("trainA", 5), ("trainB", 7), ("testA", 2), ("testB", 3)):
        (workplace / "mine" / part).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((40 + i, 50, 3), 10 * i, dtype=np.uint8)
            pixels[..., 0 if part.endswith("A") else 2] = 200
            pixels[:, :25, 1] += 40
            Image.fromarray(pixels).save(workplace / "mine" / part / f"{i}.png")
    return workplace / "mine"


def unpaired(**settings):
    data = Unpaired(**{"train": "mine/train", "val": "mine/test", "test": ["mine/test"], "crop": 16, "resize": 20, **settings})
    data.setup("fit")
    return data


def numbers_of(batch):
    """Which picture each sample is of."""
    return {domain: (batch[domain][:, channel, 0, 0] / 10).tolist() for domain, channel in (("A", 2), ("B", 0))}


def test_each_domain_has_an_order_of_its_own(folder):
    data = unpaired(resize=None, batch_size=1, hflip=False)
    found = {"A": [], "B": []}
    for _, batch in zip(range(35), data.train_dataloader(), strict=False):
        for domain, numbers in numbers_of(batch).items():
            found[domain] += [int(number) for number in numbers]
    for domain, count in (("A", 5), ("B", 7)):
        passes = np.array(found[domain]).reshape(-1, count)
        assert all(sorted(one) == list(range(count)) for one in passes.tolist())
        assert len({tuple(one) for one in passes.tolist()}) > 1
    data.stacks.images_b = data.stacks.images_b[: len(data.stacks.images_a)]  # as many, so that the orders could be the same
    batches = [numbers_of(batch) for _, batch in zip(range(20), data.train_dataloader(), strict=False)]
    assert sum(batch["A"] == batch["B"] for batch in batches) < 12


def test_domains_keep_apart_and_batches_are_in_range(folder):
    data = unpaired(batch_size=3)
    batch = data.prepare_train_batch(next(iter(data.train_dataloader())))
    for images in batch.values():
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert batch["A"][:, 0].min() > 0.7 and batch["B"][:, 2].min() > 0.7
    assert batch["A"][:, 2].max() < 0.4 and batch["B"][:, 0].max() < 0.4


def test_stream_goes_on_where_it_stood_and_processes_share_it(folder):
    whole = unpaired(batch_size=4)
    batches = [batch for _, batch in zip(range(6), whole.train_dataloader(), strict=False)]
    later = unpaired(batch_size=4)
    later.load_state_dict({"position": 12, "batch_size": 4, "seed": 0})
    for domain in "AB":
        assert torch.equal(next(iter(later.train_dataloader()))[domain], batches[3][domain])

    class Second:
        global_rank, world_size = 1, 2

    half = unpaired(batch_size=4)
    half.trainer = Second()
    share = next(iter(half.train_dataloader()))
    for domain in "AB":
        assert torch.equal(half.prepare_train_batch(share)[domain], whole.prepare_train_batch(batches[0])[domain][2:])


def test_parts_are_cut_anywhere_and_half_are_mirrored(folder):
    data = unpaired(batch_size=64, resize=None)
    raw = next(iter(data.train_dataloader()))
    edge = (raw["A"][:, 1, 0] > raw["A"][:, 1, 0, -1:]).sum(1)  # columns of the left half that are in a part
    assert len(edge.unique()) > 8
    batch = data.prepare_train_batch(raw)
    pairs = [(one, other / 255) for one, other in zip(batch["A"], raw["A"], strict=True) if other[1].unique().numel() > 1]
    assert all(torch.equal(one, other) or torch.equal(one, other.flip(2)) for one, other in pairs)
    mirrored = sum(torch.equal(one, other.flip(2)) for one, other in pairs)
    assert 0.25 * len(pairs) < mirrored < 0.75 * len(pairs)
    assert len(pairs) > 20


def test_pictures_are_resized_as_pillow_does(folder):
    member = load_domains("mine/train")[0][3]
    ours = member.resize_square(member.pixels(), 20).permute(1, 2, 0).numpy().astype(int)
    pillow = np.asarray(Image.open(member.picture.path).resize((20, 20), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - pillow).max() <= 1


def test_pictures_to_measure_on(folder):
    data = unpaired()
    data.setup("test")
    items = [data.test_pictures[i] for i in range(len(data.test_pictures))]
    assert [item["direction"] for item in items] == [["AtoB"]] * 2 + [["BtoA"]] * 3
    assert [item["name"] for item in items] == [["A/0"], ["A/1"], ["B/0"], ["B/1"], ["B/2"]]
    assert all(item["image"].shape == (1, 3, 16, 16) and item["dataset"] == ["mine-test"] for item in items)
    assert len(unpaired(max_val_images=1).val_pictures) == 2


def test_textures_are_parts_of_scikit_images_pictures():
    (grass,), (gravel,) = load_domains("textures/grass2gravel/train")
    (rest,), _ = load_domains("textures/grass2gravel/test")
    original = np.asarray(Image.open(resolve_images("textures/grass")[0]))
    assert np.array_equal(np.concatenate([grass.pixels()[0], rest.pixels()[0]], 1), original)
    assert grass.pixels().shape == (3, 512, 384) and gravel.picture.path.name == "gravel.png"


def test_sets_with_masks_are_photographs_and_label_maps(with_real_data):
    photographs, labels = load_domains("camvid/val")
    assert len(photographs) == len(labels) == 21
    assert labels[0].pixels().shape == photographs[0].pixels().shape == (3, 360, 480)
    assert set(map(tuple, labels[0].resize_square(labels[0].pixels(), 64).flatten(1).T.tolist())) <= set(
        map(tuple, labels[0].pixels().flatten(1).T.tolist())
    )
    data = Unpaired("camvid/val", "camvid/val", ["camvid/val"], 64, 72)
    data.setup("test")
    first, last = data.test_pictures[0], data.test_pictures[41]
    assert first["mask"].shape == last["mask"].shape == (1, 360, 480)
    assert first["image"].shape == last["image"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("mine/tset", DatasetNotFound, r"mine/tset: no folder mine/tsetA; the two domains belong into mine/tsetA and \.\.\.B"),
        ("hors2zebra/train", UserError, r"no data set 'hors2zebra'; did you mean 'horse2zebra'"),
        (
            "textures/grass2gravel/val",
            UserError,
            r"textures/grass2gravel/val: two of grass, gravel, brick and train or test, as in",
        ),
        ("textures/grass2moss/train", UserError, r"two of grass, gravel, brick"),
        ("textures/train", UserError, r"textures/train: two of grass, gravel, brick"),
        ("digits/train", UserError, r"digits/train has no two domains"),
        ("horse2zebra/val", UserError, r"horse2zebra/val has no two domains; take horse2zebra/test, horse2zebra/train"),
        ("horse2zebra/train", DatasetNotFound, r"horse2zebra/trainA is not here: by hand, below .*: unzip horse2zebra\.zip"),
    ],
)
def test_what_is_no_pair_of_domains_is_refused(folder, spec, error, says):
    with pytest.raises(error, match=says):
        load_domains(spec)


def test_unusable_pictures_are_named(folder):
    (folder / "trainA" / "3.png").write_bytes(b"")
    Image.new("RGB", (12, 60)).save(folder / "trainB" / "small.png")
    with pytest.raises(InvalidImage, match=r"1 of 5 pictures cannot be used: .*trainA/3\.png: empty file"):
        unpaired()
    (folder / "trainA" / "3.png").unlink()
    with pytest.raises(
        InvalidImage, match=r"1 of 8 pictures cannot be used: .*small\.png: 12x60 pixels, too small: at least 16x16"
    ):
        unpaired(resize=None)
    unpaired()  # where all are resized, none is too small


def test_a_resize_below_the_crop_is_refused():
    with pytest.raises(UserError, match=r"data\.resize: 10 is smaller than data\.crop: 16"):
        Unpaired("textures/grass2gravel/train", "textures/grass2gravel/test", crop=16, resize=10)


def test_every_set_of_the_paper_is_in_the_catalogue():
    names = "apple2orange summer2winter_yosemite horse2zebra monet2photo cezanne2photo ukiyoe2photo vangogh2photo maps facades iphone2dslr_flower"
    for name in names.split():
        assert {"trainA", "trainB", "testA", "testB"} == set(catalog()[name].splits)
