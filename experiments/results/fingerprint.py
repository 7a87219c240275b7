"""Fingerprints of a recipe and of its code: what tells that a record may no longer hold.

The recipe's fingerprint decides: another recipe is another training. The code's is a cheap alarm that a check is due
(`experiments/results/check.py`): it hashes the syntax trees of the classes of a recipe and of all they import from this
project, without comments, docstrings, types, error texts, names and the layout of files, none of which can move a metric.
"""

import ast
import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from experiments import ROOT
from experiments.run.recipes import Recipe

PACKAGES = ("modules", "datamodules", "callbacks", "experiments")
INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
# Attributes of this project that objects of torch, numpy and Python have too: `x.mean()` and `x.std()` must stay two.
SHARED = frozenset(
    [
        "__call__",
        "__getitem__",
        "__init__",
        "__iter__",
        "__len__",
        "__setattr__",
        "_parts",
        "count",
        "forward",
        "grad",
        "group",
        "items",
        "load_state_dict",
        "mean",
        "name",
        "parameters",
        "parts",
        "requires_grad",
        "resize",
        "share_memory",
        "size",
        "state_dict",
        "std",
        "stride",
        "title",
        "train",
        "translate",
        "update",
        "values",
    ]
)


def canonical(recipe: Recipe) -> dict[str, Any]:
    """What a recipe decides: its content without comments, the order of keys, and the test sets, which may be added later."""
    content = recipe.content
    content["data"].get("init_args", {}).pop("test", None)
    return json.loads(json.dumps(content, sort_keys=True))


def recipe_fingerprint(recipe: Recipe) -> str:
    """Hash of `canonical`."""
    return _hash(json.dumps(canonical(recipe), sort_keys=True))


def code_fingerprint(recipe: Recipe) -> dict[str, str]:
    """Hashes of the code of a recipe's classes and of all they import from this project or the user's own files.

    Returns:
        "training", of the model and its data, and "metrics", of the callbacks.
    """
    content = canonical(recipe)
    parts = {"training": [content["model"], content["data"]], "metrics": content.get("trainer", {}).get("callbacks", [])}
    return {part: _hash_of_classes(_classes(entries)) for part, entries in parts.items()}


def _hash_of_classes(classes: list[str]) -> str:
    hashes: set[str] = set()
    for name in classes:
        hashes |= _module_hashes(name.rpartition(".")[0])
    return _hash(json.dumps(sorted(hashes)))


def _classes(entry: Any) -> list[str]:
    """The classes that a part of a recipe names, those that are given to others included."""
    if isinstance(entry, list):
        return [name for item in entry for name in _classes(item)]
    if isinstance(entry, dict):
        own = [entry["class_path"]] if "class_path" in entry else []
        return own + [name for key, value in entry.items() if key != "class_path" for name in _classes(value)]
    return []


def _module_hashes(module: str) -> frozenset[str]:
    """One hash for each file that a module consists of, its imports included; layout and order do not count."""
    pending, hashes = [module], {}
    while pending:
        name = pending.pop()
        if name in hashes or (path := _source(name)) is None:
            continue
        hashes[name], imports = _source_hash(path.read_text(), own_attributes())
        pending += imports
    return frozenset(hashes.values())


@cache
def _source_hash(source: str, attributes: frozenset[str]) -> tuple[str, tuple[str, ...]]:
    """The hash of a file's source, by the project's attributes, and the modules that it imports."""
    tree = ast.parse(source)
    imports = tuple(_imports(tree))
    essence = Essence(_bound_names(tree), attributes).visit(tree)
    return _hash(ast.dump(essence)), imports


def _source(module: str) -> Path | None:
    """The file of a module of this project or of the user's; None for the standard library and installed packages."""
    own = ROOT / f"{module.replace('.', '/')}.py"
    if module.partition(".")[0] in PACKAGES:
        return own if own.exists() else None
    top, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)  # the top package alone, so that nothing is imported
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    origin = Path(spec.origin)
    if any(origin.is_relative_to(folder) for folder in INSTALLED):
        return None
    path = origin if not rest else origin.parent.joinpath(*rest.split(".")).with_suffix(".py")
    return path if path.exists() else None


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _bound_names(tree: ast.Module) -> frozenset[str]:
    """The names that a file gives to variables, arguments, functions and classes, or imports from this project."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            names |= {alias.asname or alias.name for alias in node.names}
    return frozenset(names)


@cache
def own_attributes() -> frozenset[str]:
    """The attributes that classes of this project define, without those that objects of libraries have as well."""
    names: set[str] = set()
    for package in PACKAGES[:3]:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    names |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                    fields = (part.target for part in node.body if isinstance(part, ast.AnnAssign))
                    names |= {field.id for field in fields if isinstance(field, ast.Name)}
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
    return frozenset(names - SHARED)


class Essence(ast.NodeTransformer):
    """Reduce a syntax tree to what can change what the code computes.

    Docstrings, types and the arguments of raised errors go; the project's own names become numbers, in the order in which
    they first occur, so that a renamed variable is the same and two exchanged ones are not.

    Args:
        bound: names that the file binds.
        attributes: attributes that the project defines.
    """

    def __init__(self, bound: frozenset[str], attributes: frozenset[str]) -> None:
        self.bound, self.attributes = bound, attributes
        self.numbers: dict[str, str] = {}

    def number(self, name: str, own: frozenset[str]) -> str:
        """A name's number, or the name if it is a library's."""
        return self.numbers.setdefault(name, f"#{len(self.numbers)}") if name in own else name

    def visit(self, node: ast.AST) -> Any:
        """Reduce a node and its children."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            return None
        if isinstance(node, ast.Raise):
            return ast.Raise()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef):
            node.name, node.returns = self.number(node.name, self.bound), None
        elif isinstance(node, ast.ClassDef):
            node.name = self.number(node.name, self.bound)
        elif isinstance(node, ast.arg):
            node.arg, node.annotation = self.number(node.arg, self.bound), None
        elif isinstance(node, ast.AnnAssign):
            node = ast.Assign([node.target], node.value) if node.value is not None else ast.Pass()
        elif isinstance(node, ast.Name):
            node.id = self.number(node.id, self.bound)
        elif isinstance(node, ast.Attribute):
            node.attr = self.number(node.attr, self.attributes)
        elif isinstance(node, ast.Call) and self._is_own(node.func):
            for keyword in node.keywords:
                keyword.arg = keyword.arg and self.number(keyword.arg, frozenset({keyword.arg}))
        return self.generic_visit(node)

    def _is_own(self, function: ast.AST) -> bool:
        """Whether a function that is called is this project's, so that its arguments may be renamed."""
        if isinstance(function, ast.Attribute):
            return function.attr in self.attributes or function.attr == "__init__"
        return isinstance(function, ast.Name) and function.id in self.bound


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
