"""Run records: what was run and what came of it, with fingerprints that say whether it still holds.

Nothing heavy is imported here: tables are rendered from records alone.
"""

import ast
import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from typing import Any

from experiments import METHODS, ROOT
from experiments.run.recipes import Recipe

ROOMS = ("modules", "datamodules", "callbacks")
# Code that a figure rests on, but whose changes another check would show, and so need not make a record stale.
CHECKED_OTHERWISE = {
    "modules.training.method": "tests hold its training bit for bit to a hand-written loop",
    "modules.training.phases": "as modules.training.method",
    "modules.training.gradients": "as modules.training.method",
    "modules.training.lightning_compat": "as modules.training.method",
    "modules.training.fsdp": "tests hold it to the same steps with whole weights",
    "datamodules.catalog.catalog": "a record carries the hash of the pixels that were read",
    "datamodules.io.image_io": "as datamodules.catalog.catalog",
    "datamodules.catalog.array_readers": "as datamodules.catalog.catalog",
}


def recipe_fingerprint(recipe: Recipe) -> str:
    """Hash of what the recipe decides; comments, the order of keys, and which sets are measured afterwards do not count."""
    content = recipe.content
    content["data"].get("init_args", {}).pop("test", None)
    return _hash(json.dumps(content, sort_keys=True))


@cache
def code_fingerprint(module: str) -> str:
    """Hash of a module of ours and all of ours that it imports; comments, docstrings, types and layout do not."""
    pending, seen = [module], {}
    while pending:
        name = pending.pop()
        if name in seen or name in CHECKED_OTHERWISE:
            continue
        path = ROOT / f"{name.replace('.', '/')}.py"
        if not path.exists():  # a class of the user's own, or of a library
            seen[name] = ""
            continue
        tree = ast.parse(path.read_text())
        pending += [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in ROOMS
        ]
        seen[name] = ast.dump(_Essence().visit(tree))
    return _hash(json.dumps(seen, sort_keys=True))


TYPES = ("typing", "collections.abc", "pydantic", "annotated_types")  # what is taken from these is about types


class _Essence(ast.NodeTransformer):
    """Takes out of a syntax tree what cannot change what the code does: docstrings and types."""

    def visit(self, node: ast.AST) -> Any:
        """Strip a node, after its children."""
        if isinstance(node, ast.ImportFrom) and node.module in TYPES:
            return None
        self.generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            return ast.Assign([node.target], node.value)
        return node


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """What a record of this recipe must carry to be current: of the recipe, of the method's, data's and protocols' code."""
    content = recipe.content
    callbacks = content.get("trainer", {}).get("callbacks", [])
    parts = {"method": content["model"], "data": content["data"], "protocol": callbacks}
    code = {
        part: _hash("".join(code_fingerprint(name.rpartition(".")[0]) for name in _classes(entries)))
        for part, entries in parts.items()
    }
    return {"recipe": recipe_fingerprint(recipe), **code}


def _classes(entry: Any) -> list[str]:
    """The classes that a part of a recipe names, those that are given to others included."""
    if isinstance(entry, list):
        return [name for item in entry for name in _classes(item)]
    if isinstance(entry, dict):
        own = [entry["class_path"]] if "class_path" in entry else []
        return own + [name for key, value in entry.items() if key != "class_path" for name in _classes(value)]
    return []


def facts(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """What can be said about a run before it starts."""
    return {
        "recipe": recipe.name,
        "overrides": overrides,
        "fingerprints": fingerprints(recipe),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "lightning", "pytorch-optimizer")},
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of this checkout, with "+" if tracked files differ from it; empty outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def committed_records(recipe: str) -> list[dict[str, Any]]:
    """The records of a recipe that stand in its method's folder, by seed."""
    method = recipe.partition("/")[0]
    found = [
        {**json.loads(path.read_text()), "file": path.relative_to(ROOT).as_posix()}
        for path in sorted((METHODS / method / "records").glob("*.json"))
    ]
    return sorted((record for record in found if record["recipe"] == recipe), key=lambda record: record["seed"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
