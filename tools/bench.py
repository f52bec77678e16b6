"""Tokens per second and memory of this repository's sampler beside transformers' `generate`.

Same random weights, same prompts (90 to 110 % of --prompt_tokens), same number of new tokens for every
response, since EOS is ruled out on both sides. Each measurement is a process of its own, so that its
peak memory is its own; a round of measurements takes both sides in turn, and the table holds medians over
rounds. Each side runs in the dtype that was fastest for it with N = 16 in a first round, `generate` also with
the batch size, of 64 and 256 rows; it is timed on one such batch, ours on --rows responses. Also measured: what
the machine can do (a matrix product, a copy), and how cost grows with the lengths of prompt and response.

    python -m tools.bench --out results/bench            # all of it; make bench
    python -m tools.bench --shapes toy --rounds 1        # a first impression

On a machine that others use too, --clock cpu counts the processor's seconds instead of the wall's.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from infra.experiment import run_script, write_json, write_text
from model import Llama, ModelConfig
from sample import generate

SHAPES = {  # random weights
    "toy": ModelConfig(288, 128, 336, 4, 4, 2, 32),
    "5m": ModelConfig(4096, 256, 704, 6, 8, 4, 32),
    "1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True),  # Llama 3.2's
}
SAMPLES = (1, 4, 16, 32)
SIDES = ("ours", "transformers")


# --- one measurement, in a process of its own -----------------------------------------------------

def random_prompts(job: dict) -> list[list[int]]:
    """Rows / N prompts of random tokens; number i is the same on both sides."""
    prompts = []
    for i in range(job["rows"] // job["num_samples"]):
        generator = torch.Generator().manual_seed(i)
        low, high = int(0.9 * job["prompt_tokens"]), int(1.1 * job["prompt_tokens"]) + 1
        length = int(torch.randint(low, high, (1,), generator=generator))
        prompts.append(torch.randint(3, SHAPES[job["shape"]].vocab_size, (length,), generator=generator).tolist())
    return prompts


def run_ours(job: dict, model: Llama):
    def run(new_tokens: int) -> int:
        groups = generate(model, random_prompts(job), num_samples=job["num_samples"], max_new_tokens=new_tokens,
                          eos_id=-1, seed=0)
        return sum(len(response.ids) for group in groups for response in group)
    return run


def run_transformers(job: dict, model: Llama):
    from transformers import LlamaConfig, LlamaForCausalLM  # a development package
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=c.tie_word_embeddings))
    weight = model.lm_head.weight
    theirs.load_state_dict(model.state_dict())
    theirs = theirs.to(device=weight.device, dtype=weight.dtype).eval()
    prompts = random_prompts(job)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=weight.device)  # padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=weight.device)

    @torch.no_grad()
    def run(new_tokens: int) -> int:
        out = theirs.generate(tokens, attention_mask=mask, num_return_sequences=job["num_samples"],
                              do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                              min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        return out[:, longest:].numel()
    return run


def measure(job: dict) -> dict:
    """Seconds (wall and processor), tokens and memory (MB: at most, and before the work) of one job."""
    device = torch.device(job["device"])
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    model = Llama(SHAPES[job["shape"]]).initialize(0).to(device, getattr(torch, job["dtype"]))
    run = {"ours": run_ours, "transformers": run_transformers}[job["side"]](job, model)
    run(job["new_tokens"])  # the first time, memory is fetched and kernels are chosen
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run(job["new_tokens"])
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    assert tokens == job["rows"] // job["num_samples"] * job["num_samples"] * job["new_tokens"]
    return {**job, "tokens": tokens, "seconds": seconds, "peak_mb": peak_memory(device)}


def peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else process_memory("VmHWM")


def process_memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB. (ru_maxrss begins at the peak of the parent process.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024 / 1e6


def measure_limits(job: dict) -> dict:
    """Measured rates of the machine: matrix products in FLOP/s, by dtype, and a copy in bytes/s (read and
    written), by the clock of job."""
    device = torch.device(job["device"])
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    size = 8192 if device.type == "cuda" else 1536

    def best(work) -> float:
        times = []
        for _ in range(8):
            start = CLOCKS[job["clock"]]()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(CLOCKS[job["clock"]]() - start)
        return min(times)
    rates = {}
    for dtype in ("float32", "bfloat16"):
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        rates[dtype] = 2 * size ** 3 / best(lambda a=a: a @ a)
    source = torch.zeros(2 ** 28, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return {**job, "flops": rates, "copy": 2 * source.numel() / best(lambda: target.copy_(source))}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def work_of(job: dict) -> tuple[float, float]:
    """(FLOPs, bytes) that a sampler with shared prompts must spend on a job: matrix products of every token
    with the weights and of every query with its keys and values; weights and caches read once a step."""
    c, dtype = SHAPES[job["shape"]], getattr(torch, job["dtype"])
    D, L, width = c.hidden_size, c.num_hidden_layers, c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    layers = L * D * (2 * width + 2 * kv + 3 * c.intermediate_size)  # weights
    head = D * c.vocab_size
    P, T, rows = job["prompt_tokens"], job["new_tokens"], job["rows"]
    questions = rows // job["num_samples"]
    steps = T - 1  # the first token comes with the prompt
    flops = 2 * layers * (questions * P + rows * steps) + 2 * head * (questions + rows * steps)
    flops += 4 * L * width * (questions * P * P / 2 + rows * steps * (P + T / 2))
    moved = steps * (layers + head + 2 * L * kv * (questions * P + rows * T / 2))
    return flops, moved * dtype.itemsize


# --- the whole table --------------------------------------------------------------------------------

def in_process(task: str, job: dict) -> dict:
    """The result of measure or measure_limits in a new Python process."""
    done = subprocess.run([sys.executable, "-m", "tools.bench", "--measure", json.dumps([task, job])], text=True,
                          stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"the measurement {job} ended with status {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    if "tokens" in result:
        print(f"{result['side']:12} {result['shape']} {result['dtype']:8} N={result['num_samples']:<3} "
              f"{result['tokens'] / result['seconds']['wall']:8,.0f} tok/s  {result['peak_mb']:6,.0f} MB", flush=True)
    return result


def bench_sampling(args: argparse.Namespace, common: dict) -> dict:
    """Both sides for every N, ours for other lengths; raw measurements, what was chosen, machine limits."""
    limits = in_process("limits", {**common, "clock": args.clock})
    chosen, runs, growth = {}, [], []
    for shape in args.shapes:
        base = {**common, "shape": shape, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
        for side in SIDES:
            tried = [in_process("sampling", {**base, "side": side, "dtype": dtype, "rows": rows, "num_samples": 16})
                     for dtype in ("float32", "bfloat16")
                     for rows in ((64, 256) if side == "transformers" else (args.rows,))]
            best = min(tried, key=lambda run: run["seconds"][args.clock] / run["tokens"])
            chosen[shape, side] = {**base, "side": side, "dtype": best["dtype"], "rows": best["rows"]}
    for _ in range(args.rounds):
        runs += [in_process("sampling", {**chosen[shape, side], "num_samples": n})
                 for shape in args.shapes for n in SAMPLES for side in SIDES]
    for shape in args.shapes:
        growth += [in_process("sampling", {**chosen[shape, "ours"], "num_samples": 16, name: value})
                   for name, factors in (("prompt_tokens", (0.5, 2, 4)), ("new_tokens", (0.5, 2, 4)))
                   for value in (int(factor * getattr(args, name)) for factor in factors)]
    return {"limits": limits, "runs": runs, "growth": growth}


def rates(runs: list[dict], clock: str, key) -> dict:
    """key(run) -> medians over rounds: tokens per second, peak memory and share of the machine's limits."""
    groups: dict = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return {name: {"rate": median(run["tokens"] / run["seconds"][clock] for run in group),
                   "low": min(run["tokens"] / run["seconds"][clock] for run in group),
                   "high": max(run["tokens"] / run["seconds"][clock] for run in group),
                   "peak_mb": median(run["peak_mb"] for run in group),
                   "seconds": median(run["seconds"][clock] for run in group),
                   "job": group[0]} for name, group in groups.items()}


