"""`darkroom validate` and `darkroom test`: evaluate weights."""

import os
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from experiments.run.lightning_cli import DarkroomCLI
from experiments.run.weights import load_resolved_weights


def evaluate(cli: DarkroomCLI) -> None:
    """Run `validate` or `test` and print the metrics.

    Raises:
        UserError: the record cannot be written, or there are no weights.
    """
    if cli.command == "test" and cli.config.record and not os.access(Path(cli.config.record).absolute().parent, os.W_OK):
        raise UserError(f"--record: cannot write to {Path(cli.config.record).absolute().parent}. Choose another path")
    load_resolved_weights(cli)
    run = cli.trainer.test if cli.command == "test" else cli.trainer.validate
    run(cli.model, cli.datamodule, verbose=False)
    print_results(cli.trainer, cli)


def print_results(trainer: Any, cli: DarkroomCLI) -> None:
    """Print the metrics as a table, a row for each protocol and a column for each dataset, and list the missing sets."""
    if not trainer.is_global_zero:
        return
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, dict[str, float]] = {}
    for name, value in trainer.callback_metrics.items():
        dataset, _, protocol = name.partition("/")
        if protocol:
            rows.setdefault(protocol, {})[dataset] = float(value)
    datasets = sorted({dataset for row in rows.values() for dataset in row})
    table = Table("protocol", *datasets)
    for protocol, row in sorted(rows.items()):
        table.add_row(protocol, *(f"{row[dataset]:.4f}" if dataset in row else "" for dataset in datasets))
    Console().print(table if rows else "no metric was computed: see the messages above and trainer.callbacks")
    for line in cli.datamodule.missing_sets.values():
        print(f"not evaluated: {line}")
