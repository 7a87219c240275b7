import gzip
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.catalog.array_readers import read_idx, read_split
from datamodules.catalog.catalog import DatasetNotFound, get_dataset
from datamodules.catalog.verify import verify
from datamodules.errors import UserError
from datamodules.generation import Generation, SampleIndices
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import load_image_set, resize_uint8
from datamodules.random.noise import derive_seed, normal, uniform
from datamodules.sampler import RankSampler
from tests.helpers.fake_datasets import accept_what_is_laid_out, hundred_tiles, lay_out


def digits(**settings):
    data = Generation("digits/train", 28, 1, batch_size=10, **settings)
    data.setup("fit")
    return data


def take(data, count):
    return [data.prepare_train_batch(batch) for _, batch in zip(range(count), data.train_dataloader(), strict=False)]


def test_batches_are_the_fields_words_and_range():
    (batch,) = take(digits(), 1)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (10, 1, 28, 28)
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() < 0.01
    assert 0.99 < batch["image"].max() <= 1
    assert batch["label"].dtype == torch.int64


def test_images_and_labels_belong_together():
    """A nearest neighbour among the first 2,000 knows nine of ten of the others."""
    images, labels = read_split("digits")
    flat = images.flatten(1).float()
    nearest = torch.cdist(flat[4500:], flat[:2000]).argmin(1)
    assert (labels[nearest] == labels[4500:]).float().mean() > 0.88


def test_a_pass_shows_every_image_once():
    data = digits()
    seen = torch.cat([batch["image"] for batch in take(data, 400)]).flatten(1)
    assert len({row.numpy().tobytes() for row in seen}) == len({r.numpy().tobytes() for r in data.items.images.pixels})


def test_the_stream_goes_on_where_it_stood():
    whole = take(digits(hflip=True), 5)
    data = digits(hflip=True)
    data.load_state_dict({"position": 30, "batch_size": 10, "seed": 0})
    for left, right in zip(whole[3:], take(data, 2), strict=True):
        assert torch.equal(left["image"], right["image"])
    with pytest.raises(UserError, match=r"data.seed: 0, but the checkpoint's run had 1"):
        data.load_state_dict({"position": 30, "batch_size": 10, "seed": 1})


def test_half_of_the_images_are_mirrored():
    plain, flipped = take(digits(), 30), take(digits(hflip=True), 30)
    pairs = [(p, f) for a, b in zip(plain, flipped, strict=True) for p, f in zip(a["image"], b["image"], strict=True)]
    mirrored = [torch.equal(p.flip(2), f) for p, f in pairs]
    assert all(m or torch.equal(p, f) for m, (p, f) in zip(mirrored, pairs, strict=True))
    assert 110 < sum(mirrored) < 190


def test_a_folder_of_pictures_streamed_or_stored_is_the_same(photos):
    settings = {"size": 32, "batch_size": 4, "crop": 60}
    stored, streamed = (Generation(str(photos), streaming=streaming, **settings) for streaming in (False, True))
    for data in (stored, streamed):
        data.setup("fit")
    for left, right in zip(take(stored, 3), take(streamed, 3), strict=True):
        assert torch.equal(left["image"], right["image"])
    pixels = np.asarray(Image.open(sorted(photos.iterdir())[0]).convert("RGB").crop((18, 15, 78, 75)))
    theirs = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    ours = stored.items.images.pixels[0].permute(1, 2, 0).numpy().astype(int)
    assert abs(ours - theirs).max() <= 1


def test_labels_are_the_folders(tmp_path, photos):
    for i, path in enumerate(sorted(photos.iterdir())):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "ab"[i % 2] / path.name)
    assert load_image_set(str(tmp_path), 16, 3, None, DataReport()).labels.tolist() == [0] * 4 + [1] * 4


def test_bad_pictures_are_named_or_left_out(tmp_path, photos):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "camera0.png").read_bytes()[:999])
    data = Generation(str(tmp_path), 16, batch_size=2)
    with pytest.raises(InvalidImage, match=r"cut\.png"):
        data.setup("fit")
    data = Generation(str(tmp_path), 16, batch_size=2, skip_bad=True)
    data.setup("fit")
    assert len(data.data_report.skipped) == 1
    with pytest.raises(UserError, match=r"data.channels: 1, but .*astronaut0\.png is in colour"):
        Generation(str(photos), 16, channels=1).setup("fit")
    with pytest.raises(UserError, match=r"data\.channels: 3, but the images of digits have 1"):
        Generation("digits", 28).setup("fit")


def test_mnist_is_read_packed_or_not_and_damage_is_named(workplace):
    lay_out("mnist")
    images, labels = read_split("mnist/val")
    assert images.shape == (100, 1, 28, 28)
    assert torch.equal(labels, read_split("digits")[1][:100])  # the embedded ones again and again
    assert list(verify(get_dataset("mnist"))) == ["train: 50100 of 60000 images", "test: 200 of 10000 images"]
    file = get_dataset("mnist").path / "raw/t10k-images-idx3-ubyte"
    content = file.read_bytes()
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
    file.unlink()
    assert read_idx(file).tobytes() == content[16:]
    file.write_bytes(content[:-1])
    with pytest.raises(InvalidImage, match="cut short, or not an IDX file"):
        read_idx(file)
    with pytest.raises(DatasetNotFound, match="darkroom data get mnist"):
        read_idx(file.with_name("nothing"))
    with pytest.raises(UserError, match="mnist has no split 'tset': all, train, val, test"):
        read_split("mnist/tset")


