"""Compare speed and memory with other programs: sampling with transformers' `generate`, a DPO + NLL step with TRL.

All engines get the same random weights and work: prompts of --prompt_tokens and --new_tokens for every response (EOS
is ruled out), or the same pairs. One thing differs: TRL's `sft` term is a mean over the tokens of the batch, eq. 1's
over sequences. No engine's step computes reference log-probabilities, and tokens are those of prompt + chosen + prompt
+ rejected without padding, so the ratio is that of pairs per second. Each measurement is a process of its own, so that
its peak memory is its own; engines take turns.

    python -m tools.bench --peer_python /path/to/python                # one that has trl; about 30 minutes
    python -m tools.bench --halves sampling --shapes toy --rounds 1    # a first impression
    python -m tools.bench --preset gpu
"""
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

import irpo
from checkpoint import load_model, save_model
from data.fresh import initialize
from infra.config import Options, option, parse_config
from infra.parallel import device
from infra.run import run_card, run_script, write_json, write_text
from irpo import Pair, preference_loss
from model import Llama, ModelConfig
from sample import generate
from train import fit

SHAPES = {  # random weights
    "toy": ModelConfig(288, 128, 336, 4, 4, 2, 32),
    "6.5m": ModelConfig(4096, 256, 704, 6, 8, 4, 32),
    "1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True)}  # Llama 3.2's
SAMPLES = {"sampling": (1, 4, 16, 32), "training": (0,)}  # responses to a prompt
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH, STEPS = 32, 8  # pairs of a training step, steps of an epoch
BOS, EOS = 1, 2
Tick = Callable[[], None]


def random_prompts(job: dict) -> list[list[int]]:
    """Draw rows / N prompts of random tokens; number i does not depend on how many there are."""
    return [random.Random(i).choices(range(3, SHAPES[job["shape"]].vocab_size), k=job["prompt_tokens"])
            for i in range(job["rows"] // job["num_samples"])]


def sample_ours(job: dict, tick: Tick) -> int:
    model = load_model(job["model"], device(), DTYPES[job["dtype"]])
    tick()
    for _ in range(2):
        groups = generate(model, random_prompts(job), num_samples=job["num_samples"],
                          max_new_tokens=job["new_tokens"], eos_ids=(), seed=0)
        tick()
    return sum(len(response.ids) for group in groups for response in group)


def sample_transformers(job: dict, tick: Tick) -> int:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["dtype"]]).to(device()).eval()
    tokens = torch.tensor(random_prompts(job), device=device())
    tick()
    for _ in range(2):
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=job["num_samples"],
                             do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                             min_new_tokens=job["new_tokens"], max_new_tokens=job["new_tokens"])
        tick()
    return out[:, tokens.shape[1]:].numel()


def random_pairs(job: dict) -> list[Pair]:
    """Draw pairs of random tokens: prompts of 60 to 100, responses of 20 to 40 where --prompt_tokens is 100."""
    draw, scale = random.Random(0), max(1, job["prompt_tokens"] // 100)

    def ids(low: int, high: int) -> list[int]:
        return draw.choices(range(3, SHAPES[job["shape"]].vocab_size), k=scale * draw.randint(low, high))

    return [Pair(str(i), [BOS, *ids(59, 99)], [*ids(19, 39), EOS], [*ids(19, 39), EOS], 0.0, 0.0)
            for i in range(BATCH * STEPS)]


def tokens_of_a_step(pairs: list[Pair]) -> float:
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs) / STEPS


def train_ours(job: dict, tick: Tick) -> float:
    """`fit` on preference_loss, as irpo.py does."""
    pairs = random_pairs(job)
    config = irpo.Config(model=job["model"], batch_size=BATCH, epochs=2, precision=job["dtype"],
                         micro_batch_tokens=job["micro_batch_tokens"])
    model = load_model(job["model"], device())
    with tempfile.TemporaryDirectory() as folder:
        fit(model, pairs, lambda model, part: preference_loss(model, part, config), config, 0, Path(folder),
            after_step=lambda step: tick() or {})
    return tokens_of_a_step(pairs)


