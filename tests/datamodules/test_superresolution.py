"""The super-resolution datamodule: bad input, streaming, resume."""

import os
import signal

import pytest
import torch
from PIL import Image, ImageFile

from datamodules.catalog.catalog import DatasetNotFound
from datamodules.errors import UserError
from datamodules.io.image_io import InvalidImage
from datamodules.io.image_refs import list_image_refs
from datamodules.superresolution import SuperResolution


@pytest.fixture
def folder(photos, tmp_path):
    """A copy of the photographs to spoil."""
    for path in photos.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def datamodule(folder, **changes):
    return SuperResolution(
        **{"scale": 3, "train": str(folder), "val_every_nth": 4, "patch_size": 11, "batch_size": 4, **changes}
    )


def test_bad_files_stop_the_run_before_it_starts(folder):
    (folder / "cut.png").write_bytes((folder / "camera0.png").read_bytes()[:3000])
    (folder / "empty.png").touch()
    Image.new("L", (20, 300)).save(folder / "narrow.png")
    data = datamodule(folder, val_every_nth=0, val="photographs/val")
    with pytest.raises(InvalidImage, match="3 of 11 pictures cannot be used") as caught:
        data.setup("fit")
    for name in ("cut.png", "empty.png", "narrow.png: 20x300 pixels, too small: at least 33x33"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_can_be_left_out_and_are_counted(folder):
    (folder / "empty.png").touch()
    data = datamodule(folder, val_every_nth=0, val="photographs/val", skip_bad=True)
    data.setup("fit")
    assert len(data.patches.store) == 8
    assert data.data_report.skipped == [f"{folder}/empty.png: empty file"]


def test_kept_pictures_are_not_trained_on(folder):
    data = datamodule(folder)
    data.setup("fit")
    kept = {picture.path.name for picture in data.val_pictures.pictures}
    assert len(kept) == 2
    assert len(data.patches.store) == 6
    assert kept.isdisjoint(picture.path.name for picture in data._split_train()[0])


def test_streaming_gives_the_same_batches_as_memory(folder):
    """With pictures of one size both draw the same picture, place and symmetry for a position."""
    for path in folder.glob("*.png"):
        Image.open(path).crop((0, 0, 45, 45)).save(path)
    loaders = []
    for streaming in (False, True):
        data = datamodule(folder, streaming=streaming, patch_size=11, border_overhang=2)
        data.setup("fit")
        loaders.append(iter(data.train_dataloader()))
    for _ in range(5):
        assert torch.equal(next(loaders[0])["patches"], next(loaders[1])["patches"])


def test_workers_change_nothing(folder):
    batches = []
    for num_workers in (0, 2):
        data = datamodule(folder, streaming=True, num_workers=num_workers)
        data.setup("fit")
        loader = iter(data.train_dataloader())
        batches.append([next(loader)["patches"] for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_another_batch_size_or_seed_is_not_the_same_run(folder):
    state = datamodule(folder).state_dict()
    with pytest.raises(UserError, match=r"data.batch_size: 8, but the checkpoint's run had 4"):
        datamodule(folder, batch_size=8).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.seed: 1, but the checkpoint's run had 0"):
        datamodule(folder, seed=1).load_state_dict(state)


def test_absent_test_sets_are_named_and_the_others_measured(folder, workplace):
    data = datamodule(folder, test=["set5", "photographs/test"])
    data.setup("test")
    assert {picture.data_set for picture in data.test_pictures.pictures} == {"photographs-test"}
    assert data.missing_sets[0].startswith("set5 is not here")
    with pytest.raises(DatasetNotFound, match="set5 is not here"):
        datamodule(folder, test=["set5"]).setup("test")


def test_a_mistyped_set_is_not_taken_for_an_absent_one(folder):
    with pytest.raises(UserError, match="did you mean 'set5'"):
        datamodule(folder, test=["set55"]).setup("test")


def test_nothing_to_choose_by_is_said(folder):
    with pytest.raises(UserError, match=r"data.val: name a set"):
        datamodule(folder, val_every_nth=0).setup("fit")


def test_fingerprints_follow_the_pixels(folder):
    data = datamodule(folder)
    data.setup("fit")
    before = data.data_report.fingerprints()
    again = datamodule(folder)
    again.setup("fit")
    assert again.data_report.fingerprints() == before
    Image.open(folder / "camera0.png").rotate(180).save(folder / "camera0.png")
    changed = datamodule(folder)
    changed.setup("fit")
    assert changed.data_report.fingerprints() != before


def test_streaming_looks_at_every_file_without_decoding_it(folder, monkeypatch):
    Image.open(folder / "camera0.png").save(folder / "whole.jpg", quality=95)
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "cut.png").write_bytes((folder / "camera0.png").read_bytes()[:3000])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    Image.new("L", (20, 300)).save(folder / "narrow.png")
    with pytest.raises(InvalidImage, match="5 of 14 pictures cannot be used") as caught:
        datamodule(folder, val_every_nth=0, val="photographs/val", streaming=True).setup("fit")
    for name in ("cut.jpg", "cut.png", "empty.png", "text.png", "narrow.png: 20x300 pixels"):
        assert name in str(caught.value)
    decoded = []
    decode = ImageFile.ImageFile.load
    data = datamodule(folder, val_every_nth=0, val="photographs/val", streaming=True, skip_bad=True)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.filename) or decode(image))
    data._setup_training()
    assert len(data.patches) == 9
    assert not any("whole" in str(name) or "camera" in str(name) for name in decoded)


def test_pictures_of_one_stem_keep_their_own_names(folder):
    for part in ("a", "b"):
        (folder / "sets" / part).mkdir(parents=True)
        (folder / "sets" / part / "1.png").write_bytes((folder / "camera0.png").read_bytes())
    (folder / "sets" / "b" / "2.png").write_bytes((folder / "camera1.png").read_bytes())
    assert [picture.name for picture in list_image_refs(str(folder / "sets"))] == ["a/1.png", "b/1.png", "2"]


def test_two_test_sets_of_one_name_are_refused(folder):
    for part in ("a", "b"):
        (folder / part / "test").mkdir(parents=True)
        (folder / part / "test" / "1.png").write_bytes((folder / "camera0.png").read_bytes())
    with pytest.raises(UserError, match="two sets would both be called test"):
        datamodule(folder, test=[str(folder / "a" / "test"), str(folder / "b" / "test")]).setup("test")


def test_keeping_none_of_few_pictures_is_refused(folder):
    with pytest.raises(UserError, match=r"data.val_every_nth: every 40th of 8 pictures is none"):
        datamodule(folder, val_every_nth=40).setup("fit")


def test_loader_workers_outlive_the_signals_that_stop_a_run(folder):
    """A scheduler signals the whole process group; the run still needs its workers to end the step."""
    data = datamodule(folder, num_workers=2)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches), next(batches)  # one of each worker
    for worker in batches._workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    for _ in range(12):  # more than was prefetched
        next(batches)
    assert all(worker.is_alive() for worker in batches._workers)
