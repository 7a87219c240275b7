"""SLURM batch files, and bit-identical results of a job that is preempted and requeued.

The tests use fake SLURM commands; those of `test_real_slurm.py` use the real ones.
"""

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from experiments import ROOT
from experiments.cli.main import main
from experiments.cluster.slurm import Job, check_time
from tests.helpers.search_helpers import wait_for, write_search
from tests.helpers.subprocess_helpers import forked, two_forked
from tests.tasks.reconstruction import write_reconstruction_recipe
from tests.tasks.superresolution import write_recipe

FAKE_COMMANDS = {
    # The processes of a job get SLURM's environment variables. A second `sbatch` of the same file runs the requeued job.
    "sbatch": 'echo 77; SLURM_JOB_ID=77 SLURM_JOB_NAME=darkroom setsid bash "${@: -1}" >> job.log 2>&1 &',
    "srun": "export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NODELIST=here SLURM_STEP_ID=0\n"
    'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> scontrol.log',
}


@pytest.fixture
def fake_slurm(workdir, monkeypatch):
    """Put fake SLURM commands on the PATH."""
    folder = workdir / "bin"
    folder.mkdir()
    for name, text in FAKE_COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def dry_run(capfd, *argv):
    assert forked(main, ["submit", *argv, "--dry-run"]) == 0
    return capfd.readouterr().out


def directives(text):
    return dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", text))


