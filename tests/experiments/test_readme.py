"""Every command of the README, run as it stands there, trainings shortened."""

import re
import shlex
import subprocess

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from datamodules.catalog.catalog import resolve_images
from experiments import ROOT
from experiments.cli.main import main
from experiments.run.lightning_cli import check_keys
from experiments.run.recipes import find_recipe
from experiments.search.spec import read_search
from tests.helpers.subprocess_helpers import forked

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
CLUSTERS = (ROOT / "experiments/cluster/CLUSTERS.md").read_text()
SHORT = ["--model.total_images", "64", "--val_every_images", "32"]


def test_there_are_commands():
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, workplace, capfd):
    words = shlex.split(command)
    if words[0] == "make":
        planned = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        return
    assert words[0] == "darkroom"
    extra = {"fit": SHORT, "bench": ["--pairs", "6", "--steps", "2"], "sweep": ["--trials", "1", *SHORT]}.get(words[1], [])
    (workplace / "sweeps").symlink_to(ROOT / "sweeps")
    if words[1] == "predict":
        Image.open(resolve_images("photographs/test")[0]).resize((60, 50)).save(words[words.index("--input") + 1])
    assert forked(main, words[1:] + extra) == 0, capfd.readouterr().err


@pytest.mark.parametrize("command", re.findall(r"^(?:darkroom|TORCH_\w+=1 torchrun) .*", CLUSTERS, re.MULTILINE))
def test_command_for_a_cluster(command, workplace, capfd):
    """Its keys are right; what they do is tested with processes of this machine, in test_interruptions and test_shards."""
    (workplace / "sweeps").symlink_to(ROOT / "sweeps")
    words = shlex.split(command)
    if words[1] == "torchrun":
        options, words = words[2 : words.index("-m")], words[words.index("-m") + 1 :]
        get_args_parser().parse_args([*options, "-m", *words])
        assert words[0] == "experiments"
    if words[1] == "fit":
        assert forked(check_keys, find_recipe(words[2]), words[3:]) == 0, capfd.readouterr().err
    elif words[1] == "submit":
        assert forked(main, [*words[1:], "--dry-run"]) == 0, capfd.readouterr().err
    elif words[1] == "scaling":
        assert forked(main, [*words[1:], "--rounds", "0"]) == 2
        assert "--rounds at least 1" in capfd.readouterr().err
        assert [find_recipe(word) for word in words[2:] if "/" in word]
    else:
        assert words[1] == "sweep"
        assert forked(main, ["sweep", *words[2:], "--trials", "0"]) == 2
        assert "--trials 0: at least 1" in capfd.readouterr().err  # all other words were understood
        read_search(workplace / words[2], [])


def test_commands_within_sentences_exist():
    from experiments.cli import main as front

    for command in re.findall(r"`darkroom (\w+)", README):
        assert command in {"fit", "validate", "test", "predict", *front.COMMANDS}, command
    for recipe in re.findall(r"`darkroom (?:fit|test|predict|bench) (\S+?)`?(?:\s|$)", README):
        find_recipe(recipe.strip("`"))


def test_files_that_it_names_are_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
