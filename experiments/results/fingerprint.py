"""Fingerprints of a recipe and of its code: hashes that detect records which may be out of date.

A changed recipe invalidates a record. Changed code only requires a check (`experiments/results/check.py`). The code
fingerprint is a hash of the syntax trees of a recipe's classes and of all modules of this project that they import. It excludes
comments, docstrings, type annotations, TypedDict classes, error messages, and the names of variables and files, which do not
affect the results.
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
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from experiments import ROOT
from experiments.results.syntax_trees import Essence, dump, parse
from experiments.run.recipes import Recipe

PACKAGES = ("modules", "datamodules", "callbacks", "experiments")
INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
# Attributes of this project that objects of torch, numpy or Python also have. Their names are hashed, so that `x.mean()` and
# `x.std()` remain different.
SHARED = frozenset(
    [
        "__call__",
        "__getitem__",
        "__getstate__",
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
        "norm",
        "parameters",
        "parts",
        "relu",
        "requires_grad",
        "resize",
        "select",
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
    """Return the content of a recipe that determines the training and the metrics.

    Comments, the order of keys and the test sets, which may be added later, are excluded.
    """
    content = recipe.content
    content["data"].get("init_args", {}).pop("test", None)
    return json.loads(json.dumps(content, sort_keys=True))


def recipe_fingerprint(recipe: Recipe) -> str:
    """Return the hash of `canonical`."""
    return _hash(json.dumps(canonical(recipe), sort_keys=True))


def code_fingerprint(recipe: Recipe) -> dict[str, str]:
    """Return hashes of the classes of a recipe, including all modules of this project or of the user that they import.

    Returns:
        "training", the hash for the model and the data, and "metrics", the hash for the callbacks.

    Raises:
        UserError: a file has a syntax error.
    """
    content = canonical(recipe)
    parts = {"training": [content["model"], content["data"]], "metrics": content.get("trainer", {}).get("callbacks", [])}
    return {part: _hash_of_classes(_classes(entries)) for part, entries in parts.items()}


def user_files(recipe: Recipe) -> list[Path]:
    """List the Python files of the user that the classes of a recipe import, apart from packages."""
    files = _files([name.rpartition(".")[0] for name in _classes(canonical(recipe))])
    sources = [_source(name) for name in files if "." not in name and name not in PACKAGES]
    return [path for path in sources if path is not None and path.name != "__init__.py"]


def _hash_of_classes(classes: list[str]) -> str:
    files = _files([name.rpartition(".")[0] for name in classes])
    sources = frozenset((name, file.source) for name, file in files.items())
    if sources not in _HASHES:  # many recipes have the same classes
        own = frozenset(attribute for file in files.values() for attribute in file.attributes) - SHARED
        _HASHES[sources] = _hash(json.dumps(sorted({_file_hash(file, files, own) for file in files.values()})))
    return _HASHES[sources]


_HASHES: dict[frozenset[tuple[str, str]], str] = {}


def _classes(entry: Any) -> list[str]:
    """Return the class paths in a part of a recipe, including those in the arguments of other classes."""
    if isinstance(entry, list):
        return [name for item in entry for name in _classes(item)]
    if isinstance(entry, dict):
        own = [entry["class_path"]] if "class_path" in entry else []
        return own + [name for key, value in entry.items() if key != "class_path" for name in _classes(value)]
    return []


# Files of a recipe: those of its classes, and recursively all files that they import


@dataclass(frozen=True)
class File:
    """Definitions in a source file. Hashes contain the positions of definitions instead of their names, which may change.

    Args:
        source: text of the file.
        package: package to which relative imports refer.
        imported: module and original name of each imported name; the original name is "" for an imported module.
        definitions: position of each function, class and variable at the top level.
        attributes: position of each method, field and attribute of the classes.
        parameters: names of the parameters of the functions and classes, by function or class name.
        used: all names and attributes that occur in the file.
        bound: names of the variables, arguments, functions and classes, and of the imports from this project.
    """

    source: str
    package: str
    imported: dict[str, tuple[str, str]]
    definitions: dict[str, int]
    attributes: dict[str, int]
    parameters: dict[str, list[list[str]]]
    used: frozenset[str]
    bound: frozenset[str]


def _files(modules: list[str]) -> dict[str, File]:
    """Return the files of modules of this project or of the user, and of all that they import, by module name.

    Raises:
        UserError: a file has a syntax error.
    """
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
            raise UserError(f"{path}, line {error.lineno}: {error.msg}. Correct the syntax") from None
        for module, member in files[name].imported.values():
            pending += [module, f"{module}.{member}"] if member else [module]
    return files


def _source(module: str) -> Path | None:
    """Return the file of a module of this project or of the user; None for the standard library and installed packages."""
    top, _, rest = module.partition(".")
    if top in sys.stdlib_module_names:
        return None
    if top in PACKAGES:
        return _own_source(module, ROOT)
    if (spec := _find_package(top, tuple(sys.path))) is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not folders:
        path = Path(spec.origin) if spec.has_location and spec.origin else None
        return path if path and path.suffix == ".py" and not rest and not _is_installed(path) else None
    return _module_in(folders, rest)


@cache
def _own_source(module: str, root: Path) -> Path | None:
    top, _, rest = module.partition(".")
    return _module_in([root / top], rest)


def _module_in(folders: list[Path], rest: str) -> Path | None:
    for folder in folders:
        path = folder.joinpath(*rest.split(".")) if rest else folder
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.exists() and not _is_installed(candidate):
                return candidate
    return None


@cache
def _find_package(name: str, path: tuple[str, ...]) -> ModuleSpec | None:
    """Find a top-level package or module in the folders of `sys.path`, without an import."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _is_installed(path: Path) -> bool:
    """Return whether a file is part of Python or of an installed package, also of one outside of `INSTALLED` (pip --target)."""
    return any(path.is_relative_to(folder) for folder in INSTALLED) or any(_has_packages(folder) for folder in path.parents)


