"""A DPO + NLL training step here and in TRL's DPOTrainer: tokens per second and peak memory, on the same weights.

Both train the same random Llama on the same pairs, for the same loss but for one thing: TRL's `sft` term is a
mean over the tokens of the batch, eq. 1's is a mean over sequences. TRL, too, gets its reference log-probs
beforehand and no activation checkpointing. It is run in both dtypes, with its default attention (sdpa) and with
the other one (eager), which is often faster on a CPU: the ratio is given to the faster dtype of each.

Tokens are those of both sequences of each pair (prompt + chosen + prompt + rejected), without padding, for both
sides, so that the ratio is that of pairs per second. Ours computes the prompt of a pair once; "share of the matrix
rate" counts only what it does compute: 6 FLOPs per weight (but for the embedding) and token of its rows, over the
FLOPs of a large product of the same dtype. Every measurement is a process of its own; contenders take turns.

    python -m tools.bench_train                                    # two model sizes, 3 rounds, about 17 minutes
    python -m tools.bench_train --sizes toy --rounds 1 --peer_python /path/to/python    # one that has trl
"""
import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import irpo
from tools.bench import SHAPES, hardware, peak_memory, process_memory
from checkpoint import load_model, save_model
from infra.experiment import run_script, write_json, write_text
from irpo import Pair, add_reference, preference_loss
from model import WIDTHS, Llama
from infra.parallel import device
from tools.plan import parameters
from train import fit, micro_batches

BATCH, STEPS = 32, 8
BOS, EOS = 1, 2


def make_pairs(vocab_size: int) -> list[Pair]:
    """STEPS batches of pairs of random tokens: prompts of 60 to 100 tokens, responses of 20 to 40; on a GPU
    five times as long."""
    draw, scale = random.Random(0), 5 if device() == "cuda" else 1

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(scale * draw.randint(low, high))]

    return [Pair(str(i), [BOS, *ids(59, 99)], [*ids(19, 39), EOS], [*ids(19, 39), EOS])
            for i in range(BATCH * STEPS)]


