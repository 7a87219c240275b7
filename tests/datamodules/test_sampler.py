"""Counter-based randomness, the samplers, and patches."""

import numpy as np
import pytest
import torch

from datamodules.random.philox import permutation, randint_from_words, random_words
from datamodules.sampler import InfiniteBatchSampler, RankSampler
from datamodules.superresolution import SuperResolution
from datamodules.superresolution_datasets import KERNEL_MARGIN, InMemoryPatches
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.resize import imresize


def test_draws_depend_on_position_alone():
    whole = random_words(0, "crop", 0, 100)
    assert np.array_equal(whole[37:61], random_words(0, "crop", 37, 24))
    assert not np.array_equal(whole, random_words(1, "crop", 0, 100))
    assert not np.array_equal(whole, random_words(0, "noise", 0, 100))


def test_draws_below_are_uniform():
    counts = np.bincount(randint_from_words(random_words(0, "crop", 0, 70_000)[:, 0], 7), minlength=7)
    expected = 10_000
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == 7
    assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001


def test_a_permutation_of_its_own_for_each_pass():
    first, second = (permutation(0, "order", epoch, 50) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)


def take(sampler, count):
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


def test_a_pass_holds_every_item_once_and_nothing_is_dropped():
    batches = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0), 5)
    items = np.concatenate([which for _, which in batches])
    assert sorted(items[:10]) == sorted(items[10:]) == list(range(10))


def test_a_resumed_stream_goes_on_where_it_stood():
    whole = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0), 8)
    resumed = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 12), 5)
    for (start, which), (start_again, which_again) in zip(whole[3:], resumed, strict=True):
        assert start == start_again
        assert np.array_equal(which, which_again)


def test_processes_share_a_batch_between_them():
    whole = take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0), 6)
    shares = [take(InfiniteBatchSampler(10, 4, seed=0, position=lambda: 0, rank=rank, world=2), 6) for rank in (0, 1)]
    for (start, which), left, right in zip(whole, *shares, strict=True):
        assert (left[0], right[0]) == (start, start + 2)
        assert np.array_equal(which, np.concatenate([left[1], right[1]]))


def test_evaluation_neither_repeats_nor_loses():
    shares = [list(RankSampler(7, rank, 3)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert [len(RankSampler(7, rank, 3)) for rank in range(3)] == [3, 2, 2]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (1, h, w), dtype=torch.uint8, generator=generator) for h, w in ((30, 45), (48, 33))]


@pytest.mark.parametrize("symmetry", range(8))
@pytest.mark.parametrize("corner", [(3, 6), (-6, -3), (20, 25)])
def test_patches_are_numpys_cuttings(images, symmetry, corner):
    store = RaggedImageBuffer(images)
    which = np.array([1, 0])
    top, left = (np.array([offset, offset]) for offset in corner)
    patches = store.crop_patches(which, top, left, 18, np.array([symmetry, symmetry]))
    for patch, number in zip(patches, which, strict=True):
        margin = 40
        padded = np.pad(images[number][0].numpy(), margin, mode="edge")
        expected = padded[margin + corner[0] :, margin + corner[1] :][:18, :18]
        if symmetry & 1:
            expected = np.flipud(expected)
        if symmetry & 2:
            expected = np.fliplr(expected)
        if symmetry & 4:
            expected = expected.T
        assert np.array_equal(patch[0], expected)


def test_the_eight_symmetries_differ(images):
    one = np.zeros(8, dtype=int)
    patches = RaggedImageBuffer(images).crop_patches(one, one, one, 12, np.arange(8))
    assert len({patch.numpy().tobytes() for patch in patches}) == 8


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_patchs_input_is_the_pictures_shrunk_there(scale):
    data = SuperResolution(scale, train="", patch_size=7)
    image = torch.randint(0, 256, (1, 20 * scale, 24 * scale), dtype=torch.uint8)
    low = imresize(image.float() / 255, (20, 24))
    size = (7 + 2 * KERNEL_MARGIN) * scale
    corner = np.array([3 * scale])
    patches = RaggedImageBuffer([image]).crop_patches(np.array([0]), corner, corner, size, np.array([0]))
    pair = data.prepare_train_batch(patches)
    at = 3 + KERNEL_MARGIN
    assert torch.allclose(pair["input"][0], low[:, at : at + 7, at : at + 7], atol=1e-6)
    inside = slice(at * scale, (at + 7) * scale)
    assert torch.equal(pair["target"][0], image[:, inside, inside].float() / 255)


def test_random_patches_cover_every_pixel_and_lie_on_the_grid():
    height, width, scale = 30, 36, 3
    numbered = torch.arange(height * width // 9).reshape(1, height // 3, width // 3)
    image = numbered.repeat_interleave(3, 1).repeat_interleave(3, 2).to(torch.uint8)  # a number for each LR pixel
    patches = InMemoryPatches(RaggedImageBuffer([image]), seed=0, size=9, grid=scale, border_overhang=3)
    batch = patches[0, np.zeros(2000, dtype=int)]["patches"]
    blocks = batch.unfold(2, 3, 3).unfold(3, 3, 3).flatten(4)
    assert (blocks == blocks[..., :1]).all()  # no block straddles two LR pixels
    assert set(batch[:, 0, 4, 4].tolist()) == set(image.unique().tolist())
