"""`darkroom list` and `darkroom data`: methods, recipes and datasets."""

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from datamodules.catalog.catalog import HELD_OUT, catalog, get_dataset
from datamodules.io.paths import data_root
from experiments.results.tables import cells
from experiments.run.recipes import Recipe, methods, recipes

STATES = ("reproduced", "measured", "short", "not comparable", "not run")  # prefixes of the states of most table cells


REFERENCE_NETWORKS = ("inception", "vgg16", "vgg19", "alexnet")  # networks of losses and metrics


def show_methods() -> None:
    """Print one line per method: number of recipes, of recipes with committed weights, and of table cells by state."""
    caption = "darkroom list METHOD describes the recipes of a method. The README defines the states of table cells."
    table = Table("method", "recipes", "weights", "table cells", caption=caption, caption_justify="left")
    for method in methods():
        of_method, of_cells = _recipes_of(method), cells(method, check=False)
        states = [cell["state"] for cell in of_cells]
        counts = {state: sum(text.startswith(state) for text in states) for state in STATES}
        counts["stale or broken"] = len(states) - sum(counts.values())
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        weights = sum(recipe.weights.exists() for recipe in of_method)
        table.add_row(method, str(len(of_method)), str(weights or ""), summary)
    Console().print(table)


def show_method(method: str) -> None:
    """Print the purpose, expected value, time, command and data of each recipe of a method."""
    console = Console()
    for recipe in _recipes_of(method):
        console.print(f"[bold]{escape(recipe.name)}[/bold]{'  (weights committed)' if recipe.weights.exists() else ''}")
        for line in recipe.header:
            console.print(Padding(escape(line), (0, 0, 0, 4)))
        data = recipe.content["data"].get("init_args", {})
        names = [data.get("train"), data.get("images"), data.get("val"), *data.get("test", [])]
        listed = ", ".join(f"{name} ({_status(name)})" for name in dict.fromkeys(filter(None, names)))
        console.print(Padding(escape(f"Data: {listed or 'none'}"), (0, 0, 1, 4)))


def _recipes_of(method: str) -> list[Recipe]:
    return [recipe for recipe in recipes() if recipe.name.startswith(f"{method}/")]


def _status(spec: str) -> str:
    if spec == HELD_OUT:
        return "a share of the training images"
    dataset = catalog().get(spec.partition("/")[0])
    return dataset.status() if dataset else "a folder"


def show_data() -> None:
    """Print the catalog: status, description and license of each dataset, and installation instructions."""
    table = Table("dataset", "status", title=f"Datasets in {data_root()}", title_justify="left")
    table.add_column("description, license, installation", overflow="fold")  # keep long addresses complete
    for name, dataset in catalog().items():
        status = dataset.status()
        lines = [f"[bold]{escape(dataset.title)}[/bold]", escape(f"License: {dataset.license}")]
        lines += [] if status == "installed" else [escape(f"To install: {dataset.install_hint()}")]
        table.add_row(name, status, "\n".join(lines))
    Console().print(table)
    networks = ", ".join(REFERENCE_NETWORKS)
    print(f"Weights of networks that compute losses and metrics ({networks}): darkroom data get NAME")


def get_data(name: str) -> int:
    """Download a dataset, or the weights of a reference network, and return the exit status 0.

    Raises:
        DatasetNotFound: the dataset must be installed manually, or the download failed; the message contains instructions.
        UserError: unknown dataset, or the download of weights failed.
    """
    if name in REFERENCE_NETWORKS:
        from callbacks.metrics.perceptual_distance import ALEXNET_URL
        from modules.networks.feature_extractors import Inception
        from modules.networks.pretrained import find_or_download
        from modules.networks.vgg import URLS

        path = find_or_download(name, {**URLS, "inception": Inception.url, "alexnet": ALEXNET_URL}[name], None)
        print(f"{name}: {path}")
        return 0
    dataset = get_dataset(name)
    if dataset.source == "embedded":
        print(f"{name} is included in the installed packages; nothing to do")
        return 0
    from datamodules.catalog.download import download

    count = download(dataset)
    print(f"{name}: {count} files in {dataset.path}")
    return 0


def verify_data(name: str) -> int:
    """Compare a dataset with its manifest; return the exit status 1 if a file differs, is missing or cannot be read, else 0."""
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