def tokens_of(pair: Pair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def now() -> float:
    """Seconds; with one thread those of CPU time, which other work on the machine changes less."""
    if device() == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """Seconds between the ends of consecutive steps; the first step is left out as a start-up."""

    def __init__(self) -> None:
        self.ends = []
        self.before = torch.cuda.memory_allocated() / 1e6 if device() == "cuda" else process_memory("VmRSS")

    def tick(self) -> None:
        self.ends.append(now())

    def result(self) -> dict:
        seconds = median(b - a for a, b in zip(self.ends, self.ends[1:]))
        peak = peak_memory(torch.device(device()))
        return {"seconds": seconds, "peak_mb": peak, "growth_mb": peak - self.before}


# --- contenders: each runs in a process of its own ------------------------------------------------

def ours(directory: str, dtype: str, kind: str) -> dict:
    """`fit` on preference_loss, as irpo.py does; kind: micro_batch_tokens."""
    model = load_model(directory, device())
    config = irpo.Config(model=directory, batch_size=BATCH, epochs=2, precision=dtype,
                         micro_batch_tokens=int(kind))
    pairs = add_reference(model, make_pairs(model.config.vocab_size), config)
    clock = Clock()
    fit(model, pairs, lambda model, batch: preference_loss(model, batch, config), lambda pair: pair.tokens,
        config, seed=0, after_step=lambda step: clock.tick() or {})
    return clock.result()


def trl(directory: str, dtype: str, kind: str) -> dict:
    """DPOTrainer on the same pairs as text, which its tokenizer reads word by word; kind: attention kernel."""
    import datasets
    import tokenizers
    import transformers
    from trl import DPOConfig, DPOTrainer
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                              attn_implementation=kind)
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    words["t2"], words["</s>"] = len(words), EOS
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="t0")

    def text(ids: list[int]) -> str:
        return "".join(f"t{i} " for i in ids if i != EOS)

    pairs = make_pairs(model.config.vocab_size)
    rows = datasets.Dataset.from_list([{"prompt": text(p.prompt), "chosen": text(p.chosen),
                                        "rejected": text(p.rejected)} for p in pairs])
    clock = Clock()

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], beta=0.1,
            precompute_ref_log_probs=True, per_device_train_batch_size=BATCH, num_train_epochs=2,
            learning_rate=1e-6, bf16=dtype == "bf16", gradient_checkpointing=False, max_length=2048,
            use_cpu=device() == "cpu", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
        trainer = DPOTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer,
                             callbacks=[Ticks()])
        example = trainer.train_dataset[0]
        if [example[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] != [
                pairs[0].prompt, pairs[0].chosen, pairs[0].rejected]:
            raise SystemExit("TRL was given other tokens than ours")
        trainer.train()
    return clock.result()


def matrix_rate(directory: str, dtype: str, kind: str) -> dict:
    """FLOP/s of a product of two square matrices."""
    n = 8192 if device() == "cuda" else 2048
    a = torch.randn(n, n, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, device=device())
    seconds = []
    for _ in range(10):
        start = now()
        a @ a
        seconds.append(now() - start)
    return {"flops": 2 * n**3 / median(seconds)}


CONTENDERS = {"ours": ours, "trl": trl, "matrix_rate": matrix_rate}


# --- the comparison -------------------------------------------------------------------------------

def run(python: str, name: str, directory: str, dtype: str, kind: str, threads: int) -> dict:
    """One measurement in a fresh process."""
    command = [python, "-m", "tools.bench_train", "--worker", name, directory, dtype, kind]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                                "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def has_trl(python: str) -> bool:
    return subprocess.run([python, "-c", "import trl, datasets"], capture_output=True).returncode == 0


def train_rows(sizes: list[str], rounds: int, threads: int, budgets: list[int], peer_python: str) -> list[dict]:
    """A row for each size and variant: medians over the rounds; the faster dtype is marked."""
    variants = [("ours", dtype, str(budget), sys.executable) for dtype in ("fp32", "bf16") for budget in budgets]
    if has_trl(peer_python):
        variants += [("trl", dtype, kernel, peer_python) for dtype in ("fp32", "bf16")
                     for kernel in ("sdpa", "eager")]
    else:
        print(f"{peer_python} has no trl: ours alone is measured (pip install trl)")
    return [row for size in sizes for row in rows_of(size, variants, rounds, threads)]


def rows_of(size: str, variants: list[tuple], rounds: int, threads: int) -> list[dict]:
    """Measurements in turns, so that a busy minute of the machine hits all variants."""
    config, pairs, rows = SHAPES[size], make_pairs(SHAPES[size].vocab_size), []
    found, peaks = {variant: [] for variant in variants}, {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Llama(config).initialize(0), Path(folder) / "model")
        for _ in range(rounds):
            for name, dtype, kind, python in variants:
                result = run(python, name, f"{folder}/model", dtype, kind, threads)
                found[name, dtype, kind, python].append(result)
                print(f"{name:5} {size} {dtype} {kind:5} {result['seconds']:.3f} s a step, {result['peak_mb']:,.0f} MB",
                      flush=True)
            for dtype, rates in peaks.items():
                rates.append(run(sys.executable, "matrix_rate", "", dtype, "", threads)["flops"])
    counts = parameters(config)
    head = counts.embedding  # as large as the head, which sees response tokens only; itself it is no product
    blocks = counts.total - counts.embedding - counts.head
    for (name, dtype, kind, _), results in found.items():
        middle = {key: median(result[key] for result in results) for key in results[0]}
        row = {"size": size, "name": name, "dtype": dtype, "kind": kind, "threads": threads, "rounds": rounds,
               "tokens_per_second": sum(map(tokens_of, pairs)) / STEPS / middle["seconds"], **middle}
        if name == "ours":
            flops = 6 * sum(blocks * pair.tokens + head * (len(pair.chosen) + len(pair.rejected))
                            for pair in pairs) / STEPS
            row["padding"] = padding(pairs, int(kind))
            row["share_of_matrix_rate"] = flops / middle["seconds"] / median(peaks[dtype])
        rows.append(row)
    for contender in (["ours"], ["trl", "sdpa"], ["trl", "eager"]):
        same = [row for row in rows if [row["name"], row["kind"]][:len(contender)] == contender]
        if same:
            max(same, key=lambda row: row["tokens_per_second"])["fastest"] = True
    return rows


def padding(pairs: list[Pair], budget: int) -> float:
    """Padded places as a share of those that hold a token."""
    places = 0
    for i in range(0, len(pairs), BATCH):
        places += sum(len(batch) * math.ceil(batch[-1].tokens / WIDTHS) * WIDTHS
                      for batch in micro_batches(pairs[i:i + BATCH], lambda pair: pair.tokens, budget))
    return places / sum(pair.tokens for pair in pairs) - 1


def table(rows: list[dict]) -> str:
    """Markdown: all rows, the fastest ones marked, and their ratios."""
    lines = ["| model | trainer | dtype | variant | tok/s | peak MB | of them by training | padding | of matrix rate |",
             "|---|---|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        extra = f"{row['padding']:.1%} | {row['share_of_matrix_rate']:.1%}" if "padding" in row else "|"
        mark = "**" if "fastest" in row else ""
        lines.append(f"| {row['size']} | {row['name']} | {row['dtype']} | {row['kind']} "
                     f"| {mark}{row['tokens_per_second']:,.0f}{mark} | {row['peak_mb']:,.0f} | {row['growth_mb']:,.0f} "
                     f"| {extra} |")
    fastest = [row for row in rows if "fastest" in row]
    ours_of = {row["size"]: row for row in fastest if row["name"] == "ours"}
    lines.append("")
    for row in fastest:
        if row["name"] == "trl":
            a = ours_of[row["size"]]
            lines.append(f"- {row['size']}: {a['tokens_per_second'] / row['tokens_per_second']:.2f} times the tokens "
                         f"per second of TRL ({row['dtype']}, {row['kind']}), {a['peak_mb'] / row['peak_mb']:.2f} of "
                         f"its peak memory, {a['growth_mb'] / row['growth_mb']:.2f} of what training adds to it")
    return "\n".join(lines) + "\n"


def main() -> None:
    cuda = device() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1b"] if cuda else ["toy", "5m"],
                        help="sizes of the random models")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant, medians over them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16384 if cuda else 4096],
                        help="--micro_batch_tokens of ours")
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has trl")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of table and JSON")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, *rest = arguments.worker
        print(json.dumps(CONTENDERS[name](*rest)))
        return
    if min(arguments.rounds, arguments.threads, *arguments.budgets) < 1:
        parser.error("--rounds, --threads and --budgets must be at least 1")
    if not shutil.which(arguments.peer_python):
        parser.error(f"--peer_python {arguments.peer_python}: there is no such program")
    arguments.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    rows = train_rows(arguments.sizes, arguments.rounds, arguments.threads, arguments.budgets, arguments.peer_python)
    write_json(arguments.out / "train.json", rows)
    head = (f"# A DPO + NLL step\n\n{hardware(device())}; torch {torch.__version__}, {arguments.threads} threads; "
            f"{BATCH} pairs a step; medians of {arguments.rounds} rounds; load of the machine at the start {load:.1f}."
            "\n\n")
    write_text(arguments.out / "train.md", head + table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_script(main)
