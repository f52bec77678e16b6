"""Live metrics beyond train.jsonl: --track passes the numbers of every training step on to one of these.

A training run that is resumed passes all of its steps on again, since a killed process may not have written its last.
"""
import contextlib
import csv
import io
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.parallel import rank
from infra.run import append, write_text


class Table:
    """train.csv: a row for each step. Where a step brings a new column, the file is written anew."""

    def __init__(self, folder: Path) -> None:
        self.path, self.rows, self.columns = folder / "train.csv", [], []

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns += new
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(self.rows if new else [row])
        (write_text if new else append)(self.path, text.getvalue())

    def finish(self) -> None:
        pass


class TensorBoard:
    """Events next to train.jsonl: tensorboard --logdir runs."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=5)  # what was there before is hidden

    def log(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row["step"])

    def finish(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of its own for each folder, whose id is kept there."""

    def __init__(self, folder: Path) -> None:
        import wandb
        kept = folder / "wandb_id"
        if not kept.exists():
            write_text(kept, secrets.token_hex(8))
        self.run = wandb.init(project="self-improving-reasoners", name=str(folder), dir=str(folder),
                              id=kept.read_text(), resume="allow")

    def log(self, row: dict[str, float]) -> None:
        if row["step"] >= self.run.step:  # else it has that step
            self.run.log(row, step=row["step"])

    def finish(self) -> None:
        self.run.finish()


TRACKERS = {"csv": Table, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}  # by the package that each needs


@contextlib.contextmanager
def tracked(name: str, folder: Path, records: list[dict]) -> Iterator[Callable[[dict], None]]:
    """Give a function to call with each new record; records: those of the steps before."""
    if not name or rank():
        yield lambda record: None
        return
    tracker = TRACKERS[name](folder)
    try:
        for record in records:
            tracker.log(numbers(record))
        yield lambda record: tracker.log(numbers(record))
    finally:
        tracker.finish()


def numbers(record: dict, prefix: str = "") -> dict[str, float]:
    """Flatten a record: {"step": 3, "dev": {"accuracy": 0.5}} has the numbers step and dev/accuracy."""
    found = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found
