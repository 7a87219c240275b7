"""Jobs of `darkroom submit` under the real SLURM, with two nodes on this machine.

Each ends with the weights of an uninterrupted run of as many processes, without SLURM.
"""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from experiments.cli.main import main
from tests.helpers import slurm_cluster
from tests.helpers.method_contract import assert_equal
from tests.helpers.search_helpers import LEARNING_RATES, trials_of, wait_for, write_search
from tests.helpers.subprocess_helpers import forked, two_forked

REASON = slurm_cluster.unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=f"no SLURM: {REASON}")]

STEPS = ["--model.total_images", "120", "--val_every_images", "40"]  # 30 steps of 4 images
SLEEP = ["--trainer.callbacks+=tests.helpers.probe_callbacks.SleepsAfterSteps"]
TWO_NODES = ["--nodes", "2", "--cores", "1"]


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm_cluster.cluster(Path(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, photos):
    """Change to a folder with a recipe and a search, which also contains the runs of all tests."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("runs", "data", "cache"):
            patch.setenv(f"DARKROOM_{name.upper()}", str(folder / name))
        write_search(folder, photos)
        yield folder


@pytest.fixture(scope="module")
def two_processes(workdir):
    """Train without interruption in two processes."""
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert two_forked(main, ["fit", "tiny.yaml", "--run", "uninterrupted", *STEPS, *two])[0] == [0, 0]
    return "uninterrupted"


def assert_same(workdir, first, second):
    """Assert that two runs have the same weights, optimizer states and best weights."""
    for name in ("last.ckpt", "best.ckpt"):
        left, right = (
            torch.load(workdir / f"runs/tiny/{run}/checkpoints/{name}", weights_only=True) for run in (first, second)
        )
        for key in ("state_dict", "optimizer_states", "images_seen", "global_step"):
            assert_equal(left[key], right[key], key)
    records = [json.loads((workdir / f"runs/tiny/{run}/record.json").read_text()) for run in (first, second)]
    assert records[0]["weights"] == records[1]["weights"]
    assert records[0]["hardware"]["processes"] == records[1]["hardware"]["processes"]


def log(workdir, job):
    return (workdir / f"runs/slurm/darkroom-tiny-{job}.log").read_text()


def wait_for_checkpoint(workdir, job):
    wait_for((workdir / f"runs/tiny/{job}/checkpoints/last.ckpt").exists)


def imports_torch(cluster, job, count=2):
    """Return whether the processes of a job have loaded torch; they then still import Lightning."""
    found = cluster.processes(job).values()
    return len(found) == count and all("libtorch" in Path(f"/proc/{process}/maps").read_text() for process in found)


def test_job_on_two_nodes(cluster, workdir, two_processes):
    job = cluster.submit("tiny.yaml", *TWO_NODES, *STEPS)
    cluster.wait(job, "COMPLETED", 120)
    assert cluster.show(job)["NodeList"] == "node[1-2]"
    assert "2 processes on CPU, 1 threads" in log(workdir, job)
    assert_same(workdir, job, two_processes)


@pytest.mark.parametrize("phase", ["training", "imports"])
def test_preempted_job(cluster, workdir, two_processes, phase):
    """A job of another partition takes both nodes; SLURM sends SIGTERM to the processes, a minute before it ends them."""
    job = cluster.submit("tiny.yaml", *TWO_NODES, *STEPS, *SLEEP, DARKROOM_TEST_SLEEP="0.5")
    wait_for_checkpoint(workdir, job) if phase == "training" else wait_for(lambda: imports_torch(cluster, job))
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.log", "--wrap=sleep 1")
    wait_for(lambda: cluster.show(job)["Restarts"] == "1")
    cluster.wait(job, "COMPLETED", 120)
    assert cluster.show(job)["Restarts"] == "1"
    assert ("Stopped and saved" in log(workdir, job)) == (phase == "training")
    assert ("resuming" in log(workdir, job)) == (phase == "training")
    assert_same(workdir, job, two_processes)


def test_notice_during_imports(cluster, workdir, two_processes):
    """The run stops after its first steps."""
    job = cluster.submit("tiny.yaml", *TWO_NODES, *STEPS)
    wait_for(lambda: imports_torch(cluster, job))
    cluster.call("scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1")
    cluster.wait(job, "COMPLETED", 120)
    assert "Stopped and saved" in log(workdir, job)
    assert_same(workdir, job, two_processes)


def test_killed_process_ends_the_job_which_resumes(cluster, workdir, two_processes):
    job = cluster.submit("tiny.yaml", *TWO_NODES, *STEPS, *SLEEP, DARKROOM_TEST_SLEEP="0.5")
    wait_for_checkpoint(workdir, job)
    os.kill(cluster.processes(job)[1], signal.SIGKILL)
    cluster.wait(job, "FAILED", 60)
    assert cluster.show(job)["Restarts"] == "0"
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, "COMPLETED", 120)
    assert "resuming" in log(workdir, job)
    assert_same(workdir, job, two_processes)


def test_cancelled_job_is_not_requeued(cluster, workdir):
    job = cluster.submit("tiny.yaml", *TWO_NODES, *STEPS, *SLEEP, DARKROOM_TEST_SLEEP="0.5")
    wait_for_checkpoint(workdir, job)
    cluster.call("scancel", job)
    cluster.wait(job, "CANCELLED", 60)
    time.sleep(3)
    assert cluster.show(job)["JobState"] == "CANCELLED"


def test_job_at_its_time_limit_goes_on_in_the_next_job(cluster, workdir, two_processes):
    """One job gets its notice. The other, which gets another signal, is ended by SLURM at the limit of one minute."""
    arguments = ["tiny.yaml", *TWO_NODES, "--time", "1", *STEPS, *SLEEP]
    with_notice = cluster.submit(*arguments, "--notice", "10", DARKROOM_TEST_SLEEP="2")
    without = cluster.submit(*arguments, "--sbatch=--signal=URG@1", DARKROOM_TEST_SLEEP="3")
    for job in (with_notice, without):
        cluster.wait(job, "COMPLETED", 300)
        assert int(cluster.show(job)["Restarts"]) >= 1
        assert "resuming" in log(workdir, job)
        assert_same(workdir, job, two_processes)
    assert "DUE TO TIME LIMIT" not in log(workdir, with_notice)
    assert "DUE TO TIME LIMIT" in log(workdir, without)


NOT_REQUEUED = (
    "darkroom: no newer checkpoint since the start of this job, so it is not requeued. Use a longer --time or --notice"
)


def test_job_that_saves_nothing_before_its_time_limit_ends(cluster, workdir):
    """Its first step takes longer. It is first preempted during its imports, which does not count for the next start."""
    words = ["--time", "1", "--cores", "1", *STEPS, *SLEEP, "--sbatch=--signal=URG@1"]
    job = cluster.submit("tiny.yaml", *words, DARKROOM_TEST_SLEEP="300")
    wait_for(lambda: imports_torch(cluster, job, 1))
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.log", "--wrap=sleep 1")
    wait_for(lambda: cluster.show(job)["Restarts"] == "1")
    cluster.wait(job, "TIMEOUT", 240)
    time.sleep(3)
    assert (cluster.show(job)["JobState"], cluster.show(job)["Restarts"]) == ("TIMEOUT", "1")
    assert log(workdir, job).count(NOT_REQUEUED) == 1


def test_job_with_its_notice_during_imports_ends(cluster, workdir):
    job = cluster.submit("tiny.yaml", "--cores", "1", *STEPS)
    wait_for(lambda: imports_torch(cluster, job, 1))
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait(job, "FAILED", 60)
    assert cluster.show(job)["Restarts"] == "0"
    assert log(workdir, job).count(NOT_REQUEUED) == 1


def test_array_of_sweep_workers(cluster, workdir):
    """One of two workers is preempted; each trial is trained once, and the interrupted one is resumed."""
    storage = str(workdir / "journal.log")
    job = cluster.submit(
        "search.yaml", "--workers", "2", "--cores", "1", "--storage", storage, *STEPS, *SLEEP, DARKROOM_TEST_SLEEP="0.25"
    )
    wait_for(lambda: len(list((workdir / "runs/tiny").glob("search-*/checkpoints/last.ckpt"))) == 2)
    cluster.call("scancel", "--signal=USR1", f"{job}_0")
    wait_for(lambda: cluster.show(f"{job}_0")["Restarts"] == "1")
    for worker in (f"{job}_0", f"{job}_1"):
        cluster.wait(worker, "COMPLETED", 180)
    trials = trials_of(workdir)
    completed = [trial for trial in trials if trial["state"] == "COMPLETE"]
    rates = LEARNING_RATES["model.learning_rate"]["values"]
    assert sorted(float(trial["model.learning_rate"]) for trial in completed) == sorted(rates)
    for trial in completed:
        rate = trial["model.learning_rate"]
        assert forked(main, ["fit", "tiny.yaml", "--run", f"rate-{rate}", *STEPS, "--model.learning_rate", rate]) == 0
        assert_same(workdir, trial["run"], f"rate-{rate}")
