"""`darkroom validate` and `darkroom test`: measure weights."""

import os
from pathlib import Path
from typing import Any

from datamodules.refused import Refused
from experiments.cli import DarkroomCLI, tell
from experiments.weights import fill


def measure(cli: DarkroomCLI) -> None:
    """`validate` or `test`: measure weights."""
    if cli.command == "test" and cli.config.record and not os.access(Path(cli.config.record).absolute().parent, os.W_OK):
        raise Refused(f"--record: cannot write to {Path(cli.config.record).absolute().parent}")
    path = fill(cli)
    tell(f"weights   {path or 'none needed'}")
    run = cli.trainer.test if cli.command == "test" else cli.trainer.validate
    run(cli.model, cli.datamodule, verbose=False)
    say_results(cli.trainer, cli)


def say_results(trainer: Any, cli: DarkroomCLI) -> None:
    """Print the measured figures, a row a data set, and which sets are not here."""
    if not trainer.is_global_zero:
        return
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, dict[str, float]] = {}
    for name, value in trainer.callback_metrics.items():
        data_set, _, protocol = name.partition("/")
        if protocol:
            rows.setdefault(data_set, {})[protocol] = float(value)
    table = Table("data set", *(columns := sorted({protocol for row in rows.values() for protocol in row})))
    for data_set, row in rows.items():
        table.add_row(data_set, *(f"{row[column]:.4f}" if column in row else "" for column in columns))
    Console().print(table)
    for line in cli.datamodule.absent:
        print(f"not measured: {line}")