def test_batch_file_requests_four_nodes_and_their_resources(workdir, capfd):
    argv = ["espcn/t91_x3", "--nodes", "4", "--gpus", "8", "--cores", "6", "--sbatch=--partition=a100", "--run", "x"]
    text = dry_run(capfd, *argv, "--trainer.precision", "bf16-mixed", "--data.batch_size", "64")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    options = directives(text)
    expected = {"nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "6", "partition": "a100"}
    assert {key: options[key] for key in expected} == expected
    assert options["signal"] == "USR1@120" and "requeue" in options and options["open-mode"] == "append"
    (line,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert line.endswith(
        "-m experiments fit espcn/t91_x3 --trainer.accelerator gpu --trainer.devices 8 --trainer.num_nodes 4 "
        "--trainer.strategy ddp --run x --trainer.precision bf16-mixed --data.batch_size 64 &"
    )
    assert f"export DARKROOM_DATA={workdir / 'data'}" in text
    assert not (workdir / "runs").exists()


def test_batch_file_states_cores_notice_and_prologue(workdir, capfd):
    argv = ["espcn/t91_x3", "--cores", "6", "--notice", "600", "--prologue", "module load cuda", "--prologue", "ulimit -n 4096"]
    text = dry_run(capfd, *argv, "--run", "x")
    assert directives(text)["signal"] == "USR1@600"
    lines = text.splitlines()
    assert {"export OMP_NUM_THREADS=6", "module load cuda", "ulimit -n 4096"} < set(lines)
    assert any(line.startswith("export SRUN_CPUS_PER_TASK=6") for line in lines)
    (command,) = (i for i, line in enumerate(lines) if line.startswith("srun --kill-on-bad-exit=1 "))
    assert lines.index("module load cuda") < lines.index("ulimit -n 4096") < command


# Whether the run asks for a requeue, whether it has saved a newer checkpoint, and what SLURM says of the job.
@pytest.mark.parametrize(
    ("asks", "saves", "state", "is_requeued"),
    [
        (True, True, "Reason=None PreemptTime=None", True),
        (True, False, "Reason=None PreemptTime=None", False),
        (True, False, "Reason=None PreemptTime=2026-01-01T00:00:00", True),
        (False, False, "Reason=None PreemptTime=2026-01-01T00:00:00", True),
        (False, True, "Reason=None PreemptTime=None", False),  # another error
    ],
)
def test_job_is_requeued_if_it_has_saved_or_was_preempted(fake_slurm, workdir, capfd, asks, saves, state, is_requeued):
    files = [name for name, given in (("REQUEUE", asks), ("PROGRESS", saves)) if given]
    (fake_slurm / "srun").write_text("\n".join(["#!/bin/bash", *(f"touch $DARKROOM_{name}_FILE" for name in files), "exit 85"]))
    (fake_slurm / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> scontrol.log\n[ $1 != show ] || echo {state}\n')
    script = dry_run(capfd, "espcn/t91_x3")
    (workdir / "runs/slurm").mkdir(parents=True)
    (workdir / "runs/slurm/progress-77").touch()  # of an earlier start, which was killed
    job = subprocess.run(["bash"], input=script, text=True, capture_output=True, env={**os.environ, "SLURM_JOB_ID": "77"})
    assert ("requeue 77" in (workdir / "scontrol.log").read_text().splitlines()) == is_requeued
    assert job.returncode == (85 if is_requeued or not asks else 1)
    assert ("Use a longer --time or --notice" in job.stderr) == (asks and not is_requeued)
    assert not list((workdir / "runs/slurm").iterdir())


@pytest.mark.parametrize(("saves", "is_requeued"), [(True, True), (False, False)])
def test_job_at_its_time_limit_is_requeued_if_it_saves(fake_slurm, workdir, capfd, saves, is_requeued):
    """SLURM sends SIGTERM to the processes and to the batch file; here, the run saves afterwards."""
    saving = "sleep 2; touch $DARKROOM_PROGRESS_FILE; " if saves else ""
    (fake_slurm / "srun").write_text(
        f"#!/bin/bash\ntrap '{saving}exit 85' TERM\ntouch trains\nfor i in {{1..300}}; do sleep 0.1; done"
    )
    (fake_slurm / "scontrol").write_text('#!/bin/bash\necho "$@" >> scontrol.log\n[ $1 != show ] || echo Reason=TimeLimit\n')
    (workdir / "runs/slurm").mkdir(parents=True)
    script = workdir / "job.sh"
    script.write_text(dry_run(capfd, "espcn/t91_x3"))
    environment = {**os.environ, "SLURM_JOB_ID": "77"}
    job = subprocess.Popen(["bash", str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for((workdir / "trains").exists)
    os.killpg(job.pid, signal.SIGTERM)
    _, error = job.communicate(timeout=60)
    assert ("requeue 77" in (workdir / "scontrol.log").read_text().splitlines()) == is_requeued
    assert ("Use a longer --time or --notice" in error) != is_requeued
    assert job.returncode == (85 if is_requeued else 1)


def is_free(port):
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_jobs_have_ports_of_their_own(fake_slurm, workdir, capfd):
    """The tasks of an array have consecutive ids, and the job of another user can use the port already."""
    (fake_slurm / "srun").write_text("#!/bin/bash\necho $MASTER_PORT\n")
    (workdir / "runs/slurm").mkdir(parents=True)
    script = dry_run(capfd, "espcn/t91_x3")

    def port(job):
        environment = {**os.environ, "SLURM_JOB_ID": str(job)}
        return int(subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment).stdout)

    jobs = [*range(4_019_990, 4_020_010), 4_029_995]  # Lightning uses the last four digits
    free = [job for job in jobs if is_free(10_000 + job % 20_000) and is_free(10_000 + (job + 1) % 20_000)]
    ports = [port(job) for job in free]
    assert len(free) > 2
    assert ports == [10_000 + job % 20_000 for job in free]
    with socket.create_server(("127.0.0.1", ports[1])):
        assert port(free[1]) not in (ports[1], None)


@pytest.mark.parametrize(("signals", "requested"), [("SIGTERM@24@0", True), ("SIGINT@24@0", False), (None, False)])
def test_stopped_run_requests_its_requeue(workdir, photos, monkeypatch, signals, requested):
    """The batch file does not depend on the status of srun, which can be that of a process that was ended with the others."""
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    recipe = write_recipe(workdir / "tiny.yaml", photos, model)
    monkeypatch.setenv("DARKROOM_REQUEUE_FILE", str(workdir / "requeue"))
    monkeypatch.setenv("DARKROOM_PROGRESS_FILE", str(workdir / "progress"))
    if signals:
        monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signals)
    assert forked(main, ["fit", str(recipe), "--run", "one", "--data.test", "[]"]) in (0, 85, 130)
    assert (workdir / "requeue").exists() == requested
    assert (workdir / "progress").exists()


def test_run_that_only_repeats_its_evaluation_has_made_no_progress(workdir, monkeypatch):
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [20], "latent_size": 3, "total_images": 40}}
    recipe = write_reconstruction_recipe(workdir / "tiny.yaml", model)
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", "SIGUSR1@test")
    monkeypatch.setenv("DARKROOM_PROGRESS_FILE", str(workdir / "progress"))
    for saves in (True, False):
        assert forked(main, ["fit", str(recipe), "--run", "one"]) == 85
        assert (workdir / "progress").exists() == saves
        (workdir / "progress").unlink(missing_ok=True)


@pytest.mark.parametrize(("signals", "requested"), [("SIGUSR1@test", True), ("SIGTERM@test", False)])
def test_evaluation_in_two_processes_requests_a_requeue_only_after_the_notice(workdir, monkeypatch, signals, requested):
    """SLURM sends SIGTERM if another process has failed; after a requeue, that process would fail again."""
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [20], "latent_size": 3, "total_images": 40}}
    recipe = write_reconstruction_recipe(workdir / "tiny.yaml", model)
    monkeypatch.setenv("DARKROOM_REQUEUE_FILE", str(workdir / "requeue"))
    monkeypatch.setenv("DARKROOM_TEST_SIGNAL", signals)
    argv = ["fit", str(recipe), "--run", "one", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert two_forked(main, argv)[0][0] == 85
    assert (workdir / "requeue").exists() == requested


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_during_imports_requests_a_requeue(workdir, name):
    command = [sys.executable, "-m", "experiments", "fit", "espcn/demo", "--run", "one"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DARKROOM_REQUEUE_FILE": str(workdir / "requeue")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())  # before the import of Lightning
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (85, f"darkroom: stopped by {name}\n")
    assert (workdir / "requeue").exists()
    assert not (workdir / "runs").exists()


def test_other_requests_for_gpus_replace_that_of_gpus_per_node(workdir, capfd):
    assert main(["submit", "espcn/t91_x3", "--dry-run", "--gpus", "8", "--cores", "6", "--sbatch=--gres=gpu:a100:8"]) == 0
    text = capfd.readouterr().out
    assert "#SBATCH --gres=gpu:a100:8" in text
    assert "gpus-per-node" not in text
    assert "#SBATCH --ntasks-per-node=8" in text


def test_values_with_spaces_are_quoted(workdir, monkeypatch, capfd):
    monkeypatch.setenv("DARKROOM_RUNS", str(workdir / "all runs"))
    argv = ["espcn/t91_x3", "--run", "my run", "--sbatch=--comment='two words'", "--sbatch=--exclusive"]
    options = directives(dry_run(capfd, *argv))
    assert shlex.split(options["output"]) == [f"{workdir}/all runs/slurm/darkroom-espcn-t91_x3-%j.log"]
    assert shlex.split(options["comment"]) == ["two words"]
    assert options["exclusive"] == ""
    assert dry_run(capfd, *argv).count("--run 'my run'") == 1


def test_datasets_that_are_not_installed_are_noted(workdir, capfd):
    """A folder may be on the disk of the node that trains."""
    words = ["--data.val", "/scratch/val", "--data.val_every_nth", "0", "--data.test", "[set5,photographs/test]"]
    assert forked(main, ["submit", "espcn/t91_x3", *words, "--dry-run"]) == 0
    assert "note      not on this machine: t91, /scratch/val, set5" in capfd.readouterr().err


def test_processes_of_a_trial_are_a_key(workdir, capfd):
    words = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    assert "--trainer.devices 2 --trainer.accelerator cpu" in dry_run(capfd, str(ROOT / "sweeps/espcn.yaml"), *words)


@pytest.mark.parametrize("time", ["30", "10:00", "24:00:00", "2-12", "2-12:30", "2-12:30:00", "1-2:5", "UNLIMITED"])
def test_time_limits_of_sbatch_are_accepted(time):
    check_time(Job(time=time))


def test_jobs_that_fit_would_refuse_are_refused(workdir, capfd):
    """ESPCN's batch has 16 patches."""
    argv = ["submit", "espcn/t91_x3", "--nodes", "4", "--gpus", "8", "--dry-run"]
    assert forked(main, argv) == 2
    assert "data.batch_size: 16 is not divisible by 32 processes" in capfd.readouterr().err
    assert forked(main, [*argv, "--data.batch_size", "32"]) == 0
    assert "each of 32 processes has one sample per step" in capfd.readouterr().err


def test_search_workers_are_array_jobs(workdir, capfd):
    storage = ["--storage", "/shared/espcn.log"]
    text = dry_run(capfd, str(ROOT / "sweeps/espcn.yaml"), "--workers", "5", "--gpus", "2", "--cores", "3", *storage)
    options = directives(text)
    assert (options["array"], options["ntasks-per-node"], options["gpus-per-node"], options["cpus-per-task"]) == (
        "0-4",
        "1",
        "2",
        "6",
    )
    assert f"-m experiments sweep {ROOT}/sweeps/espcn.yaml --storage /shared/espcn.log --trainer.devices 2" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["espcn/demo", "--nodes", "0"], "submit: --nodes 0:"),
        (["espcn/demo", "--workers", "3"], "submit: --workers"),
        (["espcn/demo", "--storage", "trials.log"], "submit: --storage"),
        (["espcn/demo", "--gpus", "1", "--processes", "2"], "submit: --gpus"),
        (["espcn/demo", "--model.imags", "3"], "unknown key 'model.imags'"),
        (["espcn/dem"], "no recipe 'espcn/dem'; did you mean 'espcn/demo'?"),
        (["sweeps/espcn.yaml", "--nodes", "2"], "submit: --nodes 2:"),
        (["sweeps/espcn.yaml", "--processes", "2"], "submit: --processes 2: not for searches. Use --trainer.devices 2"),
        (["sweeps/espcn.yaml", "--gpus", "2", "--trainer.devices", "4"], "submit: --trainer.devices: each trial uses the GPUs"),
        (["espcn/demo", "--time", "tomorrow"], "submit: --time tomorrow: not a time limit"),
        (["espcn/demo", "--trainer.devices", "2"], "submit: --trainer.devices: set by submit. Use --gpus or --processes"),
        (["espcn/demo", "--data.train", "./nowhere"], "./nowhere: no such folder"),
        (["espcn/demo", "--data.train", "t19"], "no dataset 't19'; did you mean 't91'?"),
        (["unet/folder", "--data.images", "cells", "--data.masks", "masks"], "data.images: no file or folder cells"),
    ],
)
def test_invalid_arguments_are_rejected_before_submission(workdir, capfd, argv, message):
    (workdir / "sweeps").symlink_to(ROOT / "sweeps")
    assert forked(main, ["submit", *argv, "--dry-run"]) == 2
    assert message in capfd.readouterr().err


