"""`darkroom fit RECIPE --help`: list every key that can be overridden.

The help of jsonargparse lists the method and the datamodule as one option each, without their keys.
"""

import argparse
import inspect
import re

import jsonargparse

from experiments.run.recipes import Recipe
from modules.training.method import Method

COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def key_help(full_help: str, recipe: Recipe) -> str:
    """Return the help text, which starts with the keys of the method and the datamodule and their values in the recipe.

    Args:
        full_help: jsonargparse's help; its sections on the method and the datamodule are replaced.
        recipe: the recipe of the command.
    """
    parser = jsonargparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    for section in ("model", "data"):
        parser.add_class_arguments(recipe.load_class(section), section, skip={"seed"})  # set by --seed_everything
        init_args = recipe.content[section].get("init_args", {})
        parser.set_defaults({f"{section}.{key}": value for key, value in init_args.items() if key != "seed"})
    text = re.sub(r"  --(model|data) CONFIG .*\n|(?<=\()required,\s+", "", parser.format_help())
    common = full_help.partition("\n" + (inspect.getdoc(Method) or "").partition(".")[0])[0]
    usage, _, options = common.partition("\n\n")
    options = options.partition("options:\n")[2]
    text = f"{usage}\n\n{text.strip()}\n\noptions of every recipe:\n{options}"
    return re.sub(r"Annotated\[(\w+),\s+((?:\w+\([^)]+\),?\s*)+)\]", _format_bounds, text)


def _format_bounds(annotated: re.Match[str]) -> str:
    """Format Annotated[int, Gt(gt=0)] as "int > 0"."""
    bounds = [f"{COMPARISONS[name]} {limit}" for name, limit in re.findall(r"\b(g[te]|l[te])=(\w+)", annotated[2])]
    return f"{annotated[1]} {', '.join(bounds)}"