def train_trl(job: dict, tick: Tick) -> float:
    """DPOTrainer on the same pairs as text, which its tokenizer reads word by word."""
    import datasets
    import tokenizers
    import transformers
    from trl import DPOConfig, DPOTrainer
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32,
                                                              attn_implementation=job["attention"])
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    words["t2"], words["</s>"] = len(words), EOS
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="t0")

    def text(ids: list[int]) -> str:
        return "".join(f"t{i} " for i in ids if i != EOS)

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            tick()

    pairs = random_pairs(job)
    rows = datasets.Dataset.from_list([{name: text(getattr(pair, name)) for name in ("prompt", "chosen", "rejected")}
                                       for pair in pairs])
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], beta=0.1,
            precompute_ref_log_probs=True, per_device_train_batch_size=BATCH, num_train_epochs=2, learning_rate=1e-6,
            bf16=job["dtype"] == "bf16", gradient_checkpointing=False, max_length=2048, use_cpu=device() == "cpu",
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
        trainer = DPOTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer, callbacks=[Ticks()])
        for pair, row in zip(pairs, trainer.train_dataset):
            if [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] != [pair.prompt, pair.chosen, pair.rejected]:
                raise SystemExit("TRL was given other tokens than ours")
        trainer.train()
    return tokens_of_a_step(pairs)


@dataclass(frozen=True)
class Engine:
    """A program to compare. run(job, tick) has a process of its own: it calls tick when it is ready and after each of
    several equal pieces of work, of which the first is a warm-up, and returns the tokens of one piece."""
    run: Callable[[dict, Tick], float]
    settings: dict[str, dict] = field(default_factory=lambda: {"": {}})  # name -> what is set, each measured
    packages: tuple[str, ...] = ()  # that a Python must have to run it


ENGINES = {
    "sampling": {
        "ours": Engine(sample_ours),
        "transformers": Engine(sample_transformers, {"256 rows": {"rows": 256}}, ("transformers",))},
    "training": {
        "ours": Engine(train_ours),
        "trl": Engine(train_trl, {name: {"attention": name} for name in ("sdpa", "eager")},
                      ("trl", "transformers", "datasets"))}}


def measure(job: dict) -> dict:
    """Do a job here: tokens and seconds of a piece of work, and the process's peak memory in MB."""
    ticks, engine = [], ENGINES[job["half"]][job["engine"]]
    if device() == "cpu":
        torch.set_num_threads(job["threads"])

    def tick() -> None:
        if device() == "cuda":
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    tokens = engine.run(job, tick)
    if job["half"] == "sampling" and tokens != len(random_prompts(job)) * job["num_samples"] * job["new_tokens"]:
        raise SystemExit(f"{job['engine']} sampled {tokens} tokens, not what was asked for")
    wall = median(after - before for before, after in pairwise(ticks[1:]))
    versions = {name: importlib.metadata.version(name) for name in ("torch", *engine.packages)}
    return {**job, "tokens": tokens, "wall": wall, "peak_mb": peak_memory(), "versions": versions}


