"""`darkroom folds`: one training for each share of the images, and the mean over the folds."""

import json
import statistics

import pytest

from callbacks.run.record_file import read_record
from experiments.cli.main import main
from tests.experiments.test_recipes import write_coins
from tests.helpers.subprocess_helpers import forked

SMALL = ["--model.total_images", "4", "--val_every_images", "4", "--model.base_channels", "2", "--model.depth", "2"]
SMALL += ["--model.tile_size", "100", "--data.crop", "20", "--data.margin", "40", "--data.batch_size", "2"]


@pytest.mark.slow
def test_each_image_is_evaluated_in_one_fold(workdir, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_coins(workdir)
    assert forked(main, ["folds", "unet/folder", "2", *SMALL]) == 0
    output = capfd.readouterr().out
    runs = [workdir / f"runs/unet/folder/fold-{k}-of-2" for k in (1, 2)]
    names = [[row.split(",")[1] for row in (run / "test_images.csv").read_text().splitlines()[1:]] for run in runs]
    assert sorted(names[0] + names[1]) == ["0", "1", "2", "3", "4"]
    values = [read_record(run / "record.json")["metrics"]["held-out"]["miou/pooled"]["mean"] for run in runs]
    *_, row = (line for line in output.splitlines() if "miou/pooled" in line)  # the trainings print tables, too
    shown = [float(word) for word in row.replace("│", " ").split()[2:]]
    assert shown == pytest.approx([*values, statistics.fmean(values), statistics.stdev(values)], abs=6e-5)
    assert forked(main, ["folds", "unet/folder", "2", *SMALL]) == 0  # finished folds are not repeated
    capfd.readouterr()
    assert forked(main, ["folds", "unet/folder", "2", *SMALL, "--model.learning_rate", "0.1"]) == 2
    assert "fold-1-of-2 was trained with model.learning_rate 0.001, not 0.1" in capfd.readouterr().err
    assert "darkroom fit" not in capfd.readouterr().out
    assert json.loads((runs[0] / "record.json").read_text())["config"]["data"]["init_args"]["fold"] == "1/2"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["folds", "unet/folder", "1"], "folds: 1 folds; use 2 to 1000"),
        (["folds", "unet/folder", "3", "--run", "x"], "folds: --run is set by the command"),
        (["folds", "espcn/demo", "3"], "unknown key 'data.fold'"),
        (["folds", "unet/demo", "3"], "data.fold: 1/3 holds out training images, but data.val is coins/val"),
    ],
)
def test_unusable_folds_are_refused(workdir, capfd, argv, message):
    assert forked(main, argv) == 2
    assert message in capfd.readouterr().err
