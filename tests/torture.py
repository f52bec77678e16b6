"""Kill SFT, IRPO and PPO with SIGKILL at random moments, run them again, and compare with an uninterrupted run.

    python tests/torture.py --out runs/torture            # 20 kills of each; or: make torture
    python tests/torture.py --out runs/torture --ranks 2

Every file must come out with the same bytes, except those that tell the time, and nothing half-written may
be left. Ends with status 1 if one is not so.
"""
import argparse
import filecmp
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TELL_THE_TIME = ("log.jsonl", "command.txt", "lock")
TINY = ["--preset", "base", "--toy_steps", "1", "--hidden_size", "32", "--num_layers", "1"]
SMALL = ["--preset", "smoke", "--save_every", "1", "--max_new_tokens", "48", "--num_questions", "16",
         "--eval_questions", "8", "--batch_rows", "8"]
RUNS = {  # the work that is killed; a state is saved every step or every few
    "sft": ["train.py", *TINY, "--max_steps", "60", "--save_every", "3"],
    "irpo": ["irpo.py", *SMALL],
    "ppo": ["reft.py", *SMALL]}


def start(command: list[str], folder: Path, ranks: int) -> subprocess.Popen:
    """The run FOLDER/run, started from FOLDER so that its config holds no other name."""
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / command[0]), *command[1:], "--run_dir", "run"],
                            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=open(folder / "stderr", "a"))


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait():
        raise SystemExit(f"{folder}: a run ended with status {process.returncode}; see {folder / 'stderr'}")


def kept(folder: Path) -> list[Path]:
    """The files that must be equal, relative to the folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path.name not in TELL_THE_TIME and path.parts[0] != "source")


def faults(whole: Path, killed: Path) -> list[str]:
    names = {*kept(whole), *kept(killed)}
    return ([f"{name}: differs or is missing in {killed}" for name in sorted(names)
             if not ((whole / name).is_file() and (killed / name).is_file()
                     and filecmp.cmp(whole / name, killed / name, shallow=False))]
            + [f"{path}: left over" for path in killed.rglob("*")
               if path.suffix.startswith((".tmp", ".part")) or path.name == "state"])


def torture(command: list[str], folder: Path, kills: int, ranks: int, seed: int) -> tuple[str, list[str]]:
    """Kill a command so many times, each time at a moment drawn from the length of a whole run.

    Return the row of the table (whole runs, files compared, seconds of an undisturbed run), and what differs.
    """
    whole, draw, found, runs = folder / "whole", random.Random(seed), [], 0
    folder.mkdir(parents=True)
    began = time.perf_counter()
    finish(start(command, whole, ranks), whole)
    seconds, left = time.perf_counter() - began, kills
    while left:
        killed = folder / f"killed-{runs}"
        while True:
            process = start(command, killed, ranks)
            try:
                process.wait(draw.uniform(0, seconds) if left else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                left -= 1
            else:
                break
        finish(process, killed)
        runs += 1
        found += faults(whole / "run", killed / "run")
    return f"{kills} | {runs} | {len(kept(whole / 'run'))} | {seconds:.0f}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run; all are killed at once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--model", type=Path, help="base model of IRPO and PPO; none: one is trained")
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS), help="which to kill")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists: remove it, or give another --out")
    args.out.mkdir(parents=True)
    if args.model is None and args.methods != ["sft"]:
        base = args.out / "base"
        finish(start(["train.py", *TINY, "--max_steps", "60"], base, 1), base)
        args.model = base / "run" / "model"
    bad = False
    print("| method | ranks | kills | whole runs | files compared | seconds uninterrupted | differences |")
    print("|---|---|---|---|---|---|---|")
    for method in args.methods:
        command = RUNS[method] + ([] if method == "sft" else ["--model", str(args.model.resolve())])
        row, found = torture(command, args.out / method, args.kills, args.ranks, args.seed)
        print(f"| {method} | {args.ranks} | {row} | {len(found)} |", *found, sep="\n", flush=True)
        bad |= bool(found)
    sys.exit(bad)


if __name__ == "__main__":
    main()
