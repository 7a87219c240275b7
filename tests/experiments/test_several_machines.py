"""Processes on several machines: what they resume, and locks that a killed process leaves on a shared disk."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
import time

import pytest

from experiments.cli.main import main
from experiments.run import lock, resume
from experiments.run.lock import RunInUse, locked
from tests.helpers.method_contract import assert_equal, checkpoint
from tests.helpers.search_helpers import wait_for
from tests.helpers.subprocess_helpers import forked, refused, started, two_forked
from tests.tasks.reconstruction import write_reconstruction_recipe
from tests.tasks.superresolution import write_recipe

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture
def recipe(workdir, photos):
    model = {"class_path": "modules.espcn.ESPCN", "init_args": {"scale": 3, "total_images": 60}}
    return write_recipe(workdir / "tiny.yaml", photos, model)


def test_processes_with_different_folders_of_runs_are_refused(workdir, recipe):
    assert forked(main, ["fit", str(recipe), "--run", "one", "--model.total_images", "20"]) == 0
    argv = ["fit", str(recipe), "--run", "one", *TWO]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    outputs = [workdir / f"output{rank}" for rank in range(2)]
    start = time.monotonic()
    processes = [
        started([output, output], main, argv, **shared, LOCAL_RANK=str(rank), DARKROOM_RUNS=str(workdir / name))
        for rank, (name, output) in enumerate(zip(("runs", "elsewhere"), outputs, strict=True))
    ]
    for process in processes:
        process.join(timeout=60)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [2, 2]
    assert time.monotonic() - start < 60
    (error,) = [line for line in outputs[0].read_text().splitlines() if line.startswith("darkroom: ")]
    assert f"process 0 continues {workdir}/runs/tiny/one/checkpoints/last.ckpt after 20 images" in error
    assert f"but process 1 {workdir}/elsewhere/tiny/one/checkpoints/last.ckpt after 0 images" in error


def in_folder(folder, delay, argv):
    os.chdir(folder)
    resume.DISK_DELAY_S = delay
    return main(argv)


def started_job(workdir, folders, argv, delay=resume.DISK_DELAY_S):
    """Start two processes of a SLURM job with the same name for the folders of runs in two folders.

    Returns:
        The processes and the files with their outputs.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    shared |= {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "test", "DARKROOM_RUNS": "runs"}
    outputs = [workdir / f"output{rank}" for rank in range(2)]
    processes = [
        started([output, output], in_folder, folder, delay, argv, **shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank, (folder, output) in enumerate(zip(folders, outputs, strict=True))
    ]
    return processes, outputs


def ended(processes):
    """Wait for processes for a minute, and return their exit statuses."""
    for process in processes:
        process.join(timeout=60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def test_process_waits_until_its_disk_shows_the_checkpoint_of_process_0(workdir, recipe):
    """The folder of process 1 gets the checkpoint late."""
    argv = ["fit", str(recipe), "--run", "one", *TWO, "--data.test", "[]"]
    assert two_forked(main, ["fit", str(recipe), "--run", "full", *TWO, "--data.test", "[]"])[0] == [0, 0]
    assert two_forked(main, [*argv, "--model.total_images", "40"])[0] == [0, 0]
    late = workdir / "late"
    late.mkdir()
    processes, outputs = started_job(workdir, (workdir, late), argv)
    wait_for((late / "runs/tiny/one/checkpoints").is_dir)  # process 1 has opened the run
    time.sleep(3)
    shutil.copytree(workdir / "runs/tiny/one", late / "runs/tiny/one", dirs_exist_ok=True)
    assert ended(processes) == [0, 0], [output.read_text() for output in outputs]
    assert_equal(*(checkpoint(workdir, recipe, run)["state_dict"] for run in ("full", "one")))


@pytest.mark.slow
@pytest.mark.parametrize("comes", [True, False])
def test_processes_wait_for_shards_that_other_machines_have_written(workdir, comes):
    """The disk shows the shards of process 1 late, or not at all."""
    model = {"class_path": "modules.vae.VAE", "init_args": {"hidden_dims": [20], "latent_size": 3, "total_images": 60}}
    recipe = write_reconstruction_recipe(workdir / "tiny.yaml", model)
    argv = ["fit", str(recipe), "--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--data.test", "[]", "--run"]
    assert two_forked(main, [*argv, "full"])[0] == [0, 0]
    assert two_forked(main, [*argv, "one", "--model.total_images", "40"])[0] == [0, 0]
    run = workdir / "runs/tiny/one"
    (shards,) = run.glob("checkpoints/last-*.shards")
    (shards / "1.pt").rename(workdir / "1.pt")
    start = time.monotonic()
    processes, outputs = started_job(workdir, (workdir, workdir), [*argv, "one"], delay=60 if comes else 4)
    wait_for((run / ".lock-holder").exists)  # process 0 has opened the run
    if comes:
        time.sleep(3)
        (workdir / "1.pt").rename(shards / "1.pt")
        assert ended(processes) == [0, 0], [output.read_text() for output in outputs]
        assert_equal(*(checkpoint(workdir, recipe, name)["state_dict"] for name in ("full", "one")))
    else:
        assert ended(processes) == [2, 2]
        assert time.monotonic() - start > 4
        assert f"{shards.name}, the folder of its shards, has no 1.pt" in outputs[0].read_text()


def test_lock_says_which_process_holds_it(workdir, recipe, capfd, monkeypatch):
    run = workdir / "runs/tiny/one"
    run.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    with locked(run):
        monkeypatch.delenv("SLURM_JOB_ID")
        error = refused(capfd, "fit", str(recipe), "--run", "one")
    assert f"in use by another process ({os.getpid()} on {socket.gethostname()}, job 70, restart 0)" in error
    assert not (run / ".lock-holder").exists()


def hold(folder):
    with locked(folder):
        time.sleep(600)


def test_job_waits_for_a_lock_that_is_released_late(tmp_path, monkeypatch, capsys):
    """The server of a network disk releases the lock of a machine that has died after a while."""
    monkeypatch.setattr(lock, "POLL_S", 0.1)
    holder = started([tmp_path / "output"] * 2, hold, tmp_path)
    wait_for((tmp_path / ".lock-holder").exists)
    with pytest.raises(RunInUse), locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(lock, "SLURM_WAIT_S", 0.5)
    with pytest.raises(RunInUse, match=f"in use by another process .{holder.pid} on "), locked(tmp_path):
        pass
    monkeypatch.setattr(lock, "SLURM_WAIT_S", 60)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: holder.kill())
    capsys.readouterr()
    with locked(tmp_path):
        assert "waiting   for run" in capsys.readouterr().out
    holder.join()


def no_flock(*args):
    raise OSError(errno.ENOSYS, "flock is not implemented on this disk")


def hold_without_flock(folder):
    fcntl.flock = no_flock
    hold(folder)


@pytest.mark.parametrize(
    ("answer", "is_retaken"),
    [
        ("echo JobState=RUNNING Restarts=1", True),  # the next start of the job that held the lock
        ("echo JobState=COMPLETED Restarts=0", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),  # SLURM has forgotten it
        ("echo JobState=RUNNING Restarts=0", False),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", False),
    ],
)
def test_lock_of_an_ended_job_on_a_disk_without_flock_is_retaken(tmp_path, monkeypatch, answer, is_retaken):
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n[[ $* == 'show job 7' ]] || exit 9\n{answer}\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    folder = tmp_path / "run"
    folder.mkdir()
    holder = started([tmp_path / "output"] * 2, hold_without_flock, folder, SLURM_JOB_ID="7")
    wait_for((folder / ".lock-holder").exists)
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    content = (folder / ".lock").read_text()
    (folder / ".lock").write_text(content.replace(socket.gethostname(), "another-machine"))  # its processes are not known here
    monkeypatch.setattr(fcntl, "flock", no_flock)
    if is_retaken:
        with locked(folder, wait_s=0):
            assert f"({os.getpid()} on " in (folder / ".lock-holder").read_text()
    else:
        with pytest.raises(RunInUse, match=f"or remove {folder}/.lock if it has ended"), locked(folder, wait_s=0):
            pass
