"""Run every command of the README, with shortened training."""

import re
import shlex
import subprocess

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from datamodules.catalog.catalog import resolve_images
from experiments import ROOT
from experiments.cli.main import main
from experiments.run.lightning_cli import validate_overrides
from experiments.run.recipes import find_recipe
from experiments.search.spec import read_search
from tests.helpers.subprocess_helpers import forked

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
CLUSTERS = (ROOT / "experiments/cluster/CLUSTERS.md").read_text()
SHORT = ["--model.total_images", "16", "--val_every_images", "8"]


def test_readme_has_commands():
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, workdir, capfd):
    argv = shlex.split(command)
    if argv[0] == "make":
        dry_run = subprocess.run(["make", "-n", *argv[1:]], cwd=ROOT, capture_output=True, text=True)
        assert dry_run.returncode == 0, dry_run.stderr
        return
    if argv[0] in ("git", "cd", "pip"):  # they change the environment
        assert command.startswith(("git clone URL darkroom", "cd darkroom", "pip install uv && uv pip install"))
        return
    assert argv[0] == "darkroom"
    extra = {
        "fit": SHORT,
        "bench": ["--pairs", "6", "--steps", "2"],
        "sweep": ["--n-trials", "1", *SHORT],
        "neural-style": ["--steps", "2"],
        "deepdream": ["--steps", "1"],
    }.get(argv[1], [])
    (workdir / "sweeps").symlink_to(ROOT / "sweeps")
    (workdir / "experiments").symlink_to(ROOT / "experiments")
    for name in {"photo.jpg", "slice.png"} & set(argv):
        Image.open(resolve_images("photographs/test")[0]).resize((60, 50)).save(name)
    assert forked(main, argv[1:] + extra) == 0, capfd.readouterr().err


@pytest.mark.parametrize("command", re.findall(r"^(?:darkroom|TORCH_\w+=1 torchrun) .*", CLUSTERS, re.MULTILINE))
def test_cluster_command_is_valid(command, workdir, capfd):
    """The command is only parsed. `test_preemption` and `test_fsdp` run such commands with local processes."""
    (workdir / "sweeps").symlink_to(ROOT / "sweeps")
    argv = shlex.split(command)
    if argv[1] == "torchrun":
        options, argv = argv[2 : argv.index("-m")], argv[argv.index("-m") + 1 :]
        get_args_parser().parse_args([*options, "-m", *argv])
        assert argv[0] == "experiments"
    if argv[1] == "fit":
        assert forked(validate_overrides, find_recipe(argv[2]), argv[3:]) == 0, capfd.readouterr().err
    elif argv[1] == "submit":
        assert forked(main, [*argv[1:], "--dry-run"]) == 0, capfd.readouterr().err
    elif argv[1] == "bench":
        assert forked(main, [*argv[1:], "--steps", "0"]) == 2
        assert "--steps from 1" in capfd.readouterr().err
        assert [find_recipe(arg) for arg in argv[2:] if "/" in arg]
    elif argv[1] == "scaling":
        assert forked(main, [*argv[1:], "--rounds", "0"]) == 2
        assert "--rounds at least" in capfd.readouterr().err
        assert [find_recipe(arg) for arg in argv[2:] if "/" in arg]
    else:
        assert argv[1] == "sweep"
        assert forked(main, ["sweep", *argv[2:], "--n-trials", "0"]) == 2
        assert "--n-trials 0" in capfd.readouterr().err  # all other arguments are valid
        read_search(workdir / argv[2], [])


def test_commands_in_the_text_exist():
    from experiments.cli.main import COMMANDS as OTHER_COMMANDS

    for command in re.findall(r"`darkroom (\w+)", README):
        assert command in {"fit", "validate", "test", "predict", *OTHER_COMMANDS}, command
    for recipe in re.findall(r"`darkroom (?:fit|test|predict|bench) (\S+?)`?(?:\s|$)", README):
        if recipe.endswith(".safetensors"):
            continue
        find_recipe(recipe.strip("`"))


def test_linked_files_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
