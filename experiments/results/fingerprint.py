"""Fingerprints of a recipe and of its code: what tells that a record may no longer hold.

The recipe's fingerprint decides: another recipe is another training. The code's is a cheap alarm that a check is due
(`experiments/results/check.py`): it hashes the syntax trees of the classes of a recipe and of all they import from this
project, without comments, docstrings, types, error texts, names and the layout of files, none of which can move a metric.
"""

import ast
import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
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
        "_apply",
        "_parts",
        "append",
        "count",
        "forward",
        "grad",
        "group",
        "index",
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
    files = _files([name.rpartition(".")[0] for name in classes])
    return _hash(json.dumps(sorted({_file_hash(name, files) for name in files})))


def _classes(entry: Any) -> list[str]:
    """The classes that a part of a recipe names, those that are given to others included."""
    if isinstance(entry, list):
        return [name for item in entry for name in _classes(item)]
    if isinstance(entry, dict):
        own = [entry["class_path"]] if "class_path" in entry else []
        return own + [name for key, value in entry.items() if key != "class_path" for name in _classes(value)]
    return []


# The files of a recipe: those of its classes and, in turn, all that these import


@dataclass(frozen=True)
class File:
    """What a file defines; the position of a definition stands for its name, which may change.

    Args:
        source: its text.
        package: the package that its relative imports start from.
        imported: for each name that it imports, the module and the name there, or "" for the module itself.
        definitions: position of each function, class and variable at the top level.
        attributes: position of each method, field and attribute of its classes.
        parameters: names of the parameters of each function and class, by its name.
        used: all names and attributes that occur in it.
    """

    source: str
    package: str
    imported: dict[str, tuple[str, str]]
    definitions: dict[str, int]
    attributes: dict[str, int]
    parameters: dict[str, list[list[str]]]
    used: frozenset[str]


def _files(modules: list[str]) -> dict[str, File]:
    """The files of modules of this project or of the user's, and of all they import, by dotted name."""
    pending, files = list(modules), {}
    tried: set[str] = set()
    while pending:
        name = pending.pop()
        if name in tried:
            continue
        tried.add(name)
        if (path := _source(name)) is None:
            continue
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        try:
            files[name] = _read(path.read_text(), package)
        except SyntaxError as error:
            raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
        for module, member in files[name].imported.values():
            pending += [module, f"{module}.{member}"] if member else [module]
    return files


def _source(module: str) -> Path | None:
    """The file of a module of this project or of the user's; None for the standard library and installed packages."""
    top, _, rest = module.partition(".")
    if top in sys.stdlib_module_names:
        return None
    if top in PACKAGES:
        folders = [ROOT / top]
    else:
        try:
            spec = importlib.util.find_spec(top)  # the top package alone, so that nothing is imported
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        folders = [Path(folder) for folder in spec.submodule_search_locations or []]
        if not folders:
            path = Path(spec.origin) if spec.has_location and spec.origin else None
            return path if path and path.suffix == ".py" and not rest and not _is_installed(path) else None
    for folder in folders:
        path = folder.joinpath(*rest.split(".")) if rest else folder
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.exists() and not _is_installed(candidate):
                return candidate
    return None


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in INSTALLED)


