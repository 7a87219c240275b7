"""The super-resolution datamodule: unusable files, streaming and resuming."""

import os
import signal

import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms.v2.functional import gaussian_blur

from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import list_image_refs
from datamodules.superresolution import SuperResolution
from datamodules.transforms.resize import imresize


@pytest.fixture
def folder(photos, tmp_path):
    """Return a folder with writable copies of the photographs."""
    for path in photos.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def datamodule(folder, **options):
    return SuperResolution(
        **{"scale": 3, "train": str(folder), "val_every_nth": 4, "patch_size": 11, "batch_size": 4, **options}
    )


def test_unusable_files_raise_in_setup(folder):
    (folder / "truncated.png").write_bytes((folder / "camera0.png").read_bytes()[:3000])
    (folder / "empty.png").touch()
    Image.new("L", (20, 300)).save(folder / "narrow.png")
    data = datamodule(folder, val_every_nth=0, val="photographs/val")
    with pytest.raises(InvalidImage, match="3 of 11 images") as raised:
        data.setup("fit")
    for name in ("truncated.png", "empty.png", "narrow.png: 20x300", "33x33"):
        assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_skip_bad_skips_and_reports_unusable_files(folder):
    (folder / "empty.png").touch()
    data = datamodule(folder, val_every_nth=0, val="photographs/val", skip_bad=True)
    data.setup("fit")
    assert len(data.patches.image_buffer) == 8
    assert data.data_report.skipped == [f"{folder}/empty.png: empty file"]


def test_holdout_images_are_not_in_training_set(folder):
    data = datamodule(folder)
    data.setup("fit")
    holdout = {ref.path.name for ref in data.val_images.refs}
    assert len(holdout) == 2
    assert len(data.patches.image_buffer) == 6
    assert holdout.isdisjoint(ref.path.name for ref in data._split_train()[0])


def test_streaming_yields_the_same_batches_as_in_memory_loading(folder):
    """For images of equal size, each sample has the same image, position and symmetry."""
    for path in folder.glob("*.png"):
        Image.open(path).crop((0, 0, 45, 45)).save(path)
    loaders = []
    for streaming in (False, True):
        data = datamodule(folder, streaming=streaming, patch_size=11, border_overhang=2)
        data.setup("fit")
        loaders.append(iter(data.train_dataloader()))
    for _ in range(5):
        assert torch.equal(next(loaders[0])["patches"], next(loaders[1])["patches"])


