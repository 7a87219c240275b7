import functools
import hashlib
import http.server
import threading
from dataclasses import replace

import pytest

from datamodules.catalog import catalog as module
from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset, resolve_images
from datamodules.catalog.download import download
from datamodules.catalog.verify import verify
from datamodules.errors import UserError
from datamodules.io.image_io import pixel_hash


def test_every_entry_says_what_it_is_and_how_it_is_had():
    for data_set in catalog().values():
        assert data_set.title
        assert data_set.origin
        assert data_set.licence
        assert data_set.source in ("embedded", "files", "torchvision", "hand")
        assert data_set.install_hint()
        if data_set.source == "files":
            assert data_set.url.startswith("https://")
            assert all(len(whole) == 64 for _, whole in data_set.manifest().values())


def test_embedded_photographs_are_here_and_intact():
    data_set = get_dataset("photographs")
    assert data_set.status() == "here"
    assert len(resolve_images("photographs/train")) == 12
    assert len(resolve_images("photographs/test")) == 3
    assert list(verify(data_set)) == []


def test_a_mistyped_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'set14'"):
        get_dataset("sett14")
    with pytest.raises(UserError, match="has no split 'tset': train, val, test"):
        resolve_images("photographs/tset")
    with pytest.raises(UserError, match="digits is not a set of picture files"):
        resolve_images("digits")


def test_absent_data_say_how_they_are_had(workplace):
    with pytest.raises(DatasetNotFound, match=r"t91 is not here: by hand, below .*91 images"):
        resolve_images("t91")
    with pytest.raises(DatasetNotFound, match="darkroom data get bsd100"):
        resolve_images("bsd100")
    with pytest.raises(DatasetNotFound, match="no pictures for scale 3: 2, 4"):
        resolve_images("urban100", 3)


def test_a_set_that_lacks_a_file_is_not_measured(hosted):
    download(hosted)
    hosted.files()[0].unlink()
    module.catalog()["hosted"] = hosted
    try:
        with pytest.raises(DatasetNotFound, match=r"hosted has 2 of its 3 files \(darkroom data verify hosted\)"):
            resolve_images("hosted")
    finally:
        del module.catalog()["hosted"]


def test_embedded_digits_are_intact():
    assert list(verify(get_dataset("digits"))) == []


@pytest.fixture
def hosted(photos, tmp_path, monkeypatch):
    """A data set of single files on a server of this machine, with its manifest, and an empty data root."""
    monkeypatch.setattr(module, "MANIFESTS", tmp_path)
    monkeypatch.setenv("DARKROOM_DATA", str(tmp_path / "data"))
    lines = []
    for path in sorted(photos.glob("*.png"))[:3]:
        whole = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{pixel_hash(module_read(path))} {whole} {path.name}")
    (tmp_path / "hosted.txt").write_text("\n".join(lines) + "\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=photos)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield replace(
        get_dataset("bsd100"),
        name="hosted",
        url=f"http://127.0.0.1:{server.server_port}/",
        folder="Hosted",
        images="*.png",
        scales=(),
    )
    server.shutdown()


def module_read(path):
    from datamodules.io.image_io import read_image

    return read_image(path)


def test_download_with_checksums(hosted):
    assert download(hosted) == 3
    assert list(verify(hosted)) == []
    assert hosted.status() == "here"


def test_verify_names_what_differs_is_missing_is_cut_short_and_does_not_belong(hosted, photos):
    download(hosted)
    different, missing, cut = sorted(hosted.files())
    different.write_bytes(sorted(photos.glob("*.png"))[-1].read_bytes())
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:2000])
    (hosted.path / "more.png").write_bytes(different.read_bytes())
    problems = list(verify(hosted))
    assert f"{different.name}: pixels differ from the manifest's" in problems
    assert f"{missing.name}: missing" in problems
    assert any(cut.name in problem and "cut short" in problem for problem in problems)
    assert "more.png: not part of hosted" in problems
    assert len(problems) == 4
    assert download(hosted) == 3  # mends what differs, fetches what is missing
    assert list(verify(hosted)) == ["more.png: not part of hosted"]


def test_a_file_that_is_not_what_was_promised_is_refused(hosted, tmp_path):
    manifest = tmp_path / "hosted.txt"
    pixels, _, name = manifest.read_text().splitlines()[0].split()
    manifest.write_text(f"{pixels} {'0' * 64} {name}\n")
    with pytest.raises(DatasetNotFound, match=name):
        download(hosted)


def test_a_dead_host_is_named(hosted):
    with pytest.raises(DatasetNotFound, match=r"could not be fetched from http://127\.0\.0\.1:1/"):
        download(replace(hosted, url="http://127.0.0.1:1/"))


@pytest.mark.parametrize("name", ["t91", "set5", "set14", "bsds500", "bsd335094"])
def test_real_data_are_what_the_manifest_says(with_real_data, name):
    data_set = get_dataset(name)
    if not data_set.files():
        pytest.skip(f"{name} is not in DARKROOM_DATA")
    assert list(verify(data_set)) == []