@cache
def _has_packages(folder: Path) -> bool:
    return any(folder.glob("*.dist-info"))


@cache
def _read(source: str, package: str) -> File:
    tree = parse(source)
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
    return File(source, package, imported, definitions, attributes, parameters, frozenset(used), _bound_names(tree))


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    else:
        yield from (node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


# Hash of a file


def _file_hash(file: File, files: dict[str, File], own: frozenset[str]) -> str:
    """Return the hash of a file. Names imported from other files are replaced by the places of their definitions.

    Args:
        file: the file.
        files: all files of the classes.
        own: attributes that these files define.
    """
    imported = {alias: _place(module, member, files, own) for alias, (module, member) in file.imported.items()}
    attributes: dict[str, list[str]] = {}
    parameters: dict[str, list[list[str]]] = {}
    for other in files.values():
        for attribute in (own & file.used & other.attributes.keys()) - file.attributes.keys():
            attributes.setdefault(attribute, []).append(_place_of(other, other.attributes[attribute], own))
        for function in file.used & other.parameters.keys():
            parameters.setdefault(function, []).extend(other.parameters[function])
    joined = {attribute: ",".join(sorted(places)) for attribute, places in attributes.items()}
    return _hash_of(
        file.source, file.bound, own & file.used, _frozen(imported), _frozen(joined), json.dumps(parameters, sort_keys=True)
    )


def _place(module: str, member: str, files: dict[str, File], own: frozenset[str]) -> str:
    """Return the replacement of an imported name.

    It is the full name for a library, and the place of the definition, as a hash and a position, for one of `files`.
    """
    if f"{module}.{member}" in files:
        return _place_of(files[f"{module}.{member}"], -1, own)
    if module not in files:
        return f"{module}.{member}"
    file = files[module]
    if member in file.definitions:
        return _place_of(file, file.definitions[member], own)
    if member in file.imported:  # imported from another file
        return _place(*file.imported[member], files, own)
    return _place_of(file, -1, own)


def _place_of(file: File, position: int, own: frozenset[str]) -> str:
    return f"{_hash_of(file.source, file.bound, own & file.used, (), (), 'null')}:{position}"


Pairs = tuple[tuple[str, str], ...]


def _frozen(mapping: dict[str, str]) -> Pairs:
    return tuple(sorted(mapping.items()))


@cache
def _hash_of(
    source: str, bound: frozenset[str], own: frozenset[str], imported: Pairs, attributes: Pairs, parameters: str
) -> str:
    """Return the hash of the reduced syntax tree of a file, see `Essence`.

    With empty `imported` and `attributes`, names of other files are numbered as those of this file.
    """
    essence = Essence(bound, own, dict(imported), dict(attributes), json.loads(parameters)).visit(parse(source))
    return _hash(dump(essence))


def _bound_names(tree: ast.Module) -> frozenset[str]:
    """Return the names of the variables, arguments, functions and classes of a file, and of its imports from this project."""
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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
