"""`darkroom list` and `darkroom data`: recipes, table cells and datasets."""

from rich.console import Console
from rich.table import Table

from datamodules.catalog.catalog import catalog, data_root, get_dataset
from experiments.results.tables import cells
from experiments.run.recipes import methods, recipes


def show_all() -> None:
    """Print the recipes, the state of the table cells, and the datasets."""
    console = Console()
    table = Table("recipe", "description", "weights", title="Recipes", title_justify="left")
    for recipe in recipes():
        table.add_row(recipe.name, recipe.header[0] if recipe.header else "", "committed" if recipe.weights.exists() else "")
    console.print(table)

    states_shown = ("reproduced", "measured", "short", "stale", "broken", "not run")
    table = Table("method", "cells", *states_shown, "check due", title="Table cells", title_justify="left")
    for method in methods():
        of_method = cells(method)
        states = [cell["state"].partition(" ")[0].rstrip(",:") for cell in of_method]
        if states:
            counts = [states.count(state.partition(" ")[0]) for state in states_shown]
            due = sum(cell["checked"].startswith("check due") for cell in of_method)
            table.add_row(method, *map(str, (len(states), *counts, due)))
    console.print(table)

    table = Table("dataset", "status", "description", title=f"Datasets in {data_root()}", title_justify="left")
    for name, dataset in catalog().items():
        table.add_row(name, dataset.status(), dataset.title)
    console.print(table)


def show_data() -> None:
    """Print the catalog: the status and license of each dataset, and how to obtain those that are not available."""
    columns = ("dataset", "status", "description", "license", "how to obtain it")
    table = Table(*columns, title=f"Datasets in {data_root()}", title_justify="left")
    for name, dataset in catalog().items():
        status = dataset.status()
        table.add_row(name, status, dataset.title, dataset.licence, "" if status == "here" else dataset.install_hint())
    Console().print(table)


def get_data(name: str) -> int:
    """Download a dataset.

    Raises:
        DatasetNotFound: the dataset has no download; the message explains how to obtain it.
    """
    dataset = get_dataset(name)
    if dataset.source == "embedded":
        print(f"{name} comes with the installed packages; nothing to do")
        return 0
    from datamodules.catalog.download import download

    count = download(dataset)
    print(f"{name}: {count} files in {dataset.path}")
    return 0


def verify_data(name: str) -> int:
    """Compare a dataset with its manifest; return 1 if a file differs, is missing or cannot be read."""
    dataset = get_dataset(name)
    from datamodules.catalog.verify import verify

    problems = list(verify(dataset))
    for problem in problems:
        print(problem)
    if not problems:
        n_listed, n_expected = len(dataset.manifest()), sum(dataset.count.values())
        remark = f"; {n_expected - n_listed} more files are not in the manifest" if n_expected > n_listed else ""
        print(f"{name}: all {n_listed} files match the manifest{remark}")
    return 1 if problems else 0
