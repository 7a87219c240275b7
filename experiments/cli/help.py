"""`darkroom fit RECIPE --help`: every key that can be given anew.

jsonargparse's own help has the method and its data as a class each, without their keys.
"""

import argparse
import inspect
import re
from importlib import import_module

import jsonargparse

from experiments.run.recipes import Recipe
from modules.training.method import Method

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def key_help(whole: str, recipe: Recipe) -> str:
    """What to print: the keys of the method and of its data, with the recipe's values, come last, where a terminal shows them.

    Args:
        whole: jsonargparse's help, in which they come last too.
        recipe: what the command was given.
    """
    keys = jsonargparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    for part in ("model", "data"):
        module, _, name = recipe.class_path(part).rpartition(".")
        keys.add_class_arguments(getattr(import_module(module), name), part, skip={"seed"})  # which --seed_everything gives
        given = recipe.content[part].get("init_args", {})
        keys.set_defaults({f"{part}.{key}": value for key, value in given.items() if key != "seed"})
    text = re.sub(r"  --(model|data) CONFIG .*\n|(?<=\()required,\s+", "", keys.format_help())
    common = whole.partition("\n" + (inspect.getdoc(Method) or "").partition(".")[0])[0]
    return re.sub(r"Annotated\[(\w+),\s+((?:\w+\([^)]+\),?\s*)+)\]", _bounded, f"{common}\n{text}")


def _bounded(annotated: re.Match[str]) -> str:
    """Int > 0, of Annotated[int, Gt(gt=0)]."""
    bounds = [f"{SIGNS[name]} {limit}" for name, limit in re.findall(r"\b(g[te]|l[te])=(\w+)", annotated[2])]
    return f"{annotated[1]} {', '.join(bounds)}"
