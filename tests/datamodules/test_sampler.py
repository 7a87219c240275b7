"""Counter-based random numbers, samplers and patches."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from datamodules.random.philox import permutation, randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler, RankSampler
from datamodules.superresolution import SuperResolution
from datamodules.superresolution_datasets import KERNEL_MARGIN, InMemoryPatches
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.reflect import reflect_index
from datamodules.transforms.resize import imresize


def test_random_words_depend_on_seed_stream_and_position():
    full = random_words(0, "crop", 0, 100)
    assert np.array_equal(full[37:61], random_words(0, "crop", 37, 24))
    assert not np.array_equal(full, random_words(1, "crop", 0, 100))
    assert not np.array_equal(full, random_words(0, "noise", 0, 100))


def test_randint_from_words_is_uniform():
    counts = np.bincount(randint_from_words(random_words(0, "crop", 0, 70_000)[:, 0], 7), minlength=7)
    expected = 10_000
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == 7
    assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001


def test_permutation_differs_between_passes():
    first, second = (permutation(0, "order", epoch, 50) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)


def take(sampler, count):
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


def test_each_pass_contains_every_item_once():
    batches = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0), 5)
    items = np.concatenate([items for _, items in batches])
    assert sorted(items[:10]) == sorted(items[10:]) == list(range(10))


def test_stream_resumes_at_position():
    full = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0), 8)
    resumed = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 12), 5)
    for (start, items), (resumed_start, resumed_items) in zip(full[3:], resumed, strict=True):
        assert start == resumed_start
        assert np.array_equal(items, resumed_items)


def test_ranks_get_disjoint_slices_of_each_batch():
    full = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0), 6)
    rank_batches = [
        take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0, rank=rank, world_size=2), 6) for rank in (0, 1)
    ]
    for (start, items), rank0, rank1 in zip(full, *rank_batches, strict=True):
        assert (rank0[0], rank1[0]) == (start, start + 2)
        assert np.array_equal(items, np.concatenate([rank0[1], rank1[1]]))


def test_rank_sampler_yields_every_item_once():
    rank_batches = [list(RankSampler(7, rank, 3)) for rank in range(3)]
    assert sorted(item for rank_items in rank_batches for item in rank_items) == list(range(7))
    assert [len(RankSampler(7, rank, 3)) for rank in range(3)] == [3, 2, 2]


def test_rank_sampler_duplicates_items_for_ranks_without_one():
    assert [list(RankSampler(2, rank, 5)) for rank in range(5)] == [[0], [1], [0], [1], [0]]
    assert list(RankSampler(0, 1, 2)) == []


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (1, h, w), dtype=torch.uint8, generator=generator) for h, w in ((30, 45), (48, 33))]


@pytest.mark.parametrize("symmetry", range(8))
@pytest.mark.parametrize("corner", [(3, 6), (-6, -3), (20, 25)])
def test_crop_patches_matches_numpy(images, symmetry, corner):
    buffer = RaggedImageBuffer(images)
    image_ids = np.array([1, 0])
    top, left = (np.array([offset, offset]) for offset in corner)
    patches = buffer.crop_patches(image_ids, top, left, 18, np.array([symmetry, symmetry]))
    for patch, image_id in zip(patches, image_ids, strict=True):
        margin = 40
        padded = np.pad(images[image_id][0].numpy(), margin, mode="edge")
        expected = padded[margin + corner[0] :, margin + corner[1] :][:18, :18]
        if symmetry & 1:
            expected = np.flipud(expected)
        if symmetry & 2:
            expected = np.fliplr(expected)
        if symmetry & 4:
            expected = expected.T
        assert np.array_equal(patch[0], expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [63, 64, 70])
def test_large_patches_match_numpy(channels, size):
    """Large patches are copied by rows; they have the memory format of small ones."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (channels, h, w), np.uint8) for h, w in ((80, 90), (70, 75))]
    buffer = RaggedImageBuffer([torch.from_numpy(image) for image in images])
    image_ids, symmetry = np.arange(16) % 2, np.arange(16) % 8
    top = generator.integers(0, buffer.heights[image_ids] - size + 1)
    left = generator.integers(0, buffer.widths[image_ids] - size + 1)
    patches = buffer.crop_patches(image_ids, top, left, size, symmetry)
    assert patches.is_contiguous(memory_format=torch.contiguous_format if channels == 1 else torch.channels_last)
    for i, patch in enumerate(patches.numpy()):
        expected = images[image_ids[i]][:, top[i] : top[i] + size, left[i] : left[i] + size]
        expected = expected[:, :: -1 if symmetry[i] & 1 else 1, :: -1 if symmetry[i] & 2 else 1]
        assert np.array_equal(patch, expected.transpose(0, 2, 1) if symmetry[i] & 4 else expected)


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("reach", [1, 9, 60])
def test_reflected_positions_match_numpy(length, reach):
    index = torch.arange(-reach, length + reach)
    expected = np.pad(np.arange(length), reach, mode="reflect")
    for dtype in (torch.int64, torch.float32):
        actual = reflect_index(index.to(dtype), torch.tensor(length))
        assert actual.dtype == dtype
        assert actual.tolist() == expected.tolist()