def test_submit_without_sbatch_suggests_dry_run(workdir, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    assert forked(main, ["submit", "espcn/demo"]) == 2
    assert (error := capfd.readouterr().err).startswith("darkroom: submit: sbatch") and "--dry-run" in error


@pytest.mark.slow
def test_preempted_job_is_requeued_and_resumes_bit_identically(fake_slurm, workdir, photos, capfd):
    write_search(workdir, photos)  # also writes tiny.yaml
    overrides = ["--model.total_images", "3200", "--val_every_images", "400"]
    cores = os.environ["OMP_NUM_THREADS"]  # the same number of threads as the uninterrupted run
    assert forked(main, ["submit", "tiny.yaml", "--cores", cores, *overrides]) == 0
    assert "submitted 77" in capfd.readouterr().out
    (batch,) = (workdir / "runs/slurm").glob("*.sh")
    run = workdir / "runs/tiny/77"
    wait_for(lambda: (run / "checkpoints/last.ckpt").exists())
    pattern = f"experiments fit {re.escape(str(workdir))}/tiny.yaml"  # other tests may train at the same time
    pids = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGUSR1)
    wait_for(lambda: (workdir / "scontrol.log").exists())
    assert (workdir / "scontrol.log").read_text() == "requeue 77\n"
    assert not (run / "record.json").exists()
    assert not list(run.rglob("hpc_ckpt*"))  # the checkpoint that Lightning saves within a step
    subprocess.run(["sbatch", str(batch)], check=True)
    wait_for((run / "record.json").exists)
    assert forked(main, ["fit", "tiny.yaml", "--run", "uninterrupted", *overrides]) == 0
    weights = [
        json.loads((workdir / f"runs/tiny/{name}/record.json").read_text())["weights"] for name in ("77", "uninterrupted")
    ]
    assert weights[0] == weights[1]
    assert "resuming" in (workdir / "job.log").read_text()
