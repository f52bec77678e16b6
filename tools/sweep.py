"""Run the missing cells of a table, and then its report.

    python -m tools.sweep rft                                     # every cell with seeds 0, 1 and 2
    python -m tools.sweep irpo --jobs 2                           # two runs at a time, one thread each
    python -m tools.sweep rft --seeds 0 --cells k50 pool          # these and what they need; report in runs/rft-report
    python -m tools.sweep reft-tune --list                        # cells and flags, as commands

What a run prints is in its output.txt. Ctrl-C stops the runs, and the same command resumes them. On two cores, two runs
with one thread each are faster than one with two; two base models with two threads each took ten times as long.
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# --- the tables: {seed} and {run} stand for a run's seed and its directory ------------------------

IRPO = "irpo.py --preset toy --model runs/base-s{seed}/model --seed {seed} --run_dir {run} "
FROM_SFT = "--iterations 1 --start_from runs/table/sft_chosen/s{seed}/iter1/model"
SMALL = "--iterations 3 --num_questions 500 --max_pairs 1000 --lr 1e-4 --eval_questions 400 --eval_samples 0 "

RFT = "rft.py --preset toy --model runs/rft-base-s{seed}/model --seed {seed} --run_dir {run} "
POOL = RFT + "--pool runs/rft/k50/s{seed} "  # k50 samples 50 paths; other cells select from its file, or from several
SELECT = POOL + "--eval_samples 0 "

REFT = "reft.py --preset toy --model runs/base-s{seed}/model --seed {seed} --run_dir {run} "
RERANK = ("-m tools.rerank --preset toy --model runs/reft/POLICY/s{seed}/iter1/model "
          "--labelled runs/labelled-s{seed}/eval_samples.jsonl "
          "--candidates runs/reft/POLICY/s{seed}/iter1/eval_sampled.jsonl --seed {seed} --run_dir {run}")


def named(flags: list[str]) -> dict[str, str]:
    """Name cells by their flags: reft+gae_lambda@0.5 is --method reft --gae_lambda 0.5."""
    return {text.replace(" --", "+").replace(" ", "@"): f"{REFT}--method {text}" for text in flags}


STARTS = {  # runs/NAME-sSEED, which cells start from
    "base": "train.py --preset base --seed {seed} --run_dir {run}",
    "rft-base": "train.py --preset rft_base --seed {seed} --run_dir {run}",
    # other base models to pool with: width, and a seed of their own
    "rft-base-w96": "train.py --preset rft_base --hidden_size 96 --seed 1{seed} --run_dir {run}",
    "rft-base-w160": "train.py --preset rft_base --hidden_size 160 --seed 1{seed} --run_dir {run}",
    "labelled": "evaluate.py --preset toy --model runs/reft/reft/s{seed}/iter0/model --split train --limit 1000 "
                "--num_samples 8 --temperature 1 --seed {seed} --run_dir {run}",
}
FOLDERS = {  # runs/FOLDER/CELL/sSEED
    "table": {  # the paper's GSM8K table, a cell per row
        "irpo": IRPO,
        "dpo": IRPO + "--alpha 0",
        "sft_chosen": IRPO + "--method sft_chosen",
        "sft_chosen_2x": IRPO + "--method sft_chosen --iterations 1 --pairs_per_question 8 --max_pairs 4000",
        "sft_gold": IRPO + "--method sft_gold --iterations 1",
        "dpo_from_sft_chosen": f"{IRPO}--alpha 0 {FROM_SFT}",
        "irpo_from_sft_chosen": IRPO + FROM_SFT,
        "irpo_2x": IRPO + "--iterations 1 --pairs_per_question 8 --max_pairs 4000",
    },
    "sweep": {  # When does the NLL term matter? Half of the questions and pairs, and twice the learning rate
        f"alpha{alpha}-beta{beta}": f"{IRPO}{SMALL}--alpha {alpha} --beta {beta}"
        for alpha in ("0", "0.25", "0.5", "1", "2") for beta in ("0.05", "0.1", "0.5", "1")
    },
    "rft": {
        "k50": RFT,
        **{f"k{k}": f"{SELECT}--num_samples {k}" for k in (1, 3, 6, 12, 25)},
        "matched": POOL + "--steps_matched",
        "none": SELECT + "--dedup none",
        "string": SELECT + "--dedup string",
        "first": SELECT + "--select first",
        "nofilter": SELECT + "--no-equation_filter",
        "restart": SELECT + "--restart_from sft",
        "half": RFT + "--train_fraction 0.5 --eval_samples 0",
        "quarter": RFT + "--train_fraction 0.25 --eval_samples 0",
        "w96": RFT.replace("rft-base", "rft-base-w96") + "--eval_samples 0",
        "w160": RFT.replace("rft-base", "rft-base-w160") + "--eval_samples 0",
        "pool": POOL + "runs/rft/w96/s{seed} runs/rft/w160/s{seed}",
    },
    "reft": {
        "reft": REFT + "--eval_samples 8",
        "sft": REFT + "--eval_samples 8 --method sft --sft_lr 2e-4 --sft_epochs 10",
        "nokl": REFT + "--kl_coef 0",
        "offline_st": REFT + "--method offline_st --sft_lr 2e-5",
        "online_st": REFT + "--method online_st --lr 1e-5",
        "group": REFT + "--advantage group --num_samples 4 --batch_size 32",
        "nopartial": REFT + "--partial_reward 0",
        "separate": REFT + "--critic separate",
        "letters": REFT + "--num_choices 2",
        # best of 8 test samples by a reward model that starts from the policy
        "rerank-reft": RERANK.replace("POLICY", "reft"),
        "rerank-sft": RERANK.replace("POLICY", "sft"),
    },
    # settings of the baselines: the flags above are those with the best dev accuracy of seed 0
    "reft-tune": named([
        *(f"sft --sft_lr {lr} --sft_epochs 10" for lr in ("2e-5", "5e-5", "1e-4", "2e-4", "5e-4")),
        *(f"sft --sft_lr {lr} --sft_epochs 2" for lr in ("5e-5", "2e-4")),
        *(f"offline_st --sft_lr {lr} --sft_epochs 2" for lr in ("1e-5", "2e-5", "5e-5", "2e-4")),
        *(f"online_st --lr {lr}" for lr in ("1e-5", "3e-5", "1e-4", "3e-4"))]),
    # the warm-up's length and lambda, around the cell of the table above
    "reft-sweep": named([*(f"reft --warmup_epochs {epochs}" for epochs in (1, 4, 8)),
                         *(f"reft --gae_lambda {value}" for value in ("0", "0.5", "1"))]),
}
# Cells of a seed share M_0, and so its evaluation and first samples, or the warm-up: FOLDER -> the cell that makes them
SHARED = {"table": "table/irpo", "sweep": "sweep/alpha1-beta0.1",
          "reft": "reft/reft", "reft-tune": "reft/reft", "reft-sweep": "reft/reft"}
TABLES = {  # its folder, where its report goes, seeds
    "irpo": ("table", "results/irpo-table", [0, 1, 2]), "ablate-nll": ("sweep", "results/ablate-nll", [0, 1, 2]),
    "rft": ("rft", "results/rft", [0, 1, 2]), "reft": ("reft", "results/reft", [0, 1, 2]),
    "reft-tune": ("reft-tune", "results/reft/tune", [0]), "reft-sweep": ("reft-sweep", "results/reft/sweep", [0, 1, 2]),
}


# --- one run, named by its directory --------------------------------------------------------------

def command(run: str) -> str:
    """Return what makes runs/FOLDER/CELL/sSEED or runs/NAME-sSEED."""
    name, seed = re.fullmatch(r"runs/(.+)[-/]s(\d+)", run).groups()
    folder, _, cell = name.partition("/")
    return (FOLDERS[folder][cell] if cell else STARTS[name]).format(seed=seed, run=run).strip()


def source(run: str) -> str:
    """Return the run whose first files this one would write, too, and copies instead; "" where there is none."""
    made_by = command(run)
    if not made_by.startswith(("irpo.py", "reft.py")) or "--warmup_epochs" in made_by:
        return ""
    _, folder, _, seed = run.split("/")
    shared = f"runs/{SHARED[folder]}/{seed}"
    return shared if shared != run else ""


def needs(run: str) -> list[str]:
    """List the runs whose files this one reads."""
    read = re.findall(r"runs/\S+?[-/]s\d+(?=[/\s]|$)", f"{command(run)} {source(run)}")
    return [other for other in dict.fromkeys(read) if other != run]


def done(run: str) -> bool:
    """Tell whether the last file is there: of a cell, a base model or labelled samples."""
    return any(Path(run, name).exists() for name in ("results.json", "model", "eval_samples.jsonl"))


def copy_shared(run: str) -> None:
    """Copy what the run shares; a copy that is cut off has another name."""
    for name in ("iter0", "iter1/samples.jsonl") if command(run).startswith("irpo.py") else ("iter0",):
        original, target, part = Path(source(run), name), Path(run, name), Path(run, f"{name}.tmp")
        if source(run) and not target.exists():
            shutil.rmtree(part, ignore_errors=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if original.is_dir() else shutil.copyfile)(original, part)
            part.rename(target)


def start(run: str, jobs: int, gpus: int) -> subprocess.Popen:
    """Start a run; Ctrl-C reaches it through `work` alone, since a second one would not let it save."""
    copy_shared(run)
    words = command(run).split()
    if gpus > 1 and words[0] in ("irpo.py", "rft.py", "reft.py"):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), *words]
    Path(run).mkdir(parents=True, exist_ok=True)
    with open(Path(run, "output.txt"), "a", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                env=os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}),
                                start_new_session=True)


# --- many runs ------------------------------------------------------------------------------------

def missing(runs: list[str]) -> list[str]:
    """List those of these runs, and of all that they need, that are not done."""
    runs = [run for run in runs if not done(run)]
    first = missing([other for run in runs for other in needs(run)]) if runs else []
    return [*dict.fromkeys(first + runs)]


def work(waiting: list[str], jobs: int, gpus: int = 1) -> list[str]:
    """Run these, each after those that it needs; return those that failed or could not start."""
    waiting, running, failed = [*waiting], {}, []
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


def report(table: str, partial: bool) -> int:
    """Write the report; return its exit status. A part of a table does not replace the table in results/."""
    folder, out, _ = TABLES[table]
    if table == "reft-sweep":  # next to the cell that it varies
        Path("runs/reft-sweep/reft").unlink(missing_ok=True)
        Path("runs/reft-sweep/reft").symlink_to("../reft/reft")
    return subprocess.call([sys.executable, "-m", "tools.report", "--table", f"runs/{folder}",
                            "--out", f"runs/{folder}-report" if partial else out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; of reft-tune 0")
    parser.add_argument("--cells", nargs="+", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 each has one thread")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, or processes, of a run, under torchrun")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    args = parser.parse_args()
    folder, _, all_seeds = TABLES[args.table]
    cells, seeds = args.cells or [*FOLDERS[folder]], args.seeds or all_seeds
    if unknown := set(cells) - set(FOLDERS[folder]):
        parser.error(f"--cells {' '.join(sorted(unknown))}: choose from {' '.join(FOLDERS[folder])}")
    if min(args.jobs, args.gpus, min(seeds) + 1) < 1:
        parser.error("--jobs and --gpus start at 1, and --seeds at 0")
    runs = [f"runs/{folder}/{cell}/s{seed}" for cell in cells for seed in seeds]
    if args.list:
        print(*(f"python {command(run)}" for run in runs), sep="\n")
        return
    if args.table == "reft-sweep":
        runs += [f"runs/reft/reft/s{seed}" for seed in seeds]

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        left = work(missing(runs), args.jobs, args.gpus)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command resumes")
    if left:
        sys.exit(f"no report, since these are missing: {' '.join(left)}")
    sys.exit(report(args.table, partial=set(cells) < set(FOLDERS[folder]) or not set(all_seeds) <= set(seeds)))


if __name__ == "__main__":
    main()
