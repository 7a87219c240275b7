"""`darkroom style-speed` and `style-objective`, at small sizes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments.bench import style, style_report
from experiments.cli.main import main
from tests.helpers.subprocess_helpers import forked
from tests.modules.test_style_transfer import MODEL
from tests.tasks.stylization import write_stylization_recipe


def at_small_sizes(argv):
    style.SIZES, style.FULL_RUN_SIZE, style.ITERATIONS, style.TIMED_ITERATIONS = (64, 96), 64, 6, 3
    style_report.FOLDER, style_report.COUNTS = Path("comparison"), (3, 6, 9)
    style_report.PAPER = {"64": style_report.PAPER["256"], "96": style_report.PAPER["512"]}
    return main(argv)


def test_commands_write_records_and_a_page(workdir, photos, three_photos):
    recipe = str(write_stylization_recipe(workdir / "tiny.yaml", photos, three_photos, MODEL))
    assert forked(at_small_sizes, ["style-speed", recipe, "--write"]) == 0
    assert forked(main, ["fit", recipe, "--run", "r", "--model.total_images", "8"]) == 0
    weights = str(workdir / "runs/tiny/r/checkpoints/best.ckpt")
    assert forked(at_small_sizes, ["style-objective", recipe, "--ckpt", weights, "--write"]) == 0
    page = (workdir / "comparison/README.md").read_text()

    speed = json.loads((workdir / "comparison/speed.json").read_text())["sizes"]
    assert [len(speed[size]["iterations"]) for size in ("64", "96")] == [6, 3]
    seconds, network = speed["64"]["iterations"], speed["64"]["network"]
    (row,) = (line for line in page.splitlines() if line.startswith("| 64 x 64"))
    measured, extrapolated = row.split(" | ")[5], row.split(" | ")[7]
    assert float(measured.removesuffix("x")) == pytest.approx(sum(seconds) / network, abs=1)
    assert extrapolated == f"{9 * sum(seconds) / 6 / network:.0f}x (extrapolated)"

    objective = json.loads((workdir / "comparison/objective.json").read_text())["photographs"]
    assert list(objective) == ["astronaut", "chelsea", "china"]
    for name, curve in objective.items():
        assert len(curve["iterations"]) == 6
        assert curve["iterations"][-1] < curve["iterations"][0] < curve["content"]
        assert f"| {name} | {curve['content']:.4g} |" in page
    with Image.open(workdir / "comparison/objective.png") as image:
        assert image.width > 300


def test_equal_step_is_the_first_iteration_below_the_network():
    curve = {"iterations": [9.0, 5.0, 4.0, 2.0], "network": 4.5}
    assert style_report.equal_step(curve) == "3"
    assert style_report.equal_step({**curve, "network": 1.0}) == "more than 4"


def test_other_recipes_are_refused(workdir, capfd):
    assert forked(main, ["style-speed", "espcn/demo"]) == 2
    assert "espcn/demo is not a style transfer" in capfd.readouterr().err
