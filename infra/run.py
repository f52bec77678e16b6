"""Run directories: files that exist only once they are complete, locks, logs, seeds, and a clean way to stop.

    runs/NAME/  config.json  command.txt  source/  log.jsonl  iter1/...

Each step of a run is a file (`once`). Run the same command again and it continues at the first missing one, unless the
code is no longer that of source/.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from infra import InputError, parallel
from infra.progress import printable

ROOT = Path(__file__).resolve().parent.parent
MADE = ("config.json", "command.txt", "source", "log.jsonl", "start", "state", "model", "train.jsonl", "results.json",
        "eval_samples.jsonl", "picked.jsonl")  # of a run directory, besides iterN
LOCKS: dict[Path, object] = {}  # open lock files of the run directories that this process holds


# --- scripts ---------------------------------------------------------------------------------------

def run_script(main: Callable[[], None]) -> None:
    """Run a script's main on all ranks; Ctrl-C and SIGTERM end it with a sentence instead of a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    try:
        parallel.start()
        main()
        sys.stdout.flush()  # here, where a closed pipe is no surprise
        parallel.finish()
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parallel.leave(141)  # 128 + SIGPIPE, as a shell says it
    except InputError as error:
        parallel.leave(printable(str(error)))
    except (ModuleNotFoundError, OSError) as error:  # an optional package, or a file: the message says which
        parallel.leave(f"error: {error}")
    except KeyboardInterrupt:
        parallel.leave("\nstopped; run the same command again to continue at the first missing file")
    except SystemExit as error:
        parallel.leave(printable(error.code) if isinstance(error.code, str) else error.code)


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM only ask to stop; the function that this yields tells whether any rank was asked.

    A second Ctrl-C does not wait. (Under torchrun it does: ranks hear of Ctrl-C from torchrun alone, which kills them
    after 30 seconds.)
    """
    asked: list[int] = []

    def ask(number: int, frame) -> None:
        if number == signal.SIGINT and number in asked and parallel.world() == 1:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: any(parallel.gather(bool(asked)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:  # after the last time that somebody looked; not reached where the body has raised
        raise KeyboardInterrupt


# --- the run directory -----------------------------------------------------------------------------

def open_run(config, **inputs: str) -> Path:
    """Create config.run_dir, or resume a run with the same config, inputs and code; refuse any other.

    inputs: names and hashes of what the run is made from. The directory is locked until this process ends. With
    config.anyway the code may differ: the new one is kept, too, and log.jsonl names what has changed.
    """
    run = Path(config.run_dir)
    own = {f"{name}_file": hash_of(path) for name, path in config.own_files().items()}
    values = json.loads(json.dumps(dataclasses.asdict(config) | inputs | own))  # tuples become lists, as in the file
    free = {"run_dir", *(field.name for field in dataclasses.fields(config) if field.metadata["free"])}
    defaults = json.loads(json.dumps({field.name: field.default for field in dataclasses.fields(config)}))

    def claim() -> None:
        try:
            refuse_foreign(run)
            run.mkdir(parents=True, exist_ok=True)
            lock(run)
            if not is_run(run):
                write_json(run / "config.json", values)
            elif changed := differences(defaults | read_json(run / "config.json"), values, free):  # some may be new
                raise InputError(f"{run} holds a run with another config or other inputs:\n{changed}\n"
                                 "Give another --run_dir, or remove that directory.")
            copies = source_copies(run)
            if edited := edited_files(copies[-1]) if copies else []:
                said = f"{run} was made with other code; what differs from {copies[-1]}: {', '.join(edited)}."
                if not config.anyway:
                    raise InputError(f"{said} Give another --run_dir, or --anyway to keep what is there and go on with "
                                     "the new code.")
                print(f"warning: {said}")
                log(run, event="edited", files=edited)
            if edited or not copies:
                copy_source(run / (f"source-{len(copies) + 1}" if copies else "source"), *config.own_files().values())
            append(run / "command.txt", run_card() + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {run}: {error.strerror}. Give another --run_dir.") from None

    parallel.by_first(claim)
    return run


def is_run(folder: Path) -> bool:
    """Tell a run's config.json from that of a model, or of anything else."""
    try:
        return "run_dir" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def refuse_foreign(run: Path) -> None:
    """Stop before a run writes over what no run made, or among the files of another run."""
    if outer := [folder for folder in run.resolve().parents if is_run(folder)]:
        raise InputError(f"{run} is inside {outer[0]}, which is a run itself. Give another --run_dir.")
    if found := [name for name in MADE if os.path.lexists(run / name) and not is_run(run)]:
        raise InputError(f"{run} has {', '.join(found)}, and no run made that: there is no config.json of a run next "
                         "to it. Give another --run_dir.")


