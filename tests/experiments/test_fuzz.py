"""Damaged files of all kinds: each is read, or refused with a `UserError` that names it; none ends in a traceback or a hang."""

import io
import json
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from callbacks.run.csv_logger import read_metrics_csv
from callbacks.run.record_file import read_record, write_record
from datamodules.catalog.masked_image import MaskedImage, MaskSpec
from datamodules.errors import UserError
from datamodules.io.image_io import count_pages, open_image, probe_image, read_image
from datamodules.io.image_refs import ImageRef
from datamodules.io.user_images import read_info
from datamodules.io.value_range import read_levels
from experiments import METHODS
from experiments.cli.errors import one_line
from experiments.results.records import validate
from experiments.run.recipes import Recipe
from experiments.run.run_dir import Run
from experiments.run.weights_file import Description, Entry, read_description, write_weights_file
from experiments.search.samplers import examples
from experiments.search.spec import read_search
from experiments.search.worker import open_study
from modules.espcn import ESPCN
from modules.networks.weights import load_weights

SECONDS = 12  # per kind of file; nine kinds take less than two minutes
LIMIT = 20  # seconds after which reading one file counts as a hang


def pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a file as damaged disks, editors and malicious people do."""
    data = bytearray(content)
    for _ in range(pick(rng, (1, 1, 2, 5, 30))):
        place = int(rng.integers(len(data) + 1))
        kind = rng.integers(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 1 and data:
            data[place % len(data)] = pick(rng, (0, 1, 127, 128, 254, 255))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = rng.bytes(rng.integers(1, 20))
        elif kind == 4:
            data[place : place + int(rng.integers(1, 50))] = b""
        elif kind == 5:
            data[place : place + 4] = pick(rng, (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"))
        else:
            start = int(rng.integers(len(data) + 1))
            data[place:place] = data[start : start + int(rng.integers(1, 200))]
    return bytes(data)


def edit(content: bytes, rng: np.random.Generator) -> bytes:
    """Change values in a text: replace a word by another word of the text, or by a value that programs dislike."""
    words = content.decode().split(" ")
    for _ in range(pick(rng, (1, 1, 2, 4))):
        strange = [
            "null",
            "[]",
            "{}",
            "-1",
            "1e999",
            ".nan",
            "''",
            "true",
            "*a",
            "&a",
            "9" * 400,
            "\udcff",
            "\0",
            "- -",
            "2020-01-01",
        ]
        words[rng.integers(len(words))] = pick(rng, (pick(rng, words), pick(rng, strange)))
    return " ".join(words).encode("utf-8", "surrogateescape")


@contextmanager
def no_hang(label):
    def stop(*_):
        raise TimeoutError(f"{label}: not read within {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(path, contents, read, changes=(mutate,)):
    """Write changed files for `SECONDS`, and read each. Errors must be of one line and name the file."""
    rng = np.random.default_rng(0)
    refused = tried = 0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        content = pick(rng, changes)(pick(rng, contents), rng)
        path.write_bytes(content)
        tried += 1
        try:
            with no_hang(path.name):
                read(path)
        except UserError as error:
            refused += 1
            assert path.stem in str(error), error
            assert one_line(str(error)).strip()
        except Exception as error:
            path.with_suffix(".found").write_bytes(content)
            raise AssertionError(f"input {tried}, {path.with_suffix('.found')}: {type(error).__name__}: {error}") from error
    print(f"{path.name}: {tried} inputs, {refused} refused")
    assert refused > 0
    assert tried > 20


def image_files():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for mode, name, options in [
        ("RGB", "PNG", {"exif": exif}),
        ("P", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "JPEG", {"exif": exif}),
        ("CMYK", "JPEG", {}),
        ("RGB", "WEBP", {}),
        ("P", "GIF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("L", "TIFF", {}),
        ("RGB", "PPM", {}),
    ]:
        image, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
        image.save(buffer, name, **options)
        files.append(buffer.getvalue())
    buffer = io.BytesIO()
    pages = [Image.fromarray(pixels[..., 0] + i) for i in range(3)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    wide = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(wide, "PNG")
    return [*files, buffer.getvalue(), wide.getvalue()]


@pytest.mark.slow
def test_images(tmp_path):
    def read(path):
        pages = count_pages(path)
        probe_image(path, 1)
        if pages == 1:
            assert read_image(path).dtype == torch.uint8
            read_info(path, "RGB")
        for rule in ("dtype", "percentile"):
            levels = read_levels(path, rule, None if pages == 1 else pages - 1)
            assert torch.isfinite(levels.float()).all()

    fuzz(tmp_path / "image.png", image_files(), read)


@pytest.mark.slow
def test_masks(tmp_path):
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / "mask_image.png")
    image = ImageRef("set", "mask", tmp_path / "mask_image.png")
    specs = [MaskSpec(), MaskSpec(mask_format="binary"), MaskSpec(mask_format="binary", instances=True)]

    def read(path):
        for spec in specs:
            sample = MaskedImage(image, path, spec).load(1)
            assert sample.mask.shape == (40, 50)
        open_image(path)

    fuzz(tmp_path / "mask.png", image_files(), read)


@pytest.mark.slow
def test_recipes(tmp_path):
    contents = [path.read_bytes() for path in sorted(METHODS.glob("*/recipes/demo.yaml"))]

    def read(path):
        recipe = Recipe("recipe", path)
        assert isinstance(recipe.content["model"]["class_path"], str)
        assert recipe.class_path("data")
        assert isinstance(recipe.header, list)

    fuzz(tmp_path / "recipe.yaml", contents, read, (mutate, edit))


@pytest.mark.slow
def test_configurations_of_runs(tmp_path):
    run = Run(tmp_path)
    content = {"model": {"class_path": "a.B", "init_args": {"c": 1}}, "data": {"class_path": "d.E", "init_args": {}}, "seed": 0}
    fuzz(run.config, [yaml.safe_dump(content).encode()], lambda _: run.read_config(), (mutate, edit))


@pytest.mark.slow
def test_searches(tmp_path):
    sweeps = [path.read_bytes() for path in sorted((METHODS.parent.parent / "sweeps").glob("*.yaml"))]

    def read(path):
        search = read_search(path, [])
        assert all(isinstance(word, str) for example in examples(search) for word in example)
        json.loads(search.signature)

    def names_file_or_recipe(path):
        try:
            read(path)
        except UserError as error:
            if "search" not in str(error):  # the recipe that the search names
                raise UserError(f"search: {error}") from None
            raise

    fuzz(tmp_path / "search.yaml", sweeps, names_file_or_recipe, (mutate, edit))


@pytest.mark.slow
def test_records(tmp_path):
    """A changed record is refused by its checksum, or has the same content."""
    original = read_record(next(METHODS.glob("espcn/records/*.json")))
    write_record(original, tmp_path / "good.json")

    def read(path):
        record = read_record(path)
        validate(record, path)
        assert record == read_record(tmp_path / "good.json")

    fuzz(tmp_path / "record.json", [(tmp_path / "good.json").read_bytes()], read, (mutate, edit))


@pytest.mark.slow
def test_logs(tmp_path):
    rows = [b"step,images,name,value", *(f"{i},{16 * i},train/mse,{0.1 / i}".encode() for i in range(1, 60))]
    fuzz(tmp_path / "metrics.csv", [b"\n".join(rows) + b"\n"], read_metrics_csv, (mutate, edit))


@pytest.mark.slow
def test_checkpoints_and_weights(tmp_path):
    method = ESPCN()
    torch.save({"state_dict": method.state_dict(), "images_seen": 1}, tmp_path / "weights.ckpt")
    checkpoint = (tmp_path / "weights.ckpt").read_bytes()
    fuzz(tmp_path / "weights.ckpt", [checkpoint], lambda path: load_weights(method, path))
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())

    entry = Entry(class_path="modules.espcn.ESPCN", init_args={"scale": 3})
    description = Description(recipe="a", model=entry, data=entry, date="2026-11-28")
    write_weights_file(tmp_path / "weights.safetensors", ESPCN(), description)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    contents = [(tmp_path / name).read_bytes() for name in ("weights.safetensors", "plain.safetensors")]

    def read(path):
        read_description(path)
        load_weights(method, path)

    fuzz(tmp_path / "weights.safetensors", [c[:4000] + c[4000:] for c in contents], read)


@pytest.mark.slow
def test_journals(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_RUNS", str(tmp_path / "runs"))
    search = read_search(METHODS.parent.parent / "sweeps/espcn.yaml", [])
    study = open_study(search, str(tmp_path / "journal.log"))
    for _ in range(3):
        trial = study.ask()
        trial.set_user_attr("run", "a")
        study.tell(trial, 1.0)
    good = (tmp_path / "journal.log").read_bytes()

    def read(path):
        open_study(search, str(path)).get_trials(deepcopy=False)

    fuzz(tmp_path / "journal.log", [good], read, (mutate, edit))
