"""`darkroom list` and `darkroom data`: what there is, and what of it is here."""

from rich.console import Console
from rich.table import Table

from datamodules.catalog.catalog import catalog, data_root, get_dataset
from experiments.results.tables import cells
from experiments.run.recipes import methods, recipes


def show_all() -> None:
    """Methods with their recipes and table cells, then the data sets."""
    console = Console()
    table = Table("recipe", "what it is", "weights", title="Recipes", title_justify="left")
    for recipe in recipes():
        table.add_row(recipe.name, recipe.header[0] if recipe.header else "", "committed" if recipe.weights.exists() else "")
    console.print(table)

    states_shown = ("reproduced", "measured", "short", "stale", "not run")
    table = Table("method", "cells", *states_shown, title="Table cells", title_justify="left")
    for method in methods():
        states = [cell["state"].partition(" ")[0].rstrip(":") for cell in cells(method)]
        if states:
            counts = [states.count(state.partition(" ")[0]) for state in states_shown]
            table.add_row(method, *map(str, (len(states), *counts)))
    console.print(table)

    table = Table("data set", "here?", "what", title=f"Data below {data_root()}", title_justify="left")
    for name, data_set in catalog().items():
        table.add_row(name, data_set.status(), data_set.title)
    console.print(table)


def show_data() -> None:
    """The catalogue: which sets are here, on what terms, and how the others are had."""
    table = Table("data set", "here?", "what", "terms", "how", title=f"Data below {data_root()}", title_justify="left")
    for name, data_set in catalog().items():
        state = data_set.status()
        table.add_row(name, state, data_set.title, data_set.licence, "" if state == "here" else data_set.install_hint())
    Console().print(table)


def get_data(name: str) -> int:
    """Download a data set, or tell how it is had."""
    data_set = get_dataset(name)
    if data_set.source == "embedded":
        print(f"{name} comes with the installed packages; nothing to do")
        return 0
    from datamodules.catalog.download import download

    count = download(data_set)
    print(f"{name}: {count} files in {data_set.path}")
    return 0


def verify_data(name: str) -> int:
    """Compare a data set with its manifest; status 1 if a file differs, is missing or cannot be read."""
    data_set = get_dataset(name)
    from datamodules.catalog.verify import verify

    problems = list(verify(data_set))
    for problem in problems:
        print(problem)
    if not problems:
        known, wanted = len(data_set.manifest()), sum(data_set.count.values())
        only = f"; the manifest does not know the other {wanted - known}" if wanted > known else ""
        print(f"{name}: all {known} files are as they should be{only}")
    return 1 if problems else 0
