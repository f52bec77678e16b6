"""Live metrics beyond train.jsonl: --track passes the numbers of every training step on to one of these.

A training run that is resumed passes all of its steps on again, since a killed process may not have written its last.
Each tracker is a function (folder of the training run) -> (what to call with each step's numbers, and at the end).
"""
import contextlib
import csv
import io
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.parallel import rank
from infra.run import append, write_text


def to_csv(folder: Path) -> tuple[Callable, Callable]:
    """train.csv: a row for each step. Where a step brings a new column, the file is written anew."""
    rows, columns = [], {}

    def log(row: dict[str, float]) -> None:
        new = row.keys() - columns.keys()
        rows.append(row)
        columns.update(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows if new else [row])
        (write_text if new else append)(folder / "train.csv", text.getvalue())

    return log, lambda: None


def to_tensorboard(folder: Path) -> tuple[Callable, Callable]:
    """Events next to train.jsonl: tensorboard --logdir runs."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder), purge_step=0, flush_secs=5)  # hides what an earlier process wrote
    return lambda row: [writer.add_scalar(name, value, row["step"]) for name, value in row.items()], writer.close


def to_wandb(folder: Path) -> tuple[Callable, Callable]:
    """A run of Weights & Biases for each folder, whose id is kept there."""
    import wandb
    kept = folder / "wandb_id"
    if not kept.exists():
        write_text(kept, secrets.token_hex(8))
    run = wandb.init(project="self-improving-reasoners", name=str(folder), dir=str(folder), id=kept.read_text(),
                     resume="allow")
    return lambda row: row["step"] >= run.step and run.log(row, step=row["step"]), run.finish  # it has those before


TRACKERS = {"csv": to_csv, "tensorboard": to_tensorboard, "wandb": to_wandb}  # by the package that each needs


@contextlib.contextmanager
def tracked(name: str, folder: Path, records: list[dict]) -> Iterator[Callable[[dict], object]]:
    """Give a function to call with each new record; records: those of the steps before."""
    if not name or rank():
        yield lambda record: None
        return
    log, finish = TRACKERS[name](folder)
    try:
        for record in records:
            log(numbers(record))
        yield lambda record: log(numbers(record))
    finally:
        finish()


def numbers(record: dict, prefix: str = "") -> dict[str, float]:
    """Flatten a record: {"step": 3, "dev": {"accuracy": 0.5}} has the numbers step and dev/accuracy."""
    found = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found
