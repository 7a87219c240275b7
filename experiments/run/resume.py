"""Resumption of a run: the checkpoint, and checks that the run continues as it was started."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run.csv_logger import TRAINING
from datamodules.errors import UserError
from experiments.run.lightning_cli import DarkroomCLI, print_rank_zero
from experiments.run.run_dir import Run
from modules.networks.weights import check_weights, read_checkpoint, read_own_file, shard_files

# Parts of a checkpoint with their types, without which a resumed run would differ from an uninterrupted one.
PARTS: dict[str, type] = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "loops": dict,
    "global_step": int,
    "images_seen": int,
    "world_size": int,
    "precision": str,
    "pending_losses": object,
    "pytorch-lightning_version": str,
}
DISK_DELAY_S = 90  # seconds that a process waits for files that other machines have written


def await_checkpoint(cli: DarkroomCLI, run: Run) -> None:
    """Wait until a process sees the checkpoint of process 0, which decides what is resumed, and all of its shards.

    A network disk can show the earlier content of a folder for up to a minute; process 0 itself can lack shards that other
    machines have written. If the wait ends without the checkpoint, `Checkpoints` refuses to start; without a shard,
    `join_shards` names it. Processes that Lightning launches are on one machine; they are not connected yet.
    """
    strategy, last = cli.trainer.strategy, run.checkpoints / "last.ckpt"
    if cli.trainer.world_size == 1 or isinstance(strategy.cluster_environment, LightningEnvironment):
        return
    strategy.setup_environment()
    decided = strategy.broadcast((last, saved_state(last)[0]))
    deadline = time.monotonic() + DISK_DELAY_S
    while decided[0] == last and saved_state(last) != (decided[1], True) and time.monotonic() < deadline:
        time.sleep(1)


def saved_state(path: Path) -> tuple[Any, bool]:
    """Return the images seen at a checkpoint, and whether all of its shards are there; None and True without a checkpoint."""
    content = read_own_file(path) if path.exists() else {}
    return content.get("images_seen"), all(file.exists() for file in shard_files(path, content))


def prepare_resume(cli: DarkroomCLI, run: Run, evaluates: bool = False) -> tuple[int, Path | None]:
    """Find the checkpoint from which the run resumes.

    A run that is trained but not yet evaluated resumes with its evaluation.

    Returns:
        Images seen at the checkpoint, and the checkpoint; 0 and None for a new run.

    Raises:
        UserError: the run is finished, was started with another configuration, has lost its last checkpoint or a part of it,
            or the disk is full.
    """
    last = run.checkpoints / "last.ckpt"
    resumed_at, checkpoint = 0, None
    for result in (run.record, run.best_checkpoint):
        if result.exists() and not last.exists():  # a new run would replace the results
            raise UserError(
                f"run '{run.folder.name}' has {result.name}, but not {last}, so it cannot be resumed. "
                "Restore that file, or choose another --run"
            )
    if last.exists():
        content = read_checkpoint(last)
        check_same_config(cli, run)
        check_complete(cli, last, content)
        resumed_at, checkpoint = content["images_seen"], last
        if resumed_at >= cli.model.total_images and (run.evaluated or (run.finished and not evaluates)):
            raise UserError(
                f"run '{run.folder.name}' is finished after {resumed_at} images. "
                "Continue it with a larger --model.total_images, or choose another --run"
            )
        print_rank_zero(f"resuming {run.folder} after {resumed_at:,} images")
        for key, value in (("world_size", cli.trainer.world_size), ("precision", str(cli.trainer.precision))):
            if content[key] != value:
                print_rank_zero(f"{key} {value} instead of {content[key]}: not bit-identical to an uninterrupted run")
    elif cli.trainer.is_global_zero and (run.image_table.exists() or (run.log.exists() and has_metrics(run.log))):
        folder = run.folder / time.strftime("earlier-%Y-%m-%d_%H-%M-%S")
        folder.mkdir()
        for path in (run.log, run.image_table, run.samples):
            if path.exists():
                path.rename(folder / path.name)
        print_rank_zero(
            f"no {last.name} in {run.folder}, so training starts from the beginning. The earlier results are in {folder}"
        )
    if (free := shutil.disk_usage(run.folder).free) < 2**28:
        raise UserError(f"{run.folder}: only {free // 2**20} MiB free. Free 256 MiB, or set DARKROOM_RUNS to another disk")
    return resumed_at, checkpoint


@rank_zero_only
def set_aside_record(cli: DarkroomCLI, run: Run, resumed_at: int) -> None:
    """Rename the record of a finished run that is continued with a larger budget; the longer run gets a new record."""
    if run.record.exists() and 0 < resumed_at < cli.model.total_images:
        run.record.rename(run.folder / f"record-{resumed_at}.json")


def has_metrics(log: Path) -> bool:
    """Return whether a log contains the metrics of a validation, and not only losses."""
    rows = (line.split(",") for line in log.read_text(errors="replace").splitlines()[1:])
    return any(len(row) == 4 and not row[2].startswith(TRAINING) for row in rows)


def check_same_config(cli: DarkroomCLI, run: Run) -> None:
    """Check that the run was started with the same model, data and monitor; RESUMABLE_KEYS may differ.

    Raises:
        UserError: a key differs.
    """
    for section in ("model", "data"):
        for key, old, new in cli.config_diff(run, section):
            raise UserError(f"run '{run.folder.name}' was started with {key} {old}, not {new}. Choose another --run")
    started = {"monitor_mode": "max", "tf32": False, **run.read_config()}
    for key in ("monitor", "monitor_mode", "seed_everything"):
        if started.get(key) != cli.config[key]:
            difference = f"{key} {started.get(key)}, not {cli.config[key]}"
            raise UserError(f"run '{run.folder.name}' was started with {difference}. Choose another --run")
    if started["tf32"] != cli.config.tf32:
        print_rank_zero(f"tf32 {cli.config.tf32} instead of {started['tf32']}: not bit-identical to an uninterrupted run")
    old, new = (str(settings["trainer"].get("strategy")) for settings in (started, cli.config))
    if old != new and "ddp_bf16" in (old, new):  # the others differ by the order of sums at most
        print_rank_zero(f"strategy {new} instead of {old}: not bit-identical to an uninterrupted run")


def check_complete(cli: DarkroomCLI, path: Path, content: Mapping[str, Any]) -> None:
    """Check that a checkpoint has all parts, and that its weights fit the model.

    Raises:
        UserError: a part is missing or has another type; the message names it.
    """
    remedy = "It is damaged, or from another version. Restore it, or choose another --run"
    data = type(cli.datamodule).__qualname__
    for name, kind in {**PARTS, data: dict}.items():
        if name not in content or not isinstance(content[name], kind) or (name == "images_seen" and content[name] < 0):
            raise UserError(f"{path}: its part '{name}' is missing or not valid. {remedy}")
    states = content["optimizer_states"]
    trained = content["images_seen"] > 0 and not cli.model.fsdp_modules
    if trained and not (states and all(isinstance(state, dict) and "state" in state for state in states)):
        raise UserError(f"{path}: its part 'optimizer_states' is empty. {remedy}")
    if not any("Checkpoints" in str(name) for name in content["callbacks"]):
        raise UserError(f"{path}: its part 'callbacks' is empty. {remedy}")
    try:
        check_weights(path, content["state_dict"], cli.model.state_dict())
    except UserError as error:
        raise UserError(f"{error}. {remedy}") from None
