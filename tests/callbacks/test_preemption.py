"""Runs that are stopped, killed, or find no room to write: none is lost, and each ends as if nothing had happened."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from wandb.proto.wandb_internal_pb2 import Record

from callbacks.run.csv_logger import read_metrics_csv
from experiments import ROOT
from experiments.cli.main import main
from tests.helpers.method_contract import assert_equal, checkpoint, fit
from tests.helpers.search_helpers import wait_for
from tests.helpers.subprocess_helpers import forked, launched, started, two_forked
from tests.helpers.tiny_recipes import write_generative_recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture
def recipe(workplace, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workplace / "cache"))
    return write_generative_recipe(
        workplace / "tiny.yaml", {"class_path": "tests.helpers.wgan_gp.WGANGP", "init_args": {"total_images": 60}}
    )


def assert_same(workplace, recipe, one, other):
    left, right = (checkpoint(workplace, recipe, run) for run in (one, other))
    for key in ("state_dict", "optimizer_states", "images_seen", "pending_losses", "global_step"):
        assert_equal(left[key], right[key], key)
    logs = [read_metrics_csv(workplace / "runs" / recipe.stem / run / "metrics.csv") for run in (one, other)]
    assert len(logs[0]) > 6
    assert logs[0] == logs[1]


def torchrun(recipe: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The run is named by torchrun's own name."""
    command = [
        *TORCHRUN,
        *options,
        "--rdzv-endpoint",
        "localhost:0",
        "--rdzv-id",
        name,
        "-m",
        "experiments",
        "fit",
        str(recipe),
        *TWO,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param("SIGTERM@24@0", id="to one in training", marks=pytest.mark.slow),
        pytest.param("SIGTERM@24@0 SIGTERM@28@1", id="to both in training"),
        pytest.param("SIGTERM@validation@1", id="to one in validation", marks=pytest.mark.slow),
        pytest.param("SIGTERM@validation@0 SIGTERM@validation@1", id="to both in validation", marks=pytest.mark.slow),
        pytest.param("SIGTERM@saving@0", id="to the one that saves", marks=pytest.mark.slow),
        pytest.param("SIGTERM@saving@1", id="to the one that waits for it", marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_torchrun_are_stopped_and_the_same_command_goes_on(workplace, recipe, monkeypatch, signals):
    assert two_forked(fit, recipe, "--run", "whole", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signals)
    ended = torchrun(recipe, "broken")
    assert ended.returncode == 1, ended.stderr  # torchrun's own; the first process's is in its report
    assert "exitcode  : 85" in ended.stderr
    assert ended.stdout.count("nothing is lost") == 1
    assert checkpoint(workplace, recipe, "broken")["images_seen"] < 60
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    ended = torchrun(recipe, "broken")
    assert ended.returncode == 0, ended.stderr
    assert_same(workplace, recipe, "whole", "broken")


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again_and_the_run_goes_on(workplace, recipe, monkeypatch):
    assert two_forked(fit, recipe, "--run", "whole", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGKILL@24@1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    ended = torchrun(recipe, "broken", "--max-restarts", "1")
    assert ended.returncode == 0, ended.stderr
    assert "after 20 images" in ended.stdout
    assert_same(workplace, recipe, "whole", "broken")


@pytest.mark.slow
def test_a_process_whose_first_is_killed_before_they_meet_does_not_wait_for_it(recipe):
    command = [sys.executable, "-m", "experiments", "fit", str(recipe), "--run", "orphan", *TWO]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    second = ["pgrep", "-P", str(first.pid), "-f", "fit"]
    wait_for(lambda: subprocess.run(second, capture_output=True).stdout)
    maps = Path("/proc", subprocess.check_output(second, text=True).strip(), "maps")
    wait_for(lambda: "libtorch" in maps.read_text())  # it is about to import Lightning
    first.kill()
    said, _ = first.communicate(timeout=90)  # until nobody is left who could write
    assert said.endswith("darkroom: process 1 ends: the first of its run is gone\n")


@pytest.mark.slow
def test_twenty_kills_at_any_moment_lose_no_run(workplace, recipe):
    words = ["fit", str(recipe), "--model.total_images", "3600", "--val_every_images", "40", "--data.num_workers", "1"]
    began = time.monotonic()
    assert forked(main, [*words, "--run", "whole"]) == 0
    whole = time.monotonic() - began
    streams = [workplace / "stdout.txt", workplace / "stderr.txt"]
    last = workplace / "runs/tiny/broken/checkpoints/last.ckpt"
    moments = np.random.default_rng(0)
    kept: list[int] = []
    first = 0.0  # seconds from the start to a checkpoint
    for number in range(20):
        began, before = time.monotonic(), last.stat().st_mtime if number else 0
        child = started(streams, main, [*words, "--run", "broken"])
        if number % 2:  # while it starts
            time.sleep(moments.uniform(0.05, 0.8) * first)
        else:  # while it trains, validates, saves
            wait_for(lambda before=before: last.exists() and last.stat().st_mtime > before)
            first = time.monotonic() - began
            time.sleep(moments.uniform(0, whole / 30))
        assert child.is_alive(), streams[1].read_text()
        child.kill()
        child.join()
        kept.append(checkpoint(workplace, recipe, "broken")["images_seen"])  # it can be read
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] < 3600
    print("images in the checkpoint after each kill:", *kept)
    assert forked(main, [*words, "--run", "broken"]) == 0
    assert_same(workplace, recipe, "whole", "broken")


def limited(words: list[str], size: int) -> int:
    """A command that cannot write a file of more bytes than these."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a failed write, as of a full quota, and no signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main(words)


def test_a_write_that_fails_is_said_in_one_line_and_leaves_the_checkpoint_before_it(workplace, recipe, monkeypatch, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "whole"]) == 0
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0")
    assert forked(main, ["fit", str(recipe), "--run", "broken"]) == 85
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    before = checkpoint(workplace, recipe, "broken")
    capfd.readouterr()
    assert forked(limited, ["fit", str(recipe), "--run", "broken"], 200_000) == 2
    (complaint,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("darkroom: ")]
    assert str(workplace / "runs/tiny/broken") in complaint
    assert_equal(checkpoint(workplace, recipe, "broken")["state_dict"], before["state_dict"])
    assert forked(main, ["fit", str(recipe), "--run", "broken"]) == 0
    assert_equal(*(checkpoint(workplace, recipe, run)["state_dict"] for run in ("whole", "broken")))


@pytest.fixture
def disk(tmp_path):
    """A disk of 300 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300M", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_up_is_said_in_one_line_and_no_run_is_lost(workplace, recipe, disk, monkeypatch, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "whole"]) == 0
    monkeypatch.setenv("DARKROOM_RUNS", str(disk))
    capfd.readouterr()
    assert (
        forked(main, ["fit", str(recipe), "--run", "broken", "--trainer.callbacks+=tests.helpers.probe_callbacks.FillsDisk"])
        == 2
    )
    (complaint,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("darkroom: ")]
    assert str(disk / "tiny/broken") in complaint
    assert "No space left on device" in complaint
    kept = torch.load(disk / "tiny/broken/checkpoints/last.ckpt", weights_only=True)
    assert kept["images_seen"] == 20
    (disk / "ballast").unlink()
    assert forked(main, ["fit", str(recipe), "--run", "broken"]) == 0
    shutil.copytree(disk / "tiny/broken", workplace / "runs/tiny/broken")
    assert_same(workplace, recipe, "whole", "broken")


def records(path: Path) -> Iterator[Record]:
    """What W&B wrote for its server: a LevelDB log (blocks of 32 KiB; crc, length and kind before each chunk)."""
    content = path.read_bytes()
    at, parts = 7, b""  # after W&B's own mark
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last chunk
            yield Record.FromString(parts)
            parts = b""


def sent_to_wandb(run: Path) -> tuple[set[str], list[dict[str, float]]]:
    """Names of the run there, and its history, of all its parts in their order."""
    names, history = set(), []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                names.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                history.append(
                    {name: value for name, value in row.items() if not name.startswith("_") and not name.endswith("/filenames")}
                )
    return names, history


@pytest.mark.slow
def test_wandb_gets_every_figure_once_when_a_run_is_stopped(workplace, recipe, monkeypatch):
    words = ["fit", str(recipe), "--wandb", "offline", "--data.test", "[]"]
    assert launched(*words, "--run", "whole").returncode == 0
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0")
    assert launched(*words, "--run", "broken").returncode == 85
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert launched(*words, "--run", "broken").returncode == 0
    (_, whole), (names, broken) = (sent_to_wandb(workplace / "runs/tiny" / run) for run in ("whole", "broken"))
    assert names == {"tiny-broken"}
    steps = [row["trainer/global_step"] for row in whole]
    assert steps == sorted(steps)
    assert len(set(steps)) == 15
    assert broken == whole