def differences(before: dict, now: dict, free: set[str] = frozenset()) -> str:
    """List the values that have changed, a line each; "" if none has."""
    return "\n".join(f"  {name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in before | now
                     if name not in free and before.get(name) != now.get(name))


def source_copies(run: Path) -> list[Path]:
    """The run's copies of the code, the newest last: source, source-2, ... source-10."""
    return sorted((path for path in run.glob("source*") if re.fullmatch(r"source(-\d+)?", path.name)),
                  key=lambda path: (len(path.name), path.name))


def edited_files(source: Path) -> list[str]:
    """Name the files of the loaded code, tools/ apart, that differ from those in a run's copy."""
    loaded = {Path(module.__file__).resolve() for module in [*sys.modules.values()] if getattr(module, "__file__", "")}
    names = [path.relative_to(ROOT) for path in sorted(loaded) if path.is_file() and path.parent in (
        ROOT, ROOT / "data", ROOT / "grading", ROOT / "infra")]
    return [str(name) for name in names if not (source / name).is_file()
            or (source / name).read_bytes() != (ROOT / name).read_bytes()]


def copy_source(folder: Path, *own_files: Path) -> None:
    """Keep the code that a run is made with, except tests, and in source/own the user's prompt and reward."""
    temporary = fresh_directory(folder)
    for room in ("", "data", "grading", "infra", "tools"):
        (temporary / room).mkdir(exist_ok=True)
        for path in (ROOT / room).iterdir():
            if path.suffix in (".py", ".json") and path.is_file():
                shutil.copyfile(path, temporary / room / path.name)
    for path in own_files:
        (temporary / "own").mkdir(exist_ok=True)
        shutil.copyfile(path, temporary / "own" / path.name)
    put_in_place(folder)


def lock(run: Path) -> None:
    """Hold the run directory until this process ends, however it ends: the system lets go of the lock then."""
    if run.resolve() in LOCKS:
        return
    file = open(run / "lock", "a+", encoding="utf-8")
    try:
        import fcntl  # here, since Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"{run} is in use: {file.read().strip() or 'by another process'}. Wait for it, or stop it, or "
                         "give another --run_dir.") from None
    except (OSError, ImportError) as error:
        print(f"warning: {run} cannot be locked ({error}): make sure that no other run uses it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}: "
               f"{' '.join(sys.argv)}\n")
    file.flush()
    LOCKS[run.resolve()] = file


