"""The plan of the house: which room may know which."""

import ast
from pathlib import Path

import pytest

from experiments.records import ROOT

MAY_IMPORT = {
    "modules": {
        "modules",
        "datamodules.refused",
        "datamodules.resize",
        "datamodules.colour",
        "datamodules.fast_noise",
        "datamodules.noise",
        "datamodules.layers",
        "datamodules.masks",
    },
    "datamodules": {"datamodules"},
    "callbacks": {
        "callbacks",
        "modules.lightning_adapter",
        "modules.gradients",
        "datamodules.refused",
        "datamodules.photos",
        "datamodules.catalogue",
        "datamodules.image_arrays",
        "datamodules.masks",
        "datamodules.fast_noise",
        "datamodules.noise",
        "datamodules.palettes",
    },
    "experiments": {"experiments", "modules", "datamodules", "callbacks"},
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_go_one_way(path: Path):
    allowed = MAY_IMPORT[path.parent.name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in MAY_IMPORT:
            assert node.module in allowed or node.module.partition(".")[0] in allowed, f"{path.name} imports {node.module}"


def test_no_circle():
    pending = {
        f"{path.parent.name}.{path.stem}": {
            node.module
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in MAY_IMPORT
        }
        for path in FILES
    }
    while pending:
        free = [name for name, needs in pending.items() if not needs & pending.keys()]
        assert free, f"a circle among {sorted(pending)}"
        for name in free:
            del pending[name]


def test_no_file_names_this_workplace():
    for path in ROOT.rglob("*"):
        tracked = (
            ".git" not in path.parts and ".venv" not in path.parts and path.suffix in {".py", ".md", ".yaml", ".txt", ".toml"}
        )
        if tracked and path.is_file() and path != Path(__file__):
            assert "../shared" not in path.read_text(), path


def test_locked_versions_have_no_addresses_and_fit_the_ranges():
    from packaging.requirements import Requirement

    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert not [version for version in locked.values() if "/" in version or "@" in version]
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(names[requirement.name.lower()]), text
    pair = {"torch": "2.14.1", "torchvision": "0.29.1"}
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pair.get(requirement.name, names[requirement.name.lower()]))