def test_cifar10_is_read_through_torchvision_which_checks_it(workplace, monkeypatch):
    with pytest.raises(DatasetNotFound, match="cifar10 is not here, or damaged: darkroom data get cifar10"):
        read_split("cifar10/train")
    lay_out("cifar10")
    with pytest.raises(DatasetNotFound, match="or damaged"):  # not the files whose MD5 torchvision knows
        read_split("cifar10/train")
    accept_what_is_laid_out(monkeypatch)
    images, labels = read_split("cifar10/train")
    assert images.shape == (500, 3, 32, 32)
    assert labels[:12].tolist() == [*range(10), 0, 1]


def test_svhn_is_read_through_torchvision_which_checks_it(workplace, monkeypatch):
    with pytest.raises(DatasetNotFound, match="svhn is not here, or damaged: darkroom data get svhn"):
        read_split("svhn")
    lay_out("svhn")
    with pytest.raises(DatasetNotFound, match="or damaged"):
        read_split("svhn/test")
    accept_what_is_laid_out(monkeypatch)
    images, labels = read_split("svhn/test")
    assert images.shape == (100, 3, 32, 32)
    assert labels[:12].tolist() == [*range(10), 0, 1]


def test_cifar10_as_jpeg_is_read_class_by_class_in_turn(workplace):
    with pytest.raises(DatasetNotFound, match=r"train\.zip is not here: by hand"):
        read_split("cifar10-jpeg/train")
    lay_out("cifar10-jpeg")
    images, labels = read_split("cifar10-jpeg/train")
    assert labels[:12].tolist() == [*range(10), 0, 1]
    difference = images[13].permute(1, 2, 0).int() - torch.from_numpy(hundred_tiles()[13]).int()
    assert difference.abs().float().mean() < 8  # what JPEG leaves
    path = get_dataset("cifar10-jpeg").path / "test.zip"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidImage, match=r"test\.zip: damaged"):
        read_split("cifar10-jpeg/test")


def test_real_cifar10_as_jpeg_has_ten_equal_classes(with_real_data):
    images, labels = read_split("cifar10-jpeg/test")
    assert images.shape == (2000, 3, 32, 32)
    assert labels.bincount().tolist() == [200] * 10


def test_few_samples_are_made_by_several_processes():
    """Each of them gets some, and together they make each number once."""
    for count, world in ((100, 2), (150, 2), (100, 3), (7, 7), (10_000, 2)):
        numbers = SampleIndices(count, world)
        dealt = [torch.cat([numbers[i]["index"] for i in RankSampler(len(numbers), rank, world)]) for rank in range(world)]
        assert torch.cat(dealt).sort().values.tolist() == list(range(count))
    with pytest.raises(UserError, match="samples: 3 cannot be made by 4 processes"):
        SampleIndices(3, 4)


def test_real_mnist_is_intact(with_real_data):
    assert [line for line in verify(get_dataset("mnist")) if line.startswith("train")] == []


def test_enlarging_is_pils_bilinear():
    pixels = read_split("digits")[0][:3]
    theirs = [np.asarray(Image.fromarray(image[0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)) for image in pixels]
    assert abs(resize_uint8(pixels, 32)[:, 0].numpy().astype(int) - np.stack(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("draw", [normal, partial(normal, dtype=np.float32)])
def test_noise_is_a_function_of_its_number(draw):
    whole = draw(3, "z", range(100, 110), 783)
    assert (draw(3, "z", [109, 100], 783) == whole[[9, 0]]).all()
    assert (draw(3, "z", range(104, 106), 783) == whole[4:6]).all()
    assert not (draw(4, "z", range(100, 110), 783) == whole).any()
    assert not (draw(3, "y", range(100, 110), 783) == whole).any()
    assert draw(3, "z", [], 783).shape == (0, 783)


def test_seeds_of_generators_differ():
    assert derive_seed(0, "a") != derive_seed(0, "b")


def test_noise_is_distributed_as_it_says():
    from scipy.stats import kstest

    assert kstest(normal(0, "z", range(2000), 10).ravel(), "norm").pvalue > 0.01
    assert kstest(normal(0, "z", range(2000), 100, np.float32).ravel(), "norm").pvalue > 0.01
    fast = normal(0, "pairs", range(20_000), 8, np.float32)
    assert np.abs(np.corrcoef(fast.T) - np.eye(8)).max() < 0.03
    assert np.abs(np.corrcoef(np.square(fast).T) - np.eye(8)).max() < 0.03  # the two draws of a pair share their radius
    assert kstest(uniform(0, "u", range(2000), 10).ravel(), "uniform").pvalue > 0.01