def run_card() -> str:
    """Say where, when and from which source a run was started."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
        commit = git.stdout.strip()
    except OSError:  # there is no git here
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    ranks = f", {parallel.world()} ranks" if parallel.world() > 1 else ""
    return (f"command  {' '.join([Path(sys.executable).name, *sys.orig_argv[1:]])}\n"
            f"commit   {commit or 'unknown'}\n"
            f"torch    {torch.__version__}, {torch.get_num_threads()} threads, {device}{ranks}\n"
            f"machine  {platform.machine()}, {os.cpu_count()} processors, {platform.platform()}\n"
            f"start    {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")


def log(folder: Path, **record) -> None:
    """Append a line to the log.jsonl of the run that a folder belongs to; result files hold no times of their own."""
    run = next((path for path in (folder, *folder.parents) if (path / "config.json").exists()), None)
    if run:
        append(run / "log.jsonl", json.dumps({"time": round(time.time(), 1), "folder": folder.name, **record}) + "\n")


@contextlib.contextmanager
def timed(folder: Path, event: str) -> Iterator[None]:
    """Log the seconds that this takes, also where it is stopped: those of a run and of its resumption add up."""
    began = time.perf_counter()
    try:
        yield
    finally:
        log(folder, event=event, seconds=time.perf_counter() - began)


# --- steps -----------------------------------------------------------------------------------------

def once(path: Path, make: Callable[[], object], kind: type | None = None, settings: dict | None = None,
         defaults: dict | None = None):
    """Return the content of a file; where it is missing, make() it and write it first.

    .json holds any value, .jsonl a list of records of the dataclass `kind`. settings: how they were made, for the first
    line of a .jsonl, with a SHA-256 of all that follows; defaults: what a file means that does not have a setting yet.
    make() is called on all ranks.
    """
    if parallel.by_first(path.exists):
        Pieces(path).remove()
        if not kind:
            return read_json(path)
        before, records = read_records(path, kind)
        old, now = json.loads(json.dumps([(defaults or {}) | before, settings or {}]))  # tuples become lists
        if changed := differences(old, now):
            raise InputError(f"{path} was made with other settings:\n{changed}\nRemove it to make it again.")
        return records
    with timed(path.parent, path.stem):
        value = make()
        if kind:
            write_records(path, value, settings or {})
        else:
            write_json(path, value)
    Pieces(path).remove()
    parallel.barrier()
    return value


class Pieces:
    """What is finished of a file that takes hours to make: lines of FILE.part0, by rank 0, FILE.part1 ...

    made_of: all that they depend on. A piece of anything else does not count, nor does a damaged one. Without a path
    nothing is kept.
    """

    def __init__(self, path: Path | None = None, *made_of) -> None:
        self.path, self.made_of = path, hash_of(*made_of)

    def files(self) -> list[Path]:
        return [*self.path.parent.glob(f"{self.path.name}.part[0-9]*")] if self.path else []

    def read(self) -> list:
        """Return the pieces that all ranks had finished before this run."""
        lines = parallel.by_first(lambda: [line.partition(" ") for file in self.files() for line in
                                           file.read_text(encoding="utf-8", errors="replace").splitlines()])
        return [json.loads(text) for sha256, _, text in lines if sha256 == hash_of(self.made_of, text)]

    def add(self, piece) -> None:
        if self.path is None:
            return
        text, file = json.dumps(piece), self.path.with_name(f"{self.path.name}.part{parallel.rank()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(f"\n{hash_of(self.made_of, text)} {text}\n")  # a line before it may have been cut short
            flush(file)
        except OSError as error:
            raise unwritten(file, error) from None

    def computed(self, items: list, compute: Callable, label: str) -> list:
        """Do as parallel.computed, but read the results that are there already, and keep each new one as a piece."""
        found = dict(self.read())  # number of an item -> its result

        def kept(number: int):
            result = compute(items[number])
            self.add([number, result])
            return result

        left = [number for number in range(len(items)) if number not in found]
        found |= zip(left, parallel.computed(left, kept, label))
        return [found[number] for number in range(len(items))]

    def remove(self) -> None:
        if parallel.rank() == 0:
            for file in self.files():
                file.unlink()


def write_records(path: Path, records: list, settings: dict) -> None:
    rows = [dataclasses.asdict(record) for record in records]
    write_jsonl(path, [{"settings": settings, "sha256": records_hash(settings, rows)}, *rows])


def records_hash(settings: dict, rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()


def read_records(path: Path, kind: type) -> tuple[dict, list]:
    """Read (settings, records of the dataclass `kind`) from a file; InputError if it was damaged or edited."""
    lines = read_jsonl(path)
    try:
        header, *rows = lines
        settings, sha256, records = header["settings"], header["sha256"], [kind(**row) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} does not hold records of kind {kind.__name__}: {error!r}") from None
    if sha256 != records_hash(settings, rows):
        raise InputError(f"{path} was changed after it was written: its SHA-256 is not the one in its first line")
    return settings, records


# --- files -----------------------------------------------------------------------------------------

def write_text(path: Path, text: str) -> None:
    """Write a file, on rank 0, so that it exists if and only if it is complete."""
    if parallel.rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritten(path, error) from None


def append(path: Path, text: str) -> None:
    """Add lines to a file, on rank 0, in place of a last one that a full disk or a crash has cut short."""
    if parallel.rank():
        return
    try:
        with open(path, "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode())
    except OSError as error:
        raise unwritten(path, error) from None


def unwritten(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror}. Fix that, then run the same command again to "
                      "resume.")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def read_jsonl(path: Path) -> list[dict]:
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def cut_back(path: Path, steps: int) -> list[dict]:
    """Keep the rows of the first steps in a file, which is made where it is missing; InputError if it lacks one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if path.exists() else []
        rows = [json.loads(line) for line in lines]
        complete = [row["step"] for row in rows] == [*range(steps)]
    except (ValueError, TypeError, KeyError):
        complete = False
    if not complete:
        raise InputError(f"{path} does not have all of the {steps} steps that were done before. Put it back as it was, "
                         f"or remove {path.parent / 'state'} to train from the beginning.")
    write_text(path, "".join(lines))
    return rows


def fresh_directory(directory: Path) -> Path:
    """Make an empty directory to fill, which put_in_place gives its name once it is complete."""
    temporary = directory.with_name(directory.name + ".new.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(directory: Path) -> None:
    """Give a filled fresh_directory its name; the directory that had it before is removed last."""
    temporary, old = (directory.with_name(f"{directory.name}.{age}.tmp") for age in ("new", "old"))
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    if os.path.lexists(directory):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(directory, old)
    os.replace(temporary, directory)
    flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def derive_seed(*names) -> int:
    """Make a seed that is a pure function of names such as (seed, iteration, purpose)."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def hash_of(*things) -> str:
    """SHA-256 of the repr of things, and of the contents of the files (Path) among them."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            with open(thing, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
        else:
            digest.update(repr(thing).encode() + b"\0")  # else 1, 23 would equal 12, 3
    return digest.hexdigest()
