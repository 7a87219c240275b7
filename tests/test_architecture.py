"""Imports between packages have one direction and no cycles. The files contain no paths of this machine."""

import ast
import re
from pathlib import Path

import pytest

from experiments import ROOT

# The packages and modules that each package may import, in addition to itself.
MAY_IMPORT = {
    "modules": {
        "datamodules.errors",
        "datamodules.batches",
        "datamodules.transforms",
        "datamodules.random",
        "datamodules.io.paths",
        "datamodules.io.image_io",  # a style image is a part of the method, as its weights
    },
    "datamodules": set(),
    "callbacks": {"modules.training", "modules.networks", "modules.losses.precision", "datamodules"},
    "experiments": {"modules", "datamodules", "callbacks"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES or {node.module}
    return {name for name in found if name.partition(".")[0] in MAY_IMPORT}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_packages_import_in_one_direction(path: Path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        allowed = (package, *MAY_IMPORT[package])
        assert any(name == known or name.startswith(f"{known}.") for known in allowed), f"{path.name} imports {name}"


def test_imports_are_not_circular():
    """Imports within functions are included."""
    pending = {dotted(path): imports(path) for path in FILES}
    while pending:
        free = [name for name, needs in pending.items() if not needs & pending.keys()]
        assert free, f"circular imports among {sorted(pending)}"
        for name in free:
            del pending[name]


def test_links_between_pages_resolve():
    for page in ROOT.rglob("*.md"):
        if ".venv" in page.parts:
            continue
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)  # ignore templates
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_files_do_not_contain_workplace_paths():
    for path in ROOT.rglob("*"):
        tracked = (
            ".git" not in path.parts and ".venv" not in path.parts and path.suffix in {".py", ".md", ".yaml", ".txt", ".toml"}
        )
        if tracked and path.is_file() and path != Path(__file__):
            assert "../shared" not in path.read_text(), path


def test_locked_versions_have_no_addresses_and_satisfy_the_requirements():
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
