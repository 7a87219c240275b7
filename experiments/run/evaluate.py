"""`darkroom validate` and `darkroom test`: measure weights."""

import os
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from experiments.run.lightning_cli import DarkroomCLI, tell
from experiments.run.weights import fill


def measure(cli: DarkroomCLI) -> None:
    """`validate` or `test`: measure weights."""
    if cli.command == "test" and cli.config.record and not os.access(Path(cli.config.record).absolute().parent, os.W_OK):
        raise UserError(f"--record: cannot write to {Path(cli.config.record).absolute().parent}")
    path = fill(cli)
    tell(f"weights   {path or 'none needed'}")
    run = cli.trainer.test if cli.command == "test" else cli.trainer.validate
    run(cli.model, cli.datamodule, verbose=False)
    say_results(cli.trainer, cli)


def say_results(trainer: Any, cli: DarkroomCLI) -> None:
    """Print the measured figures, a row a protocol, and which sets are not here."""
    if not trainer.is_global_zero:
        return
    from rich.console import Console
    from rich.table import Table

    found: dict[str, dict[str, float]] = {}
    for name, value in trainer.callback_metrics.items():
        data_set, _, protocol = name.partition("/")
        if protocol:
            found.setdefault(protocol, {})[data_set] = float(value)
    data_sets = sorted({data_set for of_protocol in found.values() for data_set in of_protocol})
    table = Table("protocol", *data_sets)
    for protocol, of_protocol in sorted(found.items()):
        table.add_row(protocol, *(f"{of_protocol[name]:.4f}" if name in of_protocol else "" for name in data_sets))
    Console().print(table)
    for line in cli.datamodule.missing_sets:
        print(f"not measured: {line}")
