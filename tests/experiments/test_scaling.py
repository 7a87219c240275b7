"""`darkroom scaling`: computed gradient bytes compared with the bytes sent, time estimates, and the rendered page."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from datamodules.errors import UserError
from experiments import ROOT
from experiments.bench import scaling, scaling_report
from experiments.bench.link import limited_link, list_namespaces, remove
from experiments.bench.scaling_worker import OpCounter, gradient_bytes
from experiments.cli.main import main
from experiments.run.recipes import find_recipe
from modules.gan import GAN
from modules.training.phases import bind_phases
from tests.helpers.method_contract import fit
from tests.helpers.search_helpers import wait_for
from tests.helpers.subprocess_helpers import two_forked
from tests.tasks.generation import write_generative_recipe


def fit_and_log_all_reduce(recipe):
    """Train, and write the size in bytes of each all-reduced tensor, and whether it is floating point, to a JSON file."""
    sent, all_reduce = [], dist.all_reduce

    def logged(tensor, *args, **kwargs):
        sent.append((tensor.nbytes, tensor.is_floating_point()))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = logged
    fit(recipe, "--run", "counted", "--trainer.devices", "2", "--trainer.log_every_n_steps", "0", "--data.test", "[]")
    if dist.get_rank() == 0:
        recipe.with_suffix(".json").write_text(json.dumps(sent))


@pytest.mark.parametrize("settings", [{"discriminator_steps": 1}, {"discriminator_steps": 3}])
def test_gradient_bytes_equal_all_reduced_bytes(workdir, monkeypatch, settings):
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    settings = {"channels": 1, "size": 28, "hidden_dim": 16, "total_images": 60, **settings}
    recipe = write_generative_recipe(workdir / "tiny.yaml", {"class_path": "modules.gan.GAN", "init_args": settings})
    statuses, output = two_forked(fit_and_log_all_reduce, recipe)
    assert statuses == [0, 0], output
    sent = sum(size for size, is_float in json.loads(recipe.with_suffix(".json").read_text()) if is_float)
    method = GAN(**settings)
    phases = gradient_bytes(bind_phases(method.phases(), method.make_optimizers()))
    assert [phase["name"] for phase in phases] == ["discriminator", "generator"]
    assert phases[0]["moves"] == settings["discriminator_steps"] * phases[1]["moves"]
    steps = 60 // 4
    assert sent == pytest.approx(steps * sum(phase["bytes"] * phase["moves"] for phase in phases), rel=1e-3)


def test_op_counter_counts_forward_and_backward_operators():
    weight = torch.ones(3, requires_grad=True)
    with OpCounter() as forward:
        loss = (weight * 2).sum()
    with OpCounter() as backward:
        loss.backward()
    assert forward.count == 2  # mul, sum
    assert backward.count >= 2


RUN = {
    "recipe": "fake/recipe",
    "batch": 10,
    "flops": 624e9,  # 10 ms at 62.4 TFLOP/s
    "operators": 100,
    "phases": [{"name": "a", "bytes": 24e6, "moves": 2.0}, {"name": "b", "bytes": 50e6, "moves": 0.5}],
    "hardware": {"accelerator": "Fake CPU", "cores": 2, "threads": 1, "precision": "32-true"},
    "seconds": {"single": [0.1, 0.1], "ddp": [0.125, 0.125], "independent": [0.1, 0.1]},
}


def test_estimates_equal_manual_calculation():
    assert scaling_report.step_seconds(RUN) == pytest.approx(0.010)
    sent = 14 / 8 * 73e6 / 240e9  # 8 GPUs over NVLink
    hops = 6 * 5e-6 * (2 * 8 + 0.5 * 8)  # eight buckets of each phase; log2(8) hops up and down a tree
    assert scaling_report.allreduce_seconds(RUN, 8) == pytest.approx(sent + hops)
    total = 126 / 64 * 73e6 / 20e9 + 12 * 10e-6 * 20
    assert scaling_report.allreduce_seconds(RUN, 64) == pytest.approx(total)
    last = 126 / 64 * (2 * 3e6 + 0.5 * 6.25e6) / 20e9 + 12 * 10e-6 * 2.5  # one bucket of each update
    assert scaling_report.exposed_seconds(RUN, 64) == pytest.approx(last + max(0, total - last - 0.010 * 2 / 3))
    assert scaling_report.exposed_seconds({**RUN, "flops": 62.4e9}, 64) == pytest.approx(total - 0.001 * 2 / 3)
    assert scaling_report.step_seconds({**RUN, "operators": 4000}) == pytest.approx(0.020)


def test_page_has_efficiency_and_time_per_image():
    page = scaling_report.render({"command": "darkroom scaling fake/recipe", "processes": 2, "runs": [RUN]})
    assert "| fake/recipe | 10 | 10 | 6.25 | 5 | 80% (80% to 80%) | 100% (100% to 100%) |" in page
    assert "a 2, b 0.5" in page


def test_committed_page_is_rendered_from_the_record():
    assert scaling.PAGE.read_text() == scaling_report.render(json.loads(scaling.RECORD.read_text()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bicubic/x2"], "bicubic/x2 has nothing to train"),
        (["espcn/demo", "--processes", "1"], "scaling: --processes"),
        (["espcn/demo", "--seconds", "nan"], "--seconds above 0"),
        (["espcn/demo", "--processes", "3", "--bandwidth", "1gbit"], "--bandwidth connects two processes"),
    ],
)
def test_invalid_arguments_raise_an_error(capsys, argv, message):
    assert main(["scaling", *argv]) == 2
    assert message in capsys.readouterr().err


def test_missing_dataset_is_named(workdir, monkeypatch, capsys):
    monkeypatch.setenv("DARKROOM_DATA", str(workdir / "none"))
    assert main(["scaling", "srcnn/t91_x3"]) == 2
    error = capsys.readouterr().err
    assert "srcnn/t91_x3" in error and "t91" in error.partition("srcnn/t91_x3")[2]


LINK = {"bandwidth": "1gbit", "latency": 2e-4, "bytes_per_second": 100e6}


def test_page_has_the_time_over_a_link():
    run = {**RUN, "seconds": {**RUN["seconds"], "link": [0.2, 0.2]}}
    record = {"command": "darkroom scaling fake/recipe", "processes": 2, "runs": [run], "link": LINK}
    assert "| fake/recipe | 73 | 100 | 125 | 200 | 730 |" in scaling_report.render(record)


@pytest.mark.parametrize(
    ("programs", "user", "bandwidth", "message"),
    [
        ([], 0, "1gbit", "no program ip"),
        (["ip", "tc"], 1000, "1gbit", "need root"),
        (["ip", "tc"], 0, "1 gbit; reboot", "not a rate"),
    ],
)
def test_link_names_what_it_needs(workdir, monkeypatch, programs, user, bandwidth, message):
    for program in programs:
        (workdir / program).write_text("#!/bin/sh\n")
        (workdir / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(workdir))
    monkeypatch.setattr("os.geteuid", lambda: user)
    with pytest.raises(UserError, match=message), limited_link(bandwidth):
        pass


needs_tc = pytest.mark.skipif(shutil.which("tc") is None or os.geteuid() != 0, reason="needs tc (iproute2) and root")


def command_of(process):
    """Return the command line of a process; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


