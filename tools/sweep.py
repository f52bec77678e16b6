"""Run the missing cells of a table in results/tables.json, and then write its report.

    python -m tools.sweep rft                                     # every cell with all seeds
    python -m tools.sweep irpo --jobs 2                           # two runs at a time, one thread each
    python -m tools.sweep rft --seeds 0 --cells k40 pool          # these and what they need; report in runs/rft-report
    python -m tools.sweep reft --list                             # cells and flags, as commands

What a run prints is in its output.txt; where one runs at a time, progress and errors are on the screen. Ctrl-C stops
the runs, and the same command resumes them. On two cores, two runs with one thread each are faster than one with two;
two with two threads each take several times as long.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from infra import InputError
from infra.run import ROOT, edited_files, read_json, run_script, source_copies

ALL = read_json(ROOT / "results" / "tables.json")
TABLES = ALL["tables"]


# --- one run, named by its directory --------------------------------------------------------------

@cache
def best_settings() -> dict[str, str]:
    """Read what tools/tune.py has found, for cells of tables."""
    found = {}
    for path in sorted(ROOT.glob("results/tune/*.json")):
        try:
            found |= {f"BEST_{path.stem}_{method}": one["best"] for method, one in read_json(path)["methods"].items()}
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is no record of tools/tune.py: remove it, or restore it") from None
    return found


def command(run: str) -> str:
    """Return what makes runs/FOLDER/CELL/sSEED or runs/NAME-sSEED: a script with flags, or another table's run that is
    also this one."""
    name, seed = re.fullmatch(r"runs/(.+)[-/]s(\d+)", run).groups()
    folder, _, cell = name.partition("/")
    text = table_of(folder)["cells"][cell] if cell else ALL["starts"][name]
    try:
        while "{" in text:  # parts have parts
            text = text.format(seed=seed, run=run, **best_settings() | ALL["parts"])
    except KeyError as error:
        raise SystemExit(f"{run} needs {error}. BEST_NAME_METHOD is found by `python -m tools.tune NAME`: "
                         "run it first") from None
    return text


def table_of(folder: str) -> dict:
    return next(table for table in TABLES.values() if table["folder"] == f"runs/{folder}")


def source(run: str) -> str:
    """Return the run whose first files this one would write, too, and copies instead, or all of whose files it has; ""
    where there is none."""
    made_by = command(run)
    if made_by.startswith("runs/"):
        return made_by
    own = any(flag in made_by for flag in ("--warmup_epochs", "--reward", "--toy_gold"))
    if own or not made_by.startswith(("irpo.py", "-m results.pairs", "reft.py")):
        return ""
    _, folder, _, seed = run.split("/")
    shared = f"runs/{table_of(folder)['shared']}/{seed}"
    return shared if shared != run else ""


def needs(run: str) -> list[str]:
    """List the runs whose files this one reads."""
    read = re.findall(r"runs/\S+?[-/]s\d+(?=[/\s]|$)", f"{command(run)} {source(run)}")
    return [other for other in dict.fromkeys(read) if other != run]


def done(run: str) -> bool:
    """Tell whether the last file is there: of a cell, a base model or labelled samples."""
    return any(Path(run, name).exists() for name in ("results.json", "model", "eval_samples.jsonl"))


def edited(run: str) -> list[str]:
    """Name the files that have been edited since a run was made, without those of other methods."""
    import irpo  # noqa: F401 (here, since they load torch, and their files and those that they load count)
    import reft  # noqa: F401
    import rft  # noqa: F401
    made_by, found = command(run), []
    others = {"irpo.py", "reft.py", "rft.py"} - {"irpo.py" if "results.pairs" in made_by else made_by.split()[0]}
    for copy in source_copies(Path(run))[-1:]:
        found += [name for name in edited_files(copy) if name not in others]
        found += [f"results/{own.name}" for own in sorted(copy.glob("own/*.py"))
                  if (now := ROOT / "results" / own.name).is_file() and now.read_bytes() != own.read_bytes()]
    return found


def has_other_flags(run: str) -> bool:
    """Tell whether a run was begun with other flags than those of its cell."""
    flags, card = command(run).partition(" --")[2], Path(run, "command.txt")
    begun = card.read_text(encoding="utf-8").partition("\n")[0] if card.exists() else ""
    return bool(flags and begun) and not begun.removesuffix(" --anyway").endswith(flags)


def refuse_other(runs: list[str], flags_too: bool = True) -> None:
    """Stop where one of these runs, or of those whose files they share, was made by other code or with other flags."""
    used = [run for run in dict.fromkeys([*runs, *map(source, runs)]) if run and done(run)]
    if old := [f"  {run}: {', '.join(names)}" for run in used if (
            names := edited(run) + ["other flags"] * (flags_too and has_other_flags(run)))]:
        sys.exit("\n".join(["these runs were made before files were edited, or with other flags:", *old,
                            "Remove the runs to make them again, or give --anyway to keep them."]))


def copy_shared(run: str) -> None:
    """Copy what the run shares; a copy that is cut off has another name."""
    for name in ("iter0",) if command(run).startswith("reft.py") else ("iter0", "iter1/samples.jsonl"):
        original, target, part = Path(source(run), name), Path(run, name), Path(run, f"{name}.tmp")
        if source(run) and not target.exists():
            shutil.rmtree(part, ignore_errors=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if original.is_dir() else shutil.copyfile)(original, part)
            part.rename(target)


def start(run: str, jobs: int, gpus: int) -> subprocess.Popen:
    """Start a run; Ctrl-C reaches it through `work` alone, since a second one would not let it save."""
    words = command(run).split()
    if words[0].startswith("runs/"):
        Path(run).parent.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(["ln", "-sfn", Path(words[0]).resolve(), run])
    copy_shared(run)
    if gpus > 1 and words[0] in ("irpo.py", "rft.py", "reft.py"):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), *words]
    Path(run).mkdir(parents=True, exist_ok=True)
    with open(Path(run, "output.txt"), "a", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=output,
                                stderr=output if jobs > 1 else None,  # None: the screen
                                env=os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}),
                                start_new_session=True)


# --- many runs ------------------------------------------------------------------------------------

def missing(runs: list[str]) -> list[str]:
    """List those of these runs, and of all that they need, that are not done."""
    runs = [run for run in runs if not done(run)]
    first = missing([other for run in runs for other in needs(run)]) if runs else []
    return [*dict.fromkeys(first + runs)]


def work(runs: list[str], jobs: int, gpus: int = 1) -> list[str]:
    """Run what is missing of these, each after those that it needs; return those that failed or could not start."""
    waiting, running, failed = missing(runs), {}, []
    try:
        while True:
            ready = [run for run in waiting if all(done(other) and other not in running for other in needs(run))]
            for run in ready[:jobs - len(running)]:
                waiting.remove(run)
                print(f"start   {run}", flush=True)
                running[run] = start(run, jobs, gpus), time.monotonic()
            if not running:
                return failed + waiting
            time.sleep(0.2)
            for run, (process, since) in [*running.items()]:
                if process.poll() is not None:
                    del running[run]
                    well = process.returncode == 0 and done(run)
                    print(f"{'done   ' if well else 'FAILED '} {run}, {(time.monotonic() - since) / 60:.1f} minutes"
                          + ("" if well else f", see {run}/output.txt"), flush=True)
                    failed += [] if well else [run]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those in results/tables.json")
    parser.add_argument("--cells", nargs="+", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 each has one thread")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, or processes, of a run, under torchrun")
    parser.add_argument("--list", action="store_true", help="only print the commands (cells of a seed share their "
                        "first files, which the first of them makes and the others copy)")
    parser.add_argument("--anyway", action="store_true", help="keep runs that were made before the code was edited")
    args = parser.parse_args()
    table = TABLES[args.table]
    cells, seeds = args.cells or [*table["cells"]], args.seeds or table["seeds"]
    if unknown := set(cells) - set(table["cells"]):
        parser.error(f"--cells {' '.join(sorted(unknown))}: choose from {' '.join(table['cells'])}")
    if min(args.jobs, args.gpus, min(seeds) + 1) < 1:
        parser.error("--jobs and --gpus start at 1, and --seeds at 0")
    runs = [f"{table['folder']}/{cell}/s{seed}" for seed in seeds for cell in cells]
    if args.list:
        print(*(f"python {made_by}" for made_by in map(command, runs) if not made_by.startswith("runs/")), sep="\n")
        return

    if not args.anyway:
        refuse_other(runs)
    if left := work(runs, args.jobs, args.gpus):
        sys.exit(f"no report, since these are missing: {' '.join(left)}")
    partial = set(cells) < set(table["cells"]) or not set(table["seeds"]) <= set(seeds)
    out = f"{table['folder']}-report" if partial else table["report"]  # a part does not replace the table in results/
    sys.exit(subprocess.call([sys.executable, "-m", "tools.report", "--table", table["folder"],
                              "--seeds", *map(str, seeds), "--out", out]))


if __name__ == "__main__":
    run_script(main)
