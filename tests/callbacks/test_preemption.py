"""A run that is stopped, is killed, or runs out of disk space resumes and gives the result of an uninterrupted run."""

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
from tests.tasks.generation import write_generative_recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture
def recipe(workdir, monkeypatch):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    return write_generative_recipe(
        workdir / "tiny.yaml", {"class_path": "tests.helpers.wgan_gp.WGANGP", "init_args": {"total_images": 60}}
    )


def assert_same(workdir, recipe, first_run, second_run):
    left, right = (checkpoint(workdir, recipe, run) for run in (first_run, second_run))
    for key in ("state_dict", "optimizer_states", "images_seen", "pending_losses", "global_step"):
        assert_equal(left[key], right[key], key)
    logs = [read_metrics_csv(workdir / "runs" / recipe.stem / run / "metrics.csv") for run in (first_run, second_run)]
    assert len(logs[0]) > 6
    assert logs[0] == logs[1]


def torchrun(recipe: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a run with torchrun; the rendezvous id becomes the name of the run."""
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
        pytest.param("SIGTERM@24@0", id="rank 0 in training", marks=pytest.mark.slow),
        pytest.param("SIGTERM@24@0 SIGTERM@28@1", id="both ranks in training", marks=pytest.mark.slow),
        pytest.param("SIGTERM@validation@1", id="rank 1 in validation", marks=pytest.mark.slow),
        pytest.param("SIGTERM@validation@0 SIGTERM@validation@1", id="both ranks in validation", marks=pytest.mark.slow),
        pytest.param("SIGTERM@saving@0", id="rank 0 while saving", marks=pytest.mark.slow),
        pytest.param("SIGTERM@saving@1", id="rank 1 while waiting for rank 0", marks=pytest.mark.slow),
    ],
)
def test_torchrun_with_two_ranks_resumes_after_sigterm(workdir, recipe, monkeypatch, signals):
    assert two_forked(fit, recipe, "--run", "full", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signals)
    completed = torchrun(recipe, "resumed")
    assert completed.returncode == 1, completed.stderr  # exit status of torchrun; its report contains that of rank 0
    assert "exitcode  : 85" in completed.stderr
    assert completed.stdout.count("Stopped and saved") == 1
    assert checkpoint(workdir, recipe, "resumed")["images_seen"] < 60
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    completed = torchrun(recipe, "resumed")
    assert completed.returncode == 0, completed.stderr
    assert_same(workdir, recipe, "full", "resumed")


def test_two_ranks_resume_after_sigterm(workdir, recipe, monkeypatch):
    assert two_forked(fit, recipe, "--run", "full", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0 SIGTERM@28@1")
    statuses, output = two_forked(fit, recipe, "--run", "resumed", *TWO)
    assert statuses[0] == 85, output
    assert output.count("Stopped and saved") == 1
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert two_forked(fit, recipe, "--run", "resumed", *TWO)[0] == [0, 0]
    assert_same(workdir, recipe, "full", "resumed")


@pytest.mark.slow
def test_torchrun_restarts_and_resumes_after_a_rank_is_killed(workdir, recipe, monkeypatch):
    assert two_forked(fit, recipe, "--run", "full", *TWO)[0] == [0, 0]
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGKILL@24@1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    completed = torchrun(recipe, "resumed", "--max-restarts", "1")
    assert completed.returncode == 0, completed.stderr
    assert "after 20 images" in completed.stdout
    assert_same(workdir, recipe, "full", "resumed")


@pytest.mark.slow
def test_rank_1_exits_if_rank_0_is_killed_before_the_rendezvous(recipe):
    command = [sys.executable, "-m", "experiments", "fit", str(recipe), "--run", "orphan", *TWO]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    second = ["pgrep", "-P", str(first.pid), "-f", "fit"]
    wait_for(lambda: subprocess.run(second, capture_output=True).stdout)
    maps = Path("/proc", subprocess.check_output(second, text=True).strip(), "maps")
    wait_for(lambda: "libtorch" in maps.read_text())  # before the import of Lightning
    first.kill()
    output, _ = first.communicate(timeout=90)  # until all writers have exited
    assert output.splitlines()[-1].startswith("darkroom: rank 1 exits")


@pytest.mark.slow
def test_run_resumes_after_twenty_kills_at_random_times(workdir, recipe):
    arguments = ["fit", str(recipe), "--model.total_images", "3600", "--val_every_images", "40", "--data.num_workers", "1"]
    start = time.monotonic()
    assert forked(main, [*arguments, "--run", "full"]) == 0
    full = time.monotonic() - start
    streams = [workdir / "stdout.txt", workdir / "stderr.txt"]
    last = workdir / "runs/tiny/resumed/checkpoints/last.ckpt"
    generator = np.random.default_rng(0)
    images_seen: list[int] = []
    first = 0.0  # seconds from the start to a checkpoint
    for i in range(20):
        start, before = time.monotonic(), last.stat().st_mtime if i else 0
        child = started(streams, main, [*arguments, "--run", "resumed"])
        if i % 2:  # kill it during startup
            time.sleep(generator.uniform(0.05, 0.8) * first)
        else:  # kill it during training, validation or saving
            wait_for(lambda before=before: last.exists() and last.stat().st_mtime > before)
            first = time.monotonic() - start
            time.sleep(generator.uniform(0, full / 30))
        assert child.is_alive(), streams[1].read_text()
        child.kill()
        child.join()
        images_seen.append(checkpoint(workdir, recipe, "resumed")["images_seen"])  # the file must be readable
    assert images_seen == sorted(images_seen)
    assert images_seen[0] < images_seen[-1] < 3600
    print("images in the checkpoint after each kill:", *images_seen)
    assert forked(main, [*arguments, "--run", "resumed"]) == 0
    assert_same(workdir, recipe, "full", "resumed")


def run_with_file_size_limit(arguments: list[str], size: int) -> int:
    """Run a command that cannot write files larger than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails without a signal, as for an exceeded quota
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main(arguments)


def test_failed_write_is_reported_in_one_line_and_keeps_the_previous_checkpoint(workdir, recipe, monkeypatch, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "full"]) == 0
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0")
    assert forked(main, ["fit", str(recipe), "--run", "resumed"]) == 85
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    before = checkpoint(workdir, recipe, "resumed")
    capfd.readouterr()
    assert forked(run_with_file_size_limit, ["fit", str(recipe), "--run", "resumed"], 200_000) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("darkroom: ")]
    assert str(workdir / "runs/tiny/resumed") in error
    assert_equal(checkpoint(workdir, recipe, "resumed")["state_dict"], before["state_dict"])
    assert forked(main, ["fit", str(recipe), "--run", "resumed"]) == 0
    assert_equal(*(checkpoint(workdir, recipe, run)["state_dict"] for run in ("full", "resumed")))


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of 300 MB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300M", "tmpfs", str(mount_point)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_full_disk_is_reported_in_one_line_and_the_run_resumes(workdir, recipe, disk, monkeypatch, capfd):
    assert forked(main, ["fit", str(recipe), "--run", "full"]) == 0
    monkeypatch.setenv("DARKROOM_RUNS", str(disk))
    capfd.readouterr()
    assert (
        forked(main, ["fit", str(recipe), "--run", "resumed", "--trainer.callbacks+=tests.helpers.probe_callbacks.FillsDisk"])
        == 2
    )
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("darkroom: ")]
    assert str(disk / "tiny/resumed") in error
    assert "No space left on device" in error
    saved = torch.load(disk / "tiny/resumed/checkpoints/last.ckpt", weights_only=True)
    assert saved["images_seen"] == 20
    (disk / "ballast").unlink()
    assert forked(main, ["fit", str(recipe), "--run", "resumed"]) == 0
    shutil.copytree(disk / "tiny/resumed", workdir / "runs/tiny/resumed")
    assert_same(workdir, recipe, "full", "resumed")


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a W&B file.

    The file is a LevelDB log with blocks of 32 KiB. A header with CRC, length and kind precedes each chunk.
    """
    content = path.read_bytes()
    offset, chunks = 7, b""  # after W&B's header
    while offset + 7 <= len(content):
        if (rest := 2**15 - offset % 2**15) < 7:
            offset += rest
            continue
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        chunks += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a full record, or the last chunk of a record
            yield Record.FromString(chunks)
            chunks = b""


def sent_to_wandb(run: Path) -> tuple[set[str], list[dict[str, float]]]:
    """Return the W&B ids of a run, and the concatenated history of its segments."""
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
def test_resumed_run_sends_each_metric_to_wandb_once(workdir, recipe, monkeypatch):
    arguments = ["fit", str(recipe), "--wandb", "offline", "--data.test", "[]"]
    assert launched(*arguments, "--run", "full").returncode == 0
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGTERM@24@0")
    assert launched(*arguments, "--run", "resumed").returncode == 85
    monkeypatch.delenv("DARKROOM_TEST_SIGNAL")
    assert launched(*arguments, "--run", "resumed").returncode == 0
    (_, full), (names, resumed) = (sent_to_wandb(workdir / "runs/tiny" / run) for run in ("full", "resumed"))
    assert names == {"tiny-resumed"}
    steps = [row["trainer/global_step"] for row in full]
    assert steps == sorted(steps)
    assert len(set(steps)) == 15
    assert resumed == full