def shares(result: dict, limits: dict) -> tuple[float, float]:
    """Least time for the matrix products, and for reading weights and caches, over the time it took."""
    flops, moved = work_of(result["job"])
    return (flops / limits["flops"][result["job"]["dtype"]] / result["seconds"],
            moved / limits["copy"] / result["seconds"])


def sampling_table(result: dict, clock: str) -> str:
    """Markdown: both sides by shape and N, then the growth of cost."""
    by_n = rates(result["runs"], clock, lambda run: (run["shape"], run["num_samples"], run["side"]))
    limits = result["limits"]
    lines = ["| model | N | ours, tok/s | transformers, tok/s | ratio | ours, MB | transformers, MB | of products "
             "| of bandwidth |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for shape, n in dict.fromkeys((shape, n) for shape, n, _ in by_n):
        ours, theirs = (by_n[shape, n, side] for side in SIDES)
        products, bandwidth = shares(ours, limits)
        lines.append(f"| {shape} | {n} | {ours['rate']:,.0f} ({ours['low']:,.0f} to {ours['high']:,.0f}) "
                     f"| {theirs['rate']:,.0f} ({theirs['low']:,.0f} to {theirs['high']:,.0f}) "
                     f"| **{ours['rate'] / theirs['rate']:.1f}** | {ours['peak_mb']:,.0f} | {theirs['peak_mb']:,.0f} "
                     f"| {products:.0%} | {bandwidth:.0%} |")
    used = {(run["shape"], run["side"]): f"{run['shape']}, {run['side']}: {run['dtype']}, {run['rows']} rows"
            for run in result["runs"]}
    lines += ["", "Fastest setting: " + "; ".join(used.values()) + ".", "",
              "Limits measured: matrix product " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate
                                                           in limits["flops"].items())
              + f"; copy {limits['copy'] / 1e9:,.0f} GB/s. MB: peak of the whole process.", "",
              "| model, N = 16 | prompt | response | ours, tok/s | ms per response |", "|---|---:|---:|---:|---:|"]
    grown = rates([run for run in result["runs"] if run["side"] == "ours" and run["num_samples"] == 16]
                  + result["growth"], clock, lambda run: (run["shape"], run["prompt_tokens"], run["new_tokens"]))
    for (shape, prompt, new), row in sorted(grown.items()):
        lines.append(f"| {shape} | {prompt} | {new} | {row['rate']:,.0f} | {1000 * new / row['rate']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(result: dict, clock: str, path: Path) -> None:
    import matplotlib  # optional: requirements-extras.txt
    matplotlib.use("Agg")
    from matplotlib import pyplot
    by_n = rates(result["runs"], clock, lambda run: (run["shape"], run["side"], run["num_samples"]))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for shape, style in zip(dict.fromkeys(shape for shape, _, _ in by_n), ("-", "--", ":")):
        for side, color in zip(SIDES, ("tab:blue", "tab:gray")):
            axes.plot(SAMPLES, [by_n[shape, side, n]["rate"] for n in SAMPLES], style, color=color, marker="o",
                      label=f"{shape}, {side}")
    axes.set(xscale="log", yscale="log", xlabel="responses to each prompt, N", ylabel="sampled tokens per second",
             xticks=SAMPLES, xticklabels=SAMPLES)
    axes.legend()
    figure.savefig(path, dpi=120)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of table, JSON and plot")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b"] if cuda else ["toy", "5m"],
                        help="sizes of the random models")
    parser.add_argument("--rows", type=int, default=1024, help="responses in one measurement of ours")
    parser.add_argument("--prompt_tokens", type=int, default=512 if cuda else 100, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=512 if cuda else 64, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=3, help="measurements behind each median")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds of the wall or of the processor")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        task, job = json.loads(args.measure)
        print(json.dumps({"sampling": measure, "limits": measure_limits}[task](job)))
        return
    if min(args.rows // max(SAMPLES), args.rounds, args.threads, args.new_tokens - 1, args.prompt_tokens - 4) < 1:
        parser.error(f"--rows must be at least {max(SAMPLES)}, --rounds and --threads 1, --new_tokens 2, "
                     "--prompt_tokens 5")
    if args.clock == "cpu" and (cuda or args.threads > 1):
        parser.error("--clock cpu adds up the seconds of threads and sees none of a GPU's: use it with --threads 1")
    common = {"device": "cuda" if cuda else "cpu", "threads": args.threads}
    result = {"hardware": hardware(common["device"]), "torch": torch.__version__, "command": sys.argv[1:],
              "clock": args.clock, "threads": args.threads, "load": os.getloadavg()}
    args.out.mkdir(parents=True, exist_ok=True)
    result["sampling"] = bench_sampling(args, common)
    write_json(args.out / "bench.json", result)
    text = (f"# Benchmark\n\n{result['hardware']}; torch {result['torch']}, {args.threads} threads; prompts of about "
            f"{args.prompt_tokens} tokens, {args.new_tokens} new tokens; medians (lowest to highest) of {args.rounds} "
            f"rounds by the {args.clock} clock; load of the machine at the start {result['load'][0]:.1f}.\n\n")
    write_text(args.out / "bench.md", text + sampling_table(result["sampling"], args.clock))
    plot(result["sampling"], args.clock, args.out / "bench.png")
    print(f"\n{(args.out / 'bench.md').read_text()}")


if __name__ == "__main__":
    run_script(main)
