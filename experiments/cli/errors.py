"""jsonargparse's many lines about a bad key or value, as one that names it and the nearest valid one."""

import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches

NUMBERS = {"integer": "int", "number": "float"}  # pydantic's words, and ours


def explain(message: str, options: Iterable[str] = ()) -> str:
    """One line for the user.

    Args:
        message: of jsonargparse's ArgumentError.
        options: the valid option names of the command, without dashes.
    """
    if "arguments are required: input" in message:
        return "predict needs --input PICTURE_OR_FOLDER"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return f"unknown argument {match[1]}{_nearest(match[1].lstrip('-').partition('=')[0], options, '--')}"
    outer = _first(r'Parser key "([^"]+)"', message)
    class_path = _first(r"given class_path '([^']+)'", message)
    if name := _first(r"Option '([^']+)' is not accepted", message):
        if class_path is None:
            return f"unknown key '{name}'{_nearest(name, options)}"
        return f"unknown key '{outer}.{name}' of {class_path}{_nearest(name, parameters(class_path), f'{outer}.')}"
    if class_path and re.search(r"has no attribute|No module named", message):
        return f"{outer}: no class {class_path}{_nearest(class_path, _classes(class_path))}"
    values = re.findall(r"Got value: (.+)", message) or re.findall(r"Given value: (.+)", message)
    if outer and values:
        inner = re.findall(r'Parser key "([^"]+)"', message)[-1]
        key = outer if inner == outer else f"{outer}.{inner}"
        value = values[0].strip()
        if choices := [c for group in re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", message) for c in _words(group)]:
            return f"{key}: '{value}' is not one of {', '.join(choices)}{_nearest(value, choices)}"
        if bound := re.search(r"Input should be ((?:greater|less) than(?: or equal to)?)(?: (\S+))? \[type", message):
            limit = bound[2] or _first(r"Annotated\[\w+, \w+\(\w+=([^)]+)\)", message)  # of what may also be null
            return f"{key}: {value} must be {bound[1]} {limit}"
        kinds = [kind for kind in re.findall(r"Expected an? <class '([^']+)'>", message) if kind != "NoneType"]
        kinds += [NUMBERS[kind] for kind in re.findall(r"Input should be a valid (integer|number)", message)]
        if any("Sequence" in kind for kind in kinds):
            return f"{key}: '{value}' is not a list; write [{value}]"
        if kinds:
            return f"{key}: '{value}' is not of type {' or '.join(kinds)}"
    return " ".join(message.split())


def one_line(message: str) -> str:
    """A message without the traceback that a loader worker wraps around it."""
    lines = message.strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 else lines[-1].partition(": ")[2]


def _nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    near = get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _words(group: str) -> list[str]:
    return [word.strip().strip("'\"") for word in group.split(",")]


def parameters(class_path: str) -> list[str]:
    """What a class's constructor takes; nothing if there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []


def _classes(class_path: str) -> list[str]:
    """The classes beside a mistyped one, if its module is there."""
    module_name = class_path.rpartition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return []
    return [f"{module_name}.{name}" for name, _ in inspect.getmembers(module, inspect.isclass)]
