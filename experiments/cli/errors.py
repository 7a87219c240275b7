"""Condense jsonargparse's errors to one line with the key, the value and the closest valid name."""

import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches

from datamodules.errors import escape_controls

NUMBER_TYPES = {"integer": "int", "number": "float"}  # pydantic's names and Python's


def format_cli_error(message: str, options: Iterable[str] = ()) -> str:
    """Format an error of the command line as one line.

    Args:
        message: text of jsonargparse's ArgumentError.
        options: the command's valid option names, without dashes.
    """
    if "arguments are required: input" in message:
        return "predict: --input is required. Give images, folders, or a video"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return f"unknown argument {match[1]}{_suggest(match[1].lstrip('-').partition('=')[0], options, '--')}"
    outer = _first(r'Parser key "([^"]+)"', message)
    class_path = _first(r"given class_path '([^']+)'", message)
    if name := _first(r"Option '([^']+)' is not accepted", message):
        if class_path is None:
            return f"unknown key '{name}'{_suggest(name, options)}"
        return f"unknown key '{outer}.{name}' of {class_path}{_suggest(name, parameters(class_path), f'{outer}.')}"
    if "object has no attribute 'keys'" in message and (nested := re.search(r"NestedArg\(key='(\w+)', val=(.*)\)", message)):
        return f"{outer}.{nested[1]}: {nested[2]} is not a map of arguments"
    if class_path and re.search(r"has no attribute|No module named", message):
        return f"{outer}: no class {class_path}{_suggest(class_path, _classes(class_path))}"
    values = re.findall(r"Got value: (.+)", message) or re.findall(r"Given value: (.+)", message)
    if outer and values:
        inner = re.findall(r'Parser key "([^"]+)"', message)[-1]
        key = outer if inner == outer else f"{outer}.{inner}"
        value = values[0].strip()
        if choices := [c for group in re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", message) for c in _literals(group)]:
            return f"{key}: '{value}' is not one of {', '.join(choices)}{_suggest(value, choices)}"
        if "Not of type ClosedUnitInterval" in message:
            return f"{key}: '{value}' is not a number from 0 to 1"
        if bound := re.search(r"Input should be ((?:greater|less) than(?: or equal to)?)(?: (\S+))? \[type", message):
            limit = bound[2] or _first(r"Annotated\[\w+, \w+\(\w+=([^)]+)\)", message)  # an optional number
            return f"{key}: {value} must be {bound[1]} {limit}"
        kinds = [kind for kind in re.findall(r"Expected an? <class '([^']+)'>", message) if kind != "NoneType"]
        kinds += [NUMBER_TYPES[kind] for kind in re.findall(r"Input should be a valid (integer|number)", message)]
        if any("Sequence" in kind for kind in kinds):
            return f"{key}: '{value}' is not a list; write [{value}]"
        if kinds:
            return f"{key}: '{value}' is not of type {' or '.join(kinds)}"
    return " ".join(message.split())


def one_line(message: str) -> str:
    """Return a message on one line without control characters, and without the traceback that a loader process adds to it."""
    if message.startswith("Caught ") and "Traceback (most recent call last)" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return escape_controls(" ".join(message.split())) or "an error without a message"


def _suggest(name: str, valid_names: Iterable[str], prefix: str = "") -> str:
    matches = get_close_matches(name, list(valid_names), n=1, cutoff=0.4)
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else ""


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _literals(literals: str) -> list[str]:
    return [literal.strip().strip("'\"") for literal in literals.split(",")]


def parameters(class_path: str) -> list[str]:
    """List the parameters of a class's constructor; empty if the class does not exist."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []


def _classes(class_path: str) -> list[str]:
    """List the classes in the module of a class path; empty if the module does not exist."""
    module_name = class_path.rpartition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return []
    return [f"{module_name}.{name}" for name, _ in inspect.getmembers(module, inspect.isclass)]
