import functools
import hashlib
import http.server
import re
import threading
from dataclasses import replace

import pytest
from torchvision import datasets

from datamodules.catalog import catalog as module
from datamodules.catalog.catalog import DatasetNotFound, catalog, get_dataset, resolve_images
from datamodules.catalog.download import download, download_torchvision, torchvision_files
from datamodules.catalog.verify import verify
from datamodules.errors import UserError
from datamodules.io.image_io import pixel_hash


def test_every_entry_has_metadata_and_install_hint():
    for dataset in catalog().values():
        assert dataset.title
        assert dataset.origin
        assert dataset.license
        assert dataset.source in ("embedded", "files", "torchvision", "hand")
        assert dataset.install_hint()
        if dataset.source == "files":
            assert dataset.url.startswith("https://")
            assert all(len(file_hash) == 64 for _, file_hash in dataset.manifest().values())


def test_embedded_photographs_are_installed_and_pass_verify():
    dataset = get_dataset("photographs")
    assert dataset.status() == "installed"
    assert len(resolve_images("photographs/train")) == 12
    assert len(resolve_images("photographs/test")) == 3
    assert list(verify(dataset)) == []


def test_unknown_names_and_splits_raise_with_suggestions():
    with pytest.raises(UserError, match="did you mean 'set14'"):
        get_dataset("sett14")
    with pytest.raises(UserError, match=r"photographs .*'tset'.* train, val, test"):
        resolve_images("photographs/tset")
    with pytest.raises(UserError, match="digits"):
        resolve_images("digits")


def test_absent_datasets_raise_with_install_hint(workdir):
    with pytest.raises(DatasetNotFound, match=r"t91 .*manually, in .*91 images"):
        resolve_images("t91")
    with pytest.raises(DatasetNotFound, match="darkroom data get bsd100"):
        resolve_images("bsd100")
    with pytest.raises(DatasetNotFound, match=r"urban100 .*scale 3.* 2, 4"):
        resolve_images("urban100", 3)


def test_incomplete_dataset_raises(hosted):
    download(hosted)
    hosted.files()[0].unlink()
    module.catalog()["hosted"] = hosted
    try:
        with pytest.raises(DatasetNotFound, match=r"hosted .*2 of its 3 files \(darkroom data verify hosted\)"):
            resolve_images("hosted")
    finally:
        del module.catalog()["hosted"]


def test_embedded_digits_pass_verify():
    assert list(verify(get_dataset("digits"))) == []


@pytest.fixture
def hosted(photos, tmp_path, monkeypatch):
    """Yield a dataset of single files on a local HTTP server, with a manifest and an empty data root."""
    monkeypatch.setattr(module, "MANIFESTS", tmp_path)
    monkeypatch.setenv("DARKROOM_DATA", str(tmp_path / "data"))
    lines = []
    for path in sorted(photos.glob("*.png"))[:3]:
        file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{pixel_hash(read_image_file(path))} {file_hash} {path.name}")
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


def read_image_file(path):
    from datamodules.io.image_io import read_image

    return read_image(path)


def test_download_passes_verify(hosted):
    assert download(hosted) == 3
    assert list(verify(hosted)) == []
    assert hosted.status() == "installed"


def test_verify_reports_changed_missing_truncated_and_unknown_files(hosted, photos):
    download(hosted)
    changed, missing, truncated = sorted(hosted.files())
    changed.write_bytes(sorted(photos.glob("*.png"))[-1].read_bytes())
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (hosted.path / "more.png").write_bytes(changed.read_bytes())
    problems = list(verify(hosted))
    assert f"{changed.name}: pixels differ from the manifest" in problems
    assert f"{missing.name}: missing" in problems
    assert any(truncated.name in problem and "truncated" in problem for problem in problems)
    assert "more.png: not part of hosted" in problems
    assert len(problems) == 4
    assert download(hosted) == 3  # replaces changed files and downloads missing ones
    assert list(verify(hosted)) == ["more.png: not part of hosted"]


@pytest.fixture
def immediate_retries(monkeypatch):
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)


def test_download_with_wrong_checksum_raises(hosted, tmp_path, immediate_retries):
    manifest = tmp_path / "hosted.txt"
    pixels, _, name = manifest.read_text().splitlines()[0].split()
    manifest.write_text(f"{pixels} {'0' * 64} {name}\n")
    with pytest.raises(DatasetNotFound, match=name):
        download(hosted)


def test_unreachable_host_is_named_in_error(hosted, immediate_retries):
    with pytest.raises(
        DatasetNotFound, match=r"hosted.*http://127\.0\.0\.1:1/.*save the file as \S+Hosted/\S+\.png \(sha256 \w{64}\)"
    ):
        download(replace(hosted, url="http://127.0.0.1:1/"))


@pytest.mark.parametrize("name", ["t91", "set5", "set14", "bsds500", "bsd335094"])
def test_real_datasets_match_their_manifests(with_real_data, name):
    dataset = get_dataset(name)
    if not dataset.files():
        pytest.skip(f"{name} is not in DARKROOM_DATA")
    assert list(verify(dataset)) == []


def test_files_of_torchvision_have_addresses_and_checksums():
    """A user without a connection can download them elsewhere."""
    names = [name for name, entry in catalog().items() if entry.source == "torchvision"]
    assert {"mnist", "cifar10", "celeba"} <= set(names)
    for name in names:
        files = torchvision_files(name)
        assert files, name
        assert all("https://" in address or "http://" in address for address, _ in files), name
        assert all(re.fullmatch("[0-9a-f]{32}", md5) for _, md5 in files), name


def test_failed_download_names_address_folder_and_checksum(workdir, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("Error downloading a.gz:\nTried http://127.0.0.1, got:\n<urlopen error>\n")

    monkeypatch.setattr(datasets.MNIST, "__init__", fail)
    with pytest.raises(DatasetNotFound, match=r"Error downloading a\.gz: .*data/MNIST/raw: https?://\S+\.gz \(md5 \w{32}\)"):
        download_torchvision("mnist")
    monkeypatch.setattr(datasets.CelebA, "__init__", fail)
    monkeypatch.setattr("datamodules.catalog.download.find_spec", lambda name: None)
    with pytest.raises(DatasetNotFound, match=r"requires the package gdown\. Run pip install gdown"):
        download_torchvision("celeba")
    monkeypatch.setattr("datamodules.catalog.download.find_spec", lambda name: name)
    with pytest.raises(
        DatasetNotFound, match=r"celeba: img_align_celeba\.zip of https://drive\.google\.com/\S+ \(md5 \w{32}\)"
    ):
        download_torchvision("celeba")