def peak_memory() -> float:
    """Read the peak of this process in MB: of GPU memory, or VmHWM (ru_maxrss begins at the parent's peak)."""
    if device() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def measure_elsewhere(python: str, job: dict) -> dict:
    """Do a job in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1",
                                "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, "-m", "tools.bench", "--job", json.dumps(job)], capture_output=True, text=True,
                          env=environment)
    if done.returncode:
        raise SystemExit(f"the measurement {job} failed: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(*(result[name] for name in ("shape", "engine", "setting", "num_samples")),
          f"{result['tokens'] / result['wall']:,.0f} tokens/s, {result['peak_mb']:,.0f} MB", flush=True)
    return result


def pythons_of(half: str, peer_python: str) -> dict[str, str]:
    """Find for each engine a Python that has its packages; say which engines are left out."""
    found = {}
    for name, engine in ENGINES[half].items():
        imports = f"import {', '.join(('torch', *engine.packages))}"
        for python in filter(None, (peer_python, sys.executable)):  # the latter where both have them
            if subprocess.run([python, "-c", imports], capture_output=True).returncode == 0:
                found[name] = python
        if name not in found:
            print(f"{name} is left out: no Python with {', '.join(engine.packages)} (see --peer_python)")
    return found


def bench(half: str, shape: str, config: "Config") -> list[dict]:
    """Measure all engines and settings in turns."""
    pythons = pythons_of(half, config.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        save_model(initialize(Llama(SHAPES[shape]), 0), Path(folder) / "model")
        return [measure_elsewhere(pythons[name], asdict(config) | setting | {
                    "half": half, "shape": shape, "model": f"{folder}/model", "engine": name, "setting": setting_name,
                    "num_samples": n})
                for _ in range(config.rounds) for n in SAMPLES[half] for name in pythons
                for setting_name, setting in ENGINES[half][name].settings.items()]


def table(results: list[dict]) -> str:
    """Write Markdown: medians over rounds, and how many times as fast ours is."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        key = [result[name] for name in ("shape", "num_samples", "engine", "setting")]
        groups.setdefault(tuple(key), []).append(result)
    lines = ["| model | N | engine | setting | tokens/s (lowest to highest) | peak MB | ours is faster by |",
             "|---|---:|---|---|---:|---:|---:|"]
    for (shape, n, engine, setting), group in groups.items():
        speeds, ours = ([result["tokens"] / result["wall"] for result in found]
                        for found in (group, groups[shape, n, "ours", ""]))
        lines.append(f"| {shape} | {n or ''} | {engine} | {setting} | {median(speeds):,.0f} ({min(speeds):,.0f} to "
                     f"{max(speeds):,.0f}) | {median(result['peak_mb'] for result in group):,.0f} "
                     f"| **{median(ours) / median(speeds):.1f}** |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Config(Options):
    halves: tuple[str, ...] = option(tuple(ENGINES), "what is compared", choices=ENGINES)
    shapes: tuple[str, ...] = option(("toy", "6.5m"), "sizes of the random models", choices=SHAPES)
    rows: int = option(1024, "responses in one measurement of our sampling", low=32)
    prompt_tokens: int = option(100, "length of a prompt", low=10)
    new_tokens: int = option(64, "length of a response", low=1)
    micro_batch_tokens: int = option(4096, "of our training", low=1)
    dtype: str = option("bf16", "of all engines", choices=DTYPES)
    rounds: int = option(3, "measurements behind each median", low=1)
    threads: int = option(os.cpu_count(), "on a CPU", low=1)
    peer_python: str = option("", "a Python that has what this one lacks, like trl")
    out: str = option("results/bench", "folder of bench.md and bench.json")


PRESETS = {"gpu": dict(shapes=("1b",), prompt_tokens=512, new_tokens=512, micro_batch_tokens=16384)}


def main() -> None:
    if sys.argv[1:2] == ["--job"]:  # in a process of measure_elsewhere
        return print(json.dumps(measure(json.loads(sys.argv[2]))))
    config = parse_config(Config, PRESETS, __doc__)
    if config.peer_python and not shutil.which(config.peer_python):
        raise SystemExit(f"--peer_python {config.peer_python}: there is no such program")
    record = dict(line.split(None, 1) for line in run_card().splitlines())
    text = "# Benchmark\n\n" + "".join(f"- {name}: {value}\n" for name, value in record.items())
    text += (f"- {config.dtype}, {config.threads} threads, {config.rounds} rounds; load of the machine at the start "
             f"{os.getloadavg()[0]:.1f}\n")
    for half in config.halves:
        record[half] = [result for shape in config.shapes for result in bench(half, shape, config)]
        text += f"\n## {half.capitalize()}\n\n{table(record[half])}"
    write_json(Path(config.out) / "bench.json", record)
    write_text(Path(config.out) / "bench.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main)
