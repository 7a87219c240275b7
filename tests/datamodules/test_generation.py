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
from datamodules.generation import Generation, SampleIndices, eval_batch_size
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import DataReport
from datamodules.io.image_set import Square, load_image_set, resize_uint8
from datamodules.random.noise import derive_seed, normal, uniform
from datamodules.sampler import RankSampler
from tests.helpers.fake_datasets import accept_what_is_laid_out, hundred_tiles, lay_out


def digits(**options):
    data = Generation("digits/train", 28, 1, batch_size=10, **options)
    data.setup("fit")
    return data


def take(data, count):
    return [data.prepare_train_batch(batch) for _, batch in zip(range(count), data.train_dataloader(), strict=False)]


def test_train_batches_have_documented_keys_shapes_and_range():
    (batch,) = take(digits(), 1)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (10, 1, 28, 28)
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() < 0.01
    assert 0.99 < batch["image"].max() <= 1
    assert batch["label"].dtype == torch.int64


def test_labels_match_images():
    """A 1-nearest-neighbor classifier with the first 2,000 images has an accuracy of about 0.9."""
    images, labels = read_split("digits")
    flat = images.flatten(1).float()
    nearest = torch.cdist(flat[4500:], flat[:2000]).argmin(1)
    assert (labels[nearest] == labels[4500:]).float().mean() > 0.88


def test_each_pass_contains_every_image_once():
    data = digits()
    images = torch.cat([batch["image"] for batch in take(data, 400)]).flatten(1)
    assert len({row.numpy().tobytes() for row in images}) == len({r.numpy().tobytes() for r in data.items.images.pixels})


def test_stream_resumes_at_position_and_checks_seed():
    full = take(digits(hflip=True), 5)
    data = digits(hflip=True)
    data.position = lambda: 30
    for expected, actual in zip(full[3:], take(data, 2), strict=True):
        assert torch.equal(expected["image"], actual["image"])
    with pytest.raises(UserError, match=r"data\.seed: 0, .* 1"):
        data.load_state_dict({"batch_size": 10, "seed": 1})


def test_hflip_flips_half_of_the_images():
    plain, flipped = take(digits(), 30), take(digits(hflip=True), 30)
    pairs = [(p, f) for a, b in zip(plain, flipped, strict=True) for p, f in zip(a["image"], b["image"], strict=True)]
    is_flipped = [torch.equal(p.flip(2), f) for p, f in pairs]
    assert all(m or torch.equal(p, f) for m, (p, f) in zip(is_flipped, pairs, strict=True))
    assert 110 < sum(is_flipped) < 190


def test_streaming_yields_the_same_batches_as_in_memory_loading(photos):
    options = {"size": 32, "batch_size": 4, "crop": 60}
    in_memory, streamed = (Generation(str(photos), streaming=streaming, **options) for streaming in (False, True))
    for data in (in_memory, streamed):
        data.setup("fit")
    for expected, actual in zip(take(in_memory, 3), take(streamed, 3), strict=True):
        assert torch.equal(expected["image"], actual["image"])
    pixels = np.asarray(Image.open(sorted(photos.iterdir())[0]).convert("RGB").crop((18, 15, 78, 75)))
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    actual = in_memory.items.images.pixels[0].permute(1, 2, 0).numpy().astype(int)
    assert abs(actual - expected).max() <= 1


