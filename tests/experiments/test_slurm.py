"""Jobs: what SLURM is asked for, and that a job which is told to stop is queued again and ends as if it had not been.

Where a scheduler answers, the jobs are its own; else small programs play its commands.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from experiments import ROOT
from experiments.cli.main import main
from tests.helpers.search_helpers import wait_for, write_search
from tests.helpers.subprocess_helpers import forked

PLAYED = {
    # The job's processes get what SLURM would tell them; a second `sbatch` of the same file is its next turn.
    "sbatch": 'echo 77; SLURM_JOB_ID=77 SLURM_JOB_NAME=darkroom setsid bash "${@: -1}" >> job.log 2>&1 &',
    "srun": "export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NODELIST=here SLURM_STEP_ID=0\n"
    'exec "$@"',
    "scontrol": 'echo "$@" >> scontrol.log',
}


def scheduler_answers():
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.fixture
def played(workplace, monkeypatch):
    """SLURM's commands, played."""
    folder = workplace / "bin"
    folder.mkdir()
    for name, text in PLAYED.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def printed(capfd, *words):
    assert forked(main, ["submit", *words, "--dry-run"]) == 0
    return capfd.readouterr().out


def asked(text):
    return dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", text))


def test_a_training_on_four_nodes(workplace, capfd):
    words = ["espcn/t91_x3", "--nodes", "4", "--gpus", "8", "--cores", "6", "--sbatch=--partition=a100", "--run", "x"]
    text = printed(capfd, *words, "--trainer.precision", "bf16-mixed")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    found = asked(text)
    expected = {"nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "6", "partition": "a100"}
    assert {key: found[key] for key in expected} == expected
    assert found["signal"] == "USR1@120" and "requeue" in found and found["open-mode"] == "append"
    (line,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert line.endswith(
        "-m experiments fit espcn/t91_x3 --trainer.accelerator gpu --trainer.devices 8 --trainer.num_nodes 4 "
        "--trainer.strategy ddp --run x --trainer.precision bf16-mixed"
    )
    assert f"export DARKROOM_DATA={workplace / 'data'}" in text
    assert not (workplace / "runs").exists()


def test_workers_of_a_search_are_an_array(workplace, capfd):
    text = printed(capfd, str(ROOT / "sweeps/espcn.yaml"), "--workers", "5", "--gpus", "2", "--cores", "3")
    found = asked(text)
    assert (found["array"], found["ntasks-per-node"], found["gpus-per-node"], found["cpus-per-task"]) == ("0-4", "1", "2", "6")
    assert f"-m experiments sweep {ROOT}/sweeps/espcn.yaml --trainer.devices 2" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["espcn/demo", "--nodes", "0"], "submit: --nodes 0: at least 1"),
        (["espcn/demo", "--workers", "3"], "submit: --workers is for searches, and espcn/demo is none"),
        (["espcn/demo", "--gpus", "1", "--processes", "2"], "submit: --gpus 0 or more; with GPUs there is a process for each"),
        (["espcn/demo", "--model.imags", "3"], "unknown key 'model.imags'"),
        (["espcn/dem"], "no recipe 'espcn/dem'; did you mean 'espcn/demo'?"),
        (["sweeps/espcn.yaml", "--nodes", "2"], "submit: a trial has one node"),
    ],
)
def test_mistakes_are_answered_before_they_are_queued(workplace, capfd, words, says):
    (workplace / "sweeps").symlink_to(ROOT / "sweeps")
    assert forked(main, ["submit", *words, "--dry-run"]) == 2
    assert says in capfd.readouterr().err


def test_without_slurm_it_says_so(workplace, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    assert forked(main, ["submit", "espcn/demo"]) == 2
    assert "submit: no sbatch here; --dry-run prints the file" in capfd.readouterr().err


def test_a_job_that_is_told_to_stop_is_queued_again_and_ends_as_if_it_had_not_been(played, workplace, photos, capfd):
    write_search(workplace, photos)  # and the recipe beside it
    keys = ["--model.total_images", "6000", "--val_every_images", "400"]
    assert forked(main, ["submit", "tiny.yaml", "--cores", "1", *keys]) == 0
    assert "submitted 77" in capfd.readouterr().out
    (batch,) = (workplace / "runs/slurm").glob("*.sh")
    run = workplace / "runs/tiny/77"
    wait_for(lambda: (run / "checkpoints/last.ckpt").exists())
    ours = f"experiments fit {re.escape(str(workplace))}/tiny.yaml"  # other tests train beside this one
    pids = subprocess.run(["pgrep", "-f", ours], capture_output=True, text=True).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGUSR1)
    wait_for(lambda: (workplace / "scontrol.log").exists())
    assert (workplace / "scontrol.log").read_text() == "requeue 77\n"
    assert not (run / "record.json").exists()
    assert not list(run.rglob("hpc_ckpt*"))  # Lightning's own, saved in the middle of a step
    subprocess.run(["sbatch", str(batch)], check=True)
    wait_for((run / "record.json").exists)
    assert forked(main, ["fit", "tiny.yaml", "--run", "whole", *keys]) == 0
    weights = [json.loads((workplace / f"runs/tiny/{name}/record.json").read_text())["weights"] for name in ("77", "whole")]
    assert weights[0] == weights[1]
    assert "going on with" in (workplace / "job.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not scheduler_answers(), reason="no SLURM scheduler answers here")
def test_a_real_scheduler_runs_two_processes_and_queues_them_again(workplace, photos, capfd):
    write_search(workplace, photos)
    keys = ["--model.total_images", "12000", "--val_every_images", "400"]
    assert forked(main, ["submit", "tiny.yaml", "--processes", "2", "--cores", "1", "--time", "00:20:00", *keys]) == 0
    number = re.search(r"submitted (\d+)", capfd.readouterr().out)[1]
    run = workplace / f"runs/tiny/{number}"
    wait_for(lambda: (run / "checkpoints/last.ckpt").exists())
    subprocess.run(["scancel", "--signal=USR1", number], check=True)

    def state():
        shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
        return dict(re.findall(r"(JobState|Restarts)=(\w+)", shown))

    wait_for(lambda: state()["Restarts"] == "1")
    wait_for(lambda: state()["JobState"] == "COMPLETED", seconds=280)  # SLURM waits two minutes before it begins again
    settings = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", *keys]
    command = [sys.executable, "-m", "experiments", "fit", "tiny.yaml", "--run", "whole", *settings]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    weights = [json.loads((workplace / f"runs/tiny/{name}/record.json").read_text())["weights"] for name in (number, "whole")]
    assert weights[0] == weights[1]
