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
from experiments.run import lock
from experiments.run.lock import RunInUse, locked
from tests.helpers.method_contract import assert_equal, checkpoint
from tests.helpers.search_helpers import wait_for
from tests.helpers.subprocess_helpers import forked, refused, started, two_forked
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


def in_folder(folder, argv):
    os.chdir(folder)
    return main(argv)


def test_process_waits_until_its_disk_shows_the_checkpoint_of_process_0(workdir, recipe, monkeypatch):
    """The processes have the same name for different folders; that of process 1 gets the checkpoint late."""
    argv = ["fit", str(recipe), "--run", "one", *TWO, "--data.test", "[]"]
    monkeypatch.setenv("DARKROOM_RUNS", "runs")
    assert two_forked(main, ["fit", str(recipe), "--run", "full", *TWO, "--data.test", "[]"])[0] == [0, 0]
    assert two_forked(main, [*argv, "--model.total_images", "40"])[0] == [0, 0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    shared |= {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "test"}
    late = workdir / "late"
    late.mkdir()
    outputs = [workdir / f"output{rank}" for rank in range(2)]
    processes = [
        started([output, output], in_folder, folder, argv, **shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank, (folder, output) in enumerate(zip((workdir, late), outputs, strict=True))
    ]
    wait_for((late / "runs/tiny/one/checkpoints").is_dir)  # process 1 has opened the run
    time.sleep(3)
    shutil.copytree(workdir / "runs/tiny/one", late / "runs/tiny/one", dirs_exist_ok=True)
    for process in processes:
        process.join(timeout=60)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], [output.read_text() for output in outputs]
    assert_equal(*(checkpoint(workdir, recipe, run)["state_dict"] for run in ("full", "one")))


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