def test_small_images_are_means_of_squares(photos):
    """Streamed images are the same, at the first and at a repeated reading, and at sides that are not stored."""
    sides = {0: 4, 4: 8, 8: 8, 12: 64}
    for streaming in (False, True):
        data = Generation(str(photos), 64, batch_size=4, streaming=streaming)
        data.image_size_at = sides.get
        data.setup("fit")
        loader = data.train_dataloader()
        full = data.items.read(np.arange(8), 64).numpy().astype(float)
        order = np.concatenate([items for _, (_, items) in zip(range(4), loader.sampler, strict=False)])
        for i, batch in enumerate(loader):
            side = sides[4 * i]
            expected = full[order[4 * i : 4 * i + 4]].reshape(4, 3, side, 64 // side, side, 64 // side).mean((3, 5))
            assert batch["image"].numpy().tolist() == np.rint(expected).tolist()
            if i == 3:
                break
        if streaming:
            assert list(data.items.thumbnails) == [4, 8, 16, 32]
            data.items.files = [None] * 8  # each file was decoded in the first pass
            assert data.items.read(order[:8], 16).shape == (8, 3, 16, 16)


def test_stored_images_are_shared_by_loader_processes(photos):
    data = Generation(str(photos), 64, batch_size=4, streaming=True, num_workers=2)
    data.image_size_at = lambda position: 4
    data.setup("fit")
    take(data, 2)
    assert data.items.is_stored.sum() == 8


def test_crop_is_around_its_center(photos):
    path = sorted(photos.iterdir())[0]
    data = Generation(str(photos), 20, crop=20, crop_center=(30, 41))
    data.setup("fit")
    expected = np.asarray(Image.open(path).convert("RGB"))[31:51, 20:40].transpose(2, 0, 1)
    assert data.items.images.pixels[0].numpy().tolist() == expected.tolist()
    with pytest.raises(InvalidImage, match=r"data\.crop 20 at data\.crop_center \(5, 41\) is not inside"):
        Generation(str(photos), 20, crop=20, crop_center=(5, 41)).setup("fit")
    with pytest.raises(UserError, match=r"data\.crop_center: it requires data\.crop"):
        Generation(str(photos), 20, crop_center=(30, 41))


def test_labels_are_folder_indices(tmp_path, photos):
    for i, path in enumerate(sorted(photos.iterdir())):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "ab"[i % 2] / path.name)
    assert load_image_set(str(tmp_path), 16, 3, Square(), DataReport()).labels.tolist() == [0] * 4 + [1] * 4


def test_unusable_images_raise_or_are_skipped(tmp_path, photos):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "truncated.png").write_bytes((tmp_path / "camera0.png").read_bytes()[:999])
    data = Generation(str(tmp_path), 16, batch_size=2)
    with pytest.raises(InvalidImage, match=r"truncated\.png"):
        data.setup("fit")
    data = Generation(str(tmp_path), 16, batch_size=2, skip_bad=True)
    data.setup("fit")
    assert len(data.data_report.skipped) == 1
    with pytest.raises(UserError, match=r"data\.channels: 1, .*astronaut0\.png"):
        Generation(str(photos), 16, channels=1).setup("fit")
    with pytest.raises(UserError, match=r"data\.channels: 3, .*digits .*1"):
        Generation("digits", 28).setup("fit")


def test_mnist_reads_compressed_and_uncompressed_idx_files(workdir):
    lay_out("mnist")
    images, labels = read_split("mnist/val")
    assert images.shape == (100, 1, 28, 28)
    assert torch.equal(labels, read_split("digits")[1][:100])  # the fake files repeat the embedded digits
    assert list(verify(get_dataset("mnist"))) == ["train: 50100 of 60000 images", "test: 200 of 10000 images"]
    idx_path = get_dataset("mnist").path / "raw/t10k-images-idx3-ubyte"
    content = idx_path.read_bytes()
    idx_path.with_name(f"{idx_path.name}.gz").write_bytes(gzip.compress(content))
    idx_path.unlink()
    assert read_idx(idx_path).tobytes() == content[16:]
    idx_path.write_bytes(content[:-1])
    with pytest.raises(InvalidImage, match=r"t10k-images-idx3-ubyte: .*IDX"):
        read_idx(idx_path)
    with pytest.raises(DatasetNotFound, match=r"nothing: .*darkroom data get mnist"):
        read_idx(idx_path.with_name("nothing"))
    with pytest.raises(UserError, match=r"mnist .*'tset'.* all, train, val, test"):
        read_split("mnist/tset")


def test_cifar10_reads_only_verified_files(workdir, monkeypatch):
    with pytest.raises(DatasetNotFound, match=r"cifar10 .*darkroom data get cifar10"):
        read_split("cifar10/train")
    lay_out("cifar10")
    with pytest.raises(DatasetNotFound, match=r"cifar10 .*damaged"):  # wrong MD5
        read_split("cifar10/train")
    accept_what_is_laid_out(monkeypatch)
    images, labels = read_split("cifar10/train")
    assert images.shape == (500, 3, 32, 32)
    assert labels[:12].tolist() == [*range(10), 0, 1]