@cache
def _read(source: str, package: str) -> File:
    tree = ast.parse(source)
    imported: dict[str, tuple[str, str]] = {}
    attributes: dict[str, int] = {}
    parameters: dict[str, list[list[str]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            imported |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            parameters.setdefault(node.name, []).append([name for name in names if name not in ("self", "cls")])
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            fields = [
                part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            for name in (*fields, *(method.name for method in methods)):
                attributes.setdefault(name, len(attributes))
            starts = [[arg.arg for arg in (*m.args.args, *m.args.kwonlyargs)][1:] for m in methods if m.name == "__init__"]
            parameters.setdefault(node.name, []).append(starts[0] if starts else fields)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            attributes.setdefault(node.attr, len(attributes))
    definitions: dict[str, int] = {}
    for statement in tree.body:
        for name in _defined(statement):
            definitions.setdefault(name, len(definitions))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return File(source, package, imported, definitions, attributes, parameters, frozenset(used))


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    else:
        yield from (node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


# The hash of a file


def _file_hash(name: str, files: dict[str, File]) -> str:
    """The hash of what a file computes, with what it imports from the others named by the place of its definition."""
    file = files[name]
    own = frozenset(attribute for other in files.values() for attribute in other.attributes) - SHARED
    imported = {alias: _place(module, member, files, own) for alias, (module, member) in file.imported.items()}
    attributes: dict[str, list[str]] = {}
    parameters: dict[str, list[list[str]]] = {}
    for other in files.values():
        for attribute in (own & file.used & other.attributes.keys()) - file.attributes.keys():
            attributes.setdefault(attribute, []).append(_place_of(other, other.attributes[attribute], own))
        for function in file.used & other.parameters.keys():
            parameters.setdefault(function, []).extend(other.parameters[function])
    joined = {attribute: ",".join(sorted(places)) for attribute, places in attributes.items()}
    return _hash_of(file.source, own & file.used, _frozen(imported), _frozen(joined), json.dumps(parameters, sort_keys=True))


def _place(module: str, member: str, files: dict[str, File], own: frozenset[str]) -> str:
    """What stands for an imported name: of a library, its full name; of a file here, where it is defined."""
    if f"{module}.{member}" in files:
        return _place_of(files[f"{module}.{member}"], -1, own)
    if module not in files:
        return f"{module}.{member}"
    file = files[module]
    if member in file.definitions:
        return _place_of(file, file.definitions[member], own)
    if member in file.imported:  # passed on from yet another file
        return _place(*file.imported[member], files, own)
    return _place_of(file, -1, own)


def _place_of(file: File, position: int, own: frozenset[str]) -> str:
    return f"{_hash_of(file.source, own & file.used, (), (), 'null')}:{position}"


Pairs = tuple[tuple[str, str], ...]


def _frozen(mapping: dict[str, str]) -> Pairs:
    return tuple(sorted(mapping.items()))


@cache
def _hash_of(source: str, own: frozenset[str], imported: Pairs, attributes: Pairs, parameters: str) -> str:
    """The hash of a file's essence; without places and parameters, names from elsewhere are numbered like the file's own."""
    tree = ast.parse(source)
    essence = Essence(_bound_names(tree), own, dict(imported), dict(attributes), json.loads(parameters)).visit(tree)
    return _hash(ast.dump(essence))


def _bound_names(tree: ast.Module) -> frozenset[str]:
    """The names that a file gives to variables, arguments, functions and classes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names if node.level or _is_own(node.module)}
    return frozenset(names)


def _is_own(module: str | None) -> bool:
    return (module or "").partition(".")[0] in PACKAGES


class Essence(ast.NodeTransformer):
    """Reduce a syntax tree to what can change what the code computes.

    Docstrings, types and the arguments of raised errors go. The file's own names become numbers, in the order in which they
    first occur, so that a renamed variable is the same and two exchanged ones are not; names from elsewhere become places.

    Args:
        bound: names that the file binds.
        own: attributes that the project or the user's files define.
        imported: what stands for each name that is imported.
        attributes: what stands for each attribute that is defined in another file.
        parameters: names of the parameters of functions and classes, by their names; None to number keywords.
    """

    def __init__(
        self,
        bound: frozenset[str],
        own: frozenset[str],
        imported: dict[str, str],
        attributes: dict[str, str],
        parameters: dict[str, list[list[str]]] | None,
    ) -> None:
        self.bound, self.own, self.imported, self.attributes = bound, own, imported, attributes
        self.parameters = parameters
        self.numbers: dict[str, str] = {}

    def number(self, name: str) -> str:
        """A name's number."""
        return self.numbers.setdefault(name, f"#{len(self.numbers)}")

    def name(self, name: str) -> str:
        """What stands for a variable, a function or a class."""
        if name in self.imported:
            return self.imported[name]
        return self.number(name) if name in self.bound else name

    def attribute(self, name: str) -> str:
        """What stands for an attribute."""
        if name in self.attributes:
            return self.attributes[name]
        return self.number(name) if name in self.own else name

    def visit(self, node: ast.AST) -> Any:
        """Reduce a node and its children."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            return None
        if isinstance(node, ast.Raise):
            return ast.Raise()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.FunctionDef):
            node.name, node.returns = self.name(node.name), None
        elif isinstance(node, ast.ClassDef):
            node.name = self.name(node.name)
        elif isinstance(node, ast.arg):
            node.arg, node.annotation = self.name(node.arg), None
        elif isinstance(node, ast.AnnAssign):
            node = ast.Assign([node.target], node.value) if node.value is not None else ast.Expr(node.target)
        elif isinstance(node, ast.Call):
            self._keywords(node)
        elif isinstance(node, ast.Name):
            node.id = self.name(node.id)
        elif isinstance(node, ast.Attribute):
            node.attr = self.attribute(node.attr)
        return self.generic_visit(node)

    def _keywords(self, call: ast.Call) -> None:
        """Let the position of a parameter stand for its name, where one function of that name is known here."""
        function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        for keyword in call.keywords:
            if keyword.arg is None:
                continue
            if self.parameters is None:
                if function in self.bound or function in self.own or function == "__init__":
                    keyword.arg = self.number(keyword.arg)
                continue
            positions = {names.index(keyword.arg) for names in self.parameters.get(function, []) if keyword.arg in names}
            if len(positions) == 1:
                keyword.arg = f"%{positions.pop()}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