def test_batches_do_not_depend_on_num_workers(folder):
    batches = []
    for num_workers in (0, 2):
        data = datamodule(folder, streaming=True, num_workers=num_workers)
        data.setup("fit")
        loader = iter(data.train_dataloader())
        batches.append([next(loader)["patches"] for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_resume_with_other_batch_size_or_seed_raises(folder):
    state = datamodule(folder).state_dict()
    with pytest.raises(UserError, match=r"data\.batch_size: 8, .* 4"):
        datamodule(folder, batch_size=8).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.seed: 1, .* 0"):
        datamodule(folder, seed=1).load_state_dict(state)


def test_absent_test_sets_are_reported_and_skipped(folder, workdir):
    data = datamodule(folder, test=["set5", "photographs/test"])
    data.setup("test")
    assert {ref.dataset for ref in data.test_images.refs} == {"photographs-test"}
    assert data.missing_sets["set5"].startswith("set5 ")
    with pytest.raises(DatasetNotFound, match="set5 "):
        datamodule(folder, test=["set5"]).setup("test")


def test_unknown_test_set_raises(folder):
    with pytest.raises(UserError, match="did you mean 'set5'"):
        datamodule(folder, test=["set55"]).setup("test")


def test_missing_validation_images_raise(folder):
    with pytest.raises(UserError, match=r"data\.val: "):
        datamodule(folder, val_every_nth=0).setup("fit")


def test_fingerprints_depend_on_pixels(folder):
    data = datamodule(folder)
    data.setup("fit")
    before = data.data_report.fingerprints()
    same = datamodule(folder)
    same.setup("fit")
    assert same.data_report.fingerprints() == before
    Image.open(folder / "camera0.png").rotate(180).save(folder / "camera0.png")
    changed = datamodule(folder)
    changed.setup("fit")
    assert changed.data_report.fingerprints() != before


def test_streaming_validates_files_without_decoding(folder, monkeypatch):
    Image.open(folder / "camera0.png").save(folder / "complete.jpg", quality=95)
    jpeg_bytes = (folder / "complete.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg_bytes[: len(jpeg_bytes) // 2])
    (folder / "truncated.png").write_bytes((folder / "camera0.png").read_bytes()[:3000])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    Image.new("L", (20, 300)).save(folder / "narrow.png")
    with pytest.raises(InvalidImage, match="5 of 14 images") as raised:
        datamodule(folder, val_every_nth=0, val="photographs/val", streaming=True).setup("fit")
    for name in ("truncated.jpg", "truncated.png", "empty.png", "text.png", "narrow.png: 20x300"):
        assert name in str(raised.value)
    decoded = []
    decode = ImageFile.ImageFile.load
    data = datamodule(folder, val_every_nth=0, val="photographs/val", streaming=True, skip_bad=True)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.filename) or decode(image))
    data._setup_training()
    assert len(data.patches) == 9
    assert not any("complete" in str(name) or "camera" in str(name) for name in decoded)


def test_images_with_equal_stems_have_unique_names(folder):
    for name in ("a", "b"):
        (folder / "sets" / name).mkdir(parents=True)
        (folder / "sets" / name / "1.png").write_bytes((folder / "camera0.png").read_bytes())
    (folder / "sets" / "b" / "2.png").write_bytes((folder / "camera1.png").read_bytes())
    assert [ref.name for ref in list_image_refs(str(folder / "sets"))] == ["a/1.png", "b/1.png", "2"]


def test_test_sets_with_equal_names_raise(folder):
    for name in ("a", "b"):
        (folder / name / "test").mkdir(parents=True)
        (folder / name / "test" / "1.png").write_bytes((folder / "camera0.png").read_bytes())
    with pytest.raises(UserError, match=r"data\.test: .* test"):
        datamodule(folder, test=[str(folder / "a" / "test"), str(folder / "b" / "test")]).setup("test")


def test_empty_holdout_raises(folder):
    with pytest.raises(UserError, match=r"data\.val_every_nth: .*40.* 8 "):
        datamodule(folder, val_every_nth=40).setup("fit")


def test_loader_workers_ignore_stop_signals(folder):
    """A scheduler signals the whole process group. The main process requires its workers to finish the step."""
    data = datamodule(folder, num_workers=2)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches), next(batches)  # one from each worker
    for worker in batches._workers:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, signum)
    for _ in range(12):  # more than the prefetched batches
        next(batches)
    assert all(worker.is_alive() for worker in batches._workers)


@pytest.mark.parametrize(("scale", "blur"), [(2, 0.6), (3, 2.5), (4, 1.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_are_blurred_with_reflection_at_the_border_of_whole_patches(folder, scale, blur, channels):
    """The border of the blur, which is not reflected, is in the margin."""
    data = datamodule(folder, scale=scale, blur=blur, channels=channels)
    data.setup("fit")
    patches = next(iter(data.train_dataloader()))["patches"]
    batch = data.prepare_train_batch({"patches": patches})
    whole = patches.float() / 255
    radius = int(-(-3 * blur // 1))
    blurred = gaussian_blur(whole, [2 * radius + 1] * 2, [blur] * 2)
    margin, size = data.margin, 11 + 2 * data.margin
    expected = imresize(blurred, (size, size))[..., margin:-margin, margin:-margin]
    assert torch.allclose(batch["input"], expected, rtol=0, atol=1e-6)
    assert torch.equal(batch["target"], whole[..., scale * margin : -scale * margin, scale * margin : -scale * margin])