@pytest.mark.slow
@needs_tc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_link_and_processes_are_removed_after_a_signal(workdir, number):
    command = [sys.executable, "-m", "experiments", "scaling", "gan/demo", "--bandwidth", "1gbit"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # it is ignored in background jobs
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def workers():
        found = children.read_text().split()
        return [child for child in found if b"scaling_worker" in command_of(child)]

    wait_for(workers, 60)
    (worker,) = workers()
    assert process.pid in list_namespaces().values()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert process.pid not in list_namespaces().values()
    assert not Path(f"/proc/{worker}").exists()


@needs_tc
def test_links_of_dead_processes_are_removed():
    dead = subprocess.Popen(["true"])
    dead.wait()
    subprocess.run(["ip", "netns", "add", f"darkroom{dead.pid}a"], check=True)
    subprocess.run(["ip", "netns", "add", f"darkroom{os.getppid()}a"], check=True)  # of a process that lives
    try:
        with limited_link("1gbit"):
            found = set(list_namespaces().values())
        assert found >= {os.getpid(), os.getppid()}
        assert dead.pid not in found
        assert os.getpid() not in list_namespaces().values()
    finally:
        remove([f"darkroom{os.getppid()}a", f"darkroom{dead.pid}a"])


@pytest.mark.slow
@needs_tc
def test_link_has_its_bandwidth():
    """An all-reduce of 8 MiB between two processes sends 8 MiB in each direction."""
    with limited_link("200mbit") as prefixes:
        result = scaling.run_linked(find_recipe("gan/demo"), 5, 10, prefixes)
    assert 0.5 * 25e6 < result["bytes_per_second"] <= 1.1 * 25e6
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"darkroom{os.getpid()}" not in names


@pytest.mark.slow
def test_scaling_writes_record_and_page_for_two_processes(workdir, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "RECORD", workdir / "scaling.json")
    monkeypatch.setattr(scaling, "PAGE", workdir / "SCALING.md")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["scaling", "gan/demo", "--rounds", "1", "--seconds", "0.1", "--write"]) == 0
    record = json.loads(scaling.RECORD.read_text())
    (run,) = record["runs"]
    assert all(len(run["seconds"][kind]) == 1 and run["seconds"][kind][0] > 0 for kind in ("single", "ddp", "independent"))
    assert run["batch"] == 100
    assert scaling.PAGE.read_text() == scaling_report.render(record)
    assert "darkroom scaling gan/demo" in scaling.PAGE.read_text()
