"""`darkroom scaling`: what it counts against what travels, its page against its record."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from experiments import ROOT
from experiments.bench import scaling
from experiments.bench import scaling_report as scaling_page
from experiments.bench.scaling_worker import Operators, traffic
from experiments.cli.main import main
from modules.gan import GAN
from tests.helpers.method_contract import fit
from tests.helpers.subprocess_helpers import two_forked
from tests.helpers.tiny_recipes import write_generative_recipe


def fit_and_count(recipe):
    """Train, and leave what was sent to be summed, call by call, in elements."""
    sent, given = [], dist.all_reduce

    def counted(tensor, *rest, **named):
        sent.append((tensor.nbytes, tensor.is_floating_point()))
        return given(tensor, *rest, **named)

    dist.all_reduce = counted
    fit(recipe, "--run", "counted", "--trainer.devices", "2", "--trainer.log_every_n_steps", "0", "--data.test", "[]")
    if dist.get_rank() == 0:
        recipe.with_suffix(".json").write_text(json.dumps(sent))


@pytest.mark.parametrize("settings", [{"discriminator_steps": 1}, {"discriminator_steps": 3}])
def test_what_travels_is_what_is_summed(workplace, monkeypatch, settings):
    monkeypatch.setenv("DARKROOM_CACHE", str(workplace / "cache"))
    settings = {"channels": 1, "size": 28, "hidden_dim": 16, "total_images": 60, **settings}
    recipe = write_generative_recipe(workplace / "tiny.yaml", {"class_path": "modules.gan.GAN", "init_args": settings})
    status, said = two_forked(fit_and_count, recipe)
    assert status == [0, 0], said
    sent = sum(size for size, of_gradients in json.loads(recipe.with_suffix(".json").read_text()) if of_gradients)
    phases = traffic(GAN(**settings).phases())
    assert [phase["name"] for phase in phases] == ["discriminator", "generator"]
    assert phases[0]["moves"] == settings["discriminator_steps"] * phases[1]["moves"]
    steps = 60 // 4
    assert sent == pytest.approx(steps * sum(phase["bytes"] * phase["moves"] for phase in phases), rel=1e-3)


def test_operators_are_counted_through_the_backward_pass():
    weight = torch.ones(3, requires_grad=True)
    with Operators() as forward:
        loss = (weight * 2).sum()
    with Operators() as backward:
        loss.backward()
    assert forward.count == 2  # mul, sum
    assert backward.count >= 2


RUN = {
    "recipe": "made/up",
    "batch": 10,
    "flops": 624e9,  # 10 ms at 62.4 TFLOP/s
    "operators": 100,
    "phases": [{"name": "a", "bytes": 24e6, "moves": 2.0}, {"name": "b", "bytes": 50e6, "moves": 0.5}],
    "hardware": {"accelerator": "Made Up", "cores": 2, "threads": 1, "precision": "32-true"},
    "seconds": {"alone": [0.1, 0.1], "together": [0.125, 0.125], "apart": [0.1, 0.1]},
}


def test_expectations_by_hand():
    assert scaling_page.computing(RUN) == pytest.approx(0.010)
    sent = 14 / 8 * 73e6 / 240e9  # of 8, over NVLink
    hops = 14 * 5e-6 * (2 * 1 + 0.5 * math.ceil(50e6 / (25 * 2**20)))
    assert scaling_page.averaging(RUN, 8) == pytest.approx(sent + hops)
    assert scaling_page.averaging(RUN, 64) == pytest.approx(126 / 64 * 73e6 / 20e9 + 126 * 10e-6 * 3)
    assert scaling_page.computing({**RUN, "operators": 4000}) == pytest.approx(0.020)


def test_page_has_efficiency_and_time_per_image():
    page = scaling_page.page({"command": "darkroom scaling made/up", "processes": 2, "runs": [RUN]})
    assert "| made/up | 10 | 10 | 6.25 | 5 | 80% (80% to 80%) | 100% (100% to 100%) |" in page
    assert "a 2, b 0.5" in page


def test_committed_page_is_what_the_record_says():
    assert scaling.PAGE.read_text() == scaling_page.page(json.loads(scaling.RECORD.read_text()))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bicubic/x2"], "bicubic/x2 has nothing to train"),
        (["espcn/demo", "--processes", "1"], "--processes is at least 2"),
        (["espcn/demo", "--seconds", "nan"], "--seconds above 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(capsys, words, complaint):
    assert main(["scaling", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_data_that_are_not_here_are_named(workplace, monkeypatch, capsys):
    monkeypatch.setenv("DARKROOM_DATA", str(workplace / "none"))
    assert main(["scaling", "srcnn/t91_x3"]) == 2
    assert "darkroom: srcnn/t91_x3 cannot be timed: t91 is not here" in capsys.readouterr().err


def test_two_processes_are_timed(workplace, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "RECORD", workplace / "scaling.json")
    monkeypatch.setattr(scaling, "PAGE", workplace / "SCALING.md")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["scaling", "gan/demo", "--rounds", "1", "--seconds", "0.1", "--write"]) == 0
    record = json.loads(scaling.RECORD.read_text())
    (run,) = record["runs"]
    assert all(len(run["seconds"][kind]) == 1 and run["seconds"][kind][0] > 0 for kind in ("alone", "together", "apart"))
    assert run["batch"] == 100
    assert scaling.PAGE.read_text() == scaling_page.page(record)
    assert "darkroom scaling gan/demo" in scaling.PAGE.read_text()