def test_words_are_those_of_numpy():
    """A generator of the thread is reused; calls of other streams and threads in between do not matter."""

    def check(number):
        for start in (0, 7, 2**40):
            stream = f"stream {number}"
            digest = hashlib.sha256(f"{number}/{stream}".encode()).digest()
            philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=start)
            assert np.array_equal(random_words(number, stream, start, 3).ravel(), philox.random_raw(12))
            digest = hashlib.sha256(f"{number}/{stream}/{start}".encode()).digest()
            philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
            assert np.array_equal(permutation(number, stream, start, 50), np.random.Generator(philox).permutation(50))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(100)))


def test_eight_symmetries_differ(images):
    zeros = np.zeros(8, dtype=int)
    patches = RaggedImageBuffer(images).crop_patches(zeros, zeros, zeros, 12, np.arange(8))
    assert len({patch.numpy().tobytes() for patch in patches}) == 8


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_patch_input_equals_crop_of_downscaled_image(scale):
    data = SuperResolution(scale, train="", patch_size=7)
    image = torch.randint(0, 256, (1, 20 * scale, 24 * scale), dtype=torch.uint8)
    lr = imresize(image.float() / 255, (20, 24))
    size = (7 + 2 * KERNEL_MARGIN) * scale
    corner = np.array([3 * scale])
    patches = RaggedImageBuffer([image]).crop_patches(np.array([0]), corner, corner, size, np.array([0]))
    pair = data.prepare_train_batch({"patches": patches})
    start = 3 + KERNEL_MARGIN
    assert torch.allclose(pair["input"][0], lr[:, start : start + 7, start : start + 7], atol=1e-6)
    window = slice(start * scale, (start + 7) * scale)
    assert torch.equal(pair["target"][0], image[:, window, window].float() / 255)


def test_random_patches_cover_every_pixel_and_align_with_grid():
    height, width, scale = 30, 36, 3
    pixel_ids = torch.arange(height * width // 9).reshape(1, height // 3, width // 3)
    image = pixel_ids.repeat_interleave(3, 1).repeat_interleave(3, 2).to(torch.uint8)  # one value per LR pixel
    patches = InMemoryPatches(RaggedImageBuffer([image]), seed=0, size=9, grid=scale, border_overhang=3)
    batch = patches[0, np.zeros(2000, dtype=int)]["patches"]
    blocks = batch.unfold(2, 3, 3).unfold(3, 3, 3).flatten(4)
    assert (blocks == blocks[..., :1]).all()  # every block is one LR pixel
    assert set(batch[:, 0, 4, 4].tolist()) == set(image.unique().tolist())