def test_svhn_reads_only_verified_files(workdir, monkeypatch):
    with pytest.raises(DatasetNotFound, match=r"svhn .*darkroom data get svhn"):
        read_split("svhn")
    lay_out("svhn")
    with pytest.raises(DatasetNotFound, match=r"svhn .*damaged"):
        read_split("svhn/test")
    accept_what_is_laid_out(monkeypatch)
    images, labels = read_split("svhn/test")
    assert images.shape == (100, 3, 32, 32)
    assert labels[:12].tolist() == [*range(10), 0, 1]


def test_cifar10_jpeg_interleaves_classes(workdir):
    with pytest.raises(DatasetNotFound, match=r"train\.zip: .*manually"):
        read_split("cifar10-jpeg/train")
    lay_out("cifar10-jpeg")
    images, labels = read_split("cifar10-jpeg/train")
    assert labels[:12].tolist() == [*range(10), 0, 1]
    error = images[13].permute(1, 2, 0).int() - torch.from_numpy(hundred_tiles()[13]).int()
    assert error.abs().float().mean() < 8  # JPEG error
    path = get_dataset("cifar10-jpeg").path / "test.zip"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidImage, match=r"test\.zip: damaged"):
        read_split("cifar10-jpeg/test")


def test_real_cifar10_jpeg_has_equal_class_counts(with_real_data):
    images, labels = read_split("cifar10-jpeg/test")
    assert images.shape == (2000, 3, 32, 32)
    assert labels.bincount().tolist() == [200] * 10


def test_sample_indices_are_split_over_ranks():
    """Every rank gets indices, and every index occurs once."""
    for count, world_size in ((100, 2), (150, 2), (100, 3), (7, 7), (10_000, 2)):
        indices = SampleIndices(count, eval_batch_size(count, world_size))
        samplers = [RankSampler(len(indices), rank, world_size) for rank in range(world_size)]
        rank_indices = [torch.cat([indices[i]["index"] for i in sampler]) for sampler in samplers]
        assert torch.cat(rank_indices).sort().values.tolist() == list(range(count))


def test_real_mnist_passes_verify(with_real_data):
    assert [line for line in verify(get_dataset("mnist")) if line.startswith("train")] == []


def test_resize_uint8_matches_pillow_bilinear():
    pixels = read_split("digits")[0][:3]
    expected = [np.asarray(Image.fromarray(image[0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)) for image in pixels]
    assert abs(resize_uint8(pixels, 32)[:, 0].numpy().astype(int) - np.stack(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("noise", [normal, partial(normal, dtype=np.float32)])
def test_noise_is_a_function_of_seed_stream_and_index(noise):
    full = noise(3, "z", range(100, 110), 783)
    assert (noise(3, "z", [109, 100], 783) == full[[9, 0]]).all()
    assert (noise(3, "z", range(104, 106), 783) == full[4:6]).all()
    assert not (noise(4, "z", range(100, 110), 783) == full).any()
    assert not (noise(3, "y", range(100, 110), 783) == full).any()
    assert noise(3, "z", [], 783).shape == (0, 783)


def test_derived_seeds_differ_between_streams():
    assert derive_seed(0, "a") != derive_seed(0, "b")


def test_noise_has_requested_distribution():
    from scipy.stats import kstest

    assert kstest(normal(0, "z", range(2000), 10).ravel(), "norm").pvalue > 0.01
    assert kstest(normal(0, "z", range(2000), 100, np.float32).ravel(), "norm").pvalue > 0.01
    fast = normal(0, "pairs", range(20_000), 8, np.float32)
    assert np.abs(np.corrcoef(fast.T) - np.eye(8)).max() < 0.03
    assert np.abs(np.corrcoef(np.square(fast).T) - np.eye(8)).max() < 0.03  # the two values of a pair have the same radius
    assert kstest(uniform(0, "u", range(2000), 10).ravel(), "uniform").pvalue > 0.01
