"""Config dataclass -> command line; the run directory; files that exist only when complete.

A driver declares one frozen dataclass whose fields come from `option`; the field's name is the flag,
the JSON key and the column of the report. No nesting, no config files, no globals.
"""
import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from infra import parallel

# what may differ when a run is taken up again
FREE = ("run_dir", "micro_batch_tokens", "batch_rows", "save_every", "skip_nonfinite", "shard_within_node",
        "cpu_offload", "tensor_parallel", "checkpoint_activations", "compile", "offload_reference")
LOCKS: dict[Path, typing.IO] = {}  # of the run directories that this process holds until it ends


def option(default, help: str):
    """A config field with its default and its help sentence."""
    return dataclasses.field(default=default, metadata={"help": help})


def one_of(config, **known) -> None:
    """Raise ValueError with the flag, its value and the choices if a field has none of its known values."""
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise ValueError(f"--{name} {getattr(config, name)}: choose from {', '.join(filter(None, values))}")


def at_least(config, low: float, *names: str) -> None:
    """Raise ValueError with the flag and its value if a field is below `low`."""
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"--{name} {getattr(config, name)}: must "
                             + (f"be at least {low}" if low else "not be below 0"))


def parse_config(Config, presets: dict[str, dict], doc: str, argv: list[str] | None = None):
    """A Config from the command line: the dataclass's defaults, then --preset, then flags."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=presets, help="start from these values instead of "
                            "the defaults; flags still win")
    for field in dataclasses.fields(Config):
        add_flag(parser, field, typing.get_type_hints(Config)[field.name])
    if parallel.rank():  # rank 0 tells what is wrong
        parser.error = lambda message: end(2)
    given = vars(parser.parse_args(argv))
    preset_name = given.pop("preset", None)
    preset = presets.get(preset_name, {})
    flags = {name: tuple(value) if isinstance(value, list) else value
             for name, value in given.items() if value is not None}
    if "run_dir" in given:
        names = {"": preset_name} | flags if preset_name not in (None, "toy") else flags
        flags.setdefault("run_dir", default_run_dir(Path(sys.argv[0]).stem, names))
    try:
        return Config(**{**preset, **flags})
    except ValueError as error:
        parser.error(str(error))


def default_run_dir(driver: str, flags: dict) -> str:
    """runs/, the driver, what was asked of it, and the seed: runs/irpo-alpha0.0-s0."""
    asked = [name + ("_".join(map(str, value)) if isinstance(value, tuple) else str(value))
             for name, value in flags.items()
             if name not in ("seed", "model", "path", *FREE) and "/" not in str(value)]
    if driver == "evaluate" and "model" in flags:
        asked.append("_".join(Path(flags["model"]).parts[-2:]))
    return "runs/" + "-".join([driver, *asked, f"s{flags.get('seed', 0)}"])


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind) -> None:
    text = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
    flag = f"--{field.name}"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=None,
                            help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(flag, type=typing.get_args(kind)[0], nargs="+", help=text)
    else:
        parser.add_argument(flag, type=kind, help=text)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main on all ranks; Ctrl-C and SIGTERM end it with a sentence instead of a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parallel.start()
        main()
        sys.stdout.flush()  # here, where a pipe that is closed is no surprise
        parallel.finish()
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end(0)
    except ModuleNotFoundError as error:  # an optional package; the message says how to get it
        end(f"error: {error}")
    except KeyboardInterrupt:
        end("\nstopped; files that are complete stay, and the same command makes the missing ones")
    except SystemExit as error:
        end(error.code)


def end(message: str | int | None) -> typing.NoReturn:
    """Leave with a message, which rank 0 gives for all if it has one to give."""
    if parallel.world() == 1:
        raise SystemExit(message)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if parallel.rank():
        time.sleep(10)  # torchrun ends the others when one has ended
    if isinstance(message, str):
        print(message, file=sys.stderr, flush=True)
    os._exit(message if isinstance(message, int) else message is not None)  # others may wait for this rank


@contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C and SIGTERM only ask to stop, and the function tells whether any rank was asked.

    A second Ctrl-C does not wait. Under torchrun it does: the ranks hear of Ctrl-C from torchrun alone, which
    kills them after 30 seconds.
    """
    asked: list[int] = []

    def ask(number: int, frame) -> None:
        if number == signal.SIGINT and number in asked and parallel.world() == 1:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: parallel.anywhere(bool(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_run(config, run_dir: str | Path, **inputs: str) -> Path:
    """Create a run directory, or take up one that holds the same config and inputs; refuse others.

    inputs: names and hashes of what the run is made from. The directory is this process's until it ends.
    """
    run = Path(run_dir)
    values = json.loads(json.dumps(dataclasses.asdict(config) | inputs))  # tuples as JSON has them
    parallel.by_first(lambda: claim(run, values))
    return run


def claim(run: Path, values: dict) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock(run)
        config_path = run / "config.json"
        if config_path.exists():
            refuse_changes(run, read_json(config_path), values)
            write_text(run / "command.txt", (run / "command.txt").read_text() + "\n" + run_card())
            return
        shutil.copytree(Path(__file__).parent.parent, run / "source", dirs_exist_ok=True,
                        ignore=lambda folder, names: [n for n in names if not is_source(folder, n)])
        write_text(run / "command.txt", run_card())
        write_json(config_path, values)
    except OSError as error:
        raise SystemExit(f"cannot write to {run}: {error.strerror}. Give another --run_dir.") from None


def lock(run: Path) -> None:
    """Hold the run directory until this process ends, however it ends: the system lets go of the lock then.

    So a lock file that is left over from a run that was killed is in nobody's way.
    """
    if run.resolve() in LOCKS:
        return
    file = open(run / "lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise SystemExit(f"{run} is in use: {file.read().strip() or 'by another process'}. Wait for it, or stop "
                         "it, or give another --run_dir.") from None
    except OSError as error:
        print(f"warning: {run} cannot be locked ({error.strerror}): see to it yourself that no other run uses it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}: "
               f"{' '.join(sys.argv)}\n")
    file.flush()
    LOCKS[run.resolve()] = file


def refuse_changes(run: Path, before: dict, values: dict) -> None:
    changed = {name: (before.get(name), values.get(name)) for name in {**before, **values}
               if name not in FREE and before.get(name) != values.get(name)}
    if changed:
        lines = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items()]
        raise SystemExit(f"{run} holds a run with another config or other inputs:\n" + "\n".join(lines)
                         + "\nGive another --run_dir, or remove that directory.")


def is_source(folder: str, name: str) -> bool:
    """Files of this project that a run depends on: Python outside tests."""
    return name.endswith(".py") or (Path(folder) / name).is_dir() and name in ("data", "grading", "infra", "tools")


def run_card() -> str:
    """Where, when and from which source a run was started."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                         cwd=Path(__file__).parent.parent)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    ranks = f", {parallel.world()} ranks" if parallel.world() > 1 else ""
    return (f"command  {' '.join([Path(sys.executable).name, *sys.argv])}\n"
            f"commit   {git.stdout.strip() or 'unknown'}\n"
            f"torch    {torch.__version__}, {torch.get_num_threads()} threads, {device}{ranks}\n"
            f"machine  {platform.machine()}, {os.cpu_count()} processors, {platform.platform()}\n"
            f"start    {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, on rank 0, so that it exists if and only if it is complete."""
    if parallel.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written: {error.strerror}. Make room, and the same command goes "
                         "on") from None
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def derive_seed(*names) -> int:
    """A seed that is a pure function of names such as (seed, iteration, purpose)."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def fingerprint(values: dict, sources: list[str]) -> dict:
    """What a result is made of: the config's values and a hash of each source file that matters."""
    here = Path(__file__).parent.parent
    hashes = {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in sources}
    return json.loads(json.dumps({"config": values, "source": hashes}))


def log(run: Path, **record) -> None:
    """Append one line to the run's log.jsonl: measurements of time live here and nowhere else."""
    if parallel.rank():
        return
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 1), **record}) + "\n")
