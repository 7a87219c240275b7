"""Syntax trees of source files, reduced to the parts that affect the results of the code."""

import ast
import sys
from typing import Any


def parse(source: str) -> ast.Module:
    """Parse a file without its TypedDict classes, which are type annotations: their keys are strings."""
    tree, typed_dicts = ast.parse(source), {"TypedDict"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in typed_dicts for base in node.bases):
            typed_dicts.add(node.name)
    tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef) or node.name not in typed_dicts]
    return tree


def dump(tree: ast.AST) -> str:
    """Return a syntax tree as text, the same in all versions of Python.

    Python 3.12 added type parameters to functions and classes; Python 3.13 omits empty lists by default.
    """
    for node in ast.walk(tree) if sys.version_info >= (3, 12) else ():
        if vars(node).get("type_params") == []:
            del vars(node)["type_params"]
    return ast.dump(tree, **({"show_empty": True} if sys.version_info >= (3, 13) else {}))


class Essence(ast.NodeTransformer):
    """Transformer that reduces a syntax tree to the parts that affect the results of the code.

    Imports, docstrings, type annotations and the exceptions of raise statements are removed. Names that the file binds become
    numbers, in order of first occurrence: renaming a variable does not change the tree, but exchanging two variables does.
    Names from other files are replaced by the places of their definitions.

    Args:
        bound: names that the file binds.
        own: attributes that files of the project or of the user define.
        imported: replacement of each imported name.
        attributes: replacement of each attribute that is defined in another file.
        parameters: names of the parameters of functions and classes, by function or class name; None to number keywords.
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
        """Return the number of a name."""
        return self.numbers.setdefault(name, f"#{len(self.numbers)}")

    def name(self, name: str) -> str:
        """Return the replacement of the name of a variable, a function or a class."""
        if name in self.imported:
            return self.imported[name]
        return self.number(name) if name in self.bound else name

    def attribute(self, name: str) -> str:
        """Return the replacement of the name of an attribute."""
        if name in self.attributes:
            return self.attributes[name]
        return self.number(name) if name in self.own else name

    def visit(self, node: ast.AST) -> Any:
        """Reduce a node and its children; return None for an import."""
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
        """Replace keywords by the positions of their parameters, if the positions are unambiguous."""
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
