"""Reinforced Fine-Tuning (Luong et al. 2024, arXiv 2401.08967, section 3 and Algorithm 1).

    pi_0 = the base model after a few epochs of SFT on gold solutions      (warm-up)
    pi = pi_0, V = 0
    for every batch of questions:
        1. sample a response to each question from pi, at temperature 1
        2. score it: 1 if its answer is right, 0.1 if it is a wrong number, 0 if there is none
        3. one forward pass: log-probs of its tokens under pi (the old ones) and under pi_0, values V
        4. rewards: the score on the last token (the EOS action), -beta (log pi - log pi_0) on each
        5. advantages by GAE, whitened over the batch; returns = advantages + values
        6. U times: a step of Adam on the clipped policy loss + alpha * the clipped value loss
    accuracy of pi: on dev along the way, on test for the record

The paper's "lambda = 1, gamma = 0.95" swaps the names: its delta_t has gamma V(s_{t+1}), and a gamma of 0.95 would
leave 0.95^100 = 0.6 % of the reward at the first of 100 tokens. The authors' code has gamma 1 and lambda 0.95, as here.
Left out: choosing the checkpoint (the authors choose it on test). The last model is the result.

    python reft.py --preset toy --model runs/base-s0/model --run_dir runs/reft-s0
    python reft.py --preset toy --kl_coef 0 ...                         # an ablation is a flag
    python reft.py --preset toy --num_samples 4 --advantage group ...   # GRPO's advantage, without a critic
    python reft.py --preset toy --method online_st ...                  # one of the paper's baselines
    python reft.py --task gsm8k --model DIR --run_dir DIR
"""
import copy
import random
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import data
from checkpoint import flops, load_config, model_hash, sampler_of
from data.check import check_inputs
from data.task import prompt_option
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample, SampleOptions, Sampler, answer, answer_once, evaluate_model, summarize
from infra import InputError
from infra.config import option, parse_config
from infra.hardware import dtype_of
from infra.parallel import computed, device, world
from infra.progress import mean_or_max, print_above, summary
from infra.run import derive_seed, hash_of, open_run, read_jsonl, read_records, run_script, write_json
from losses import (gae, group_normalized, kl_shaped_rewards, leave_one_out, masked_mean, nll_loss, ppo_policy_loss,
                    ppo_value_loss, whiten)
from model import Llama
from rewards import READ, read_number
from train import (Example, TrainOptions, autocast, batch_at, descend, fit_sft, fitting, load_for_training, loop,
                   micro_batches, new_optimizer, num_steps, padded, response_logps, train_once)

METHODS = {"reft": "ReFT", "sft": "SFT", "offline_st": "Offline-ST", "online_st": "Online-ST"}


@dataclass(frozen=True)
class Config(TrainOptions, SampleOptions):
    """Defaults are the paper's values for GSM8K and chains of thought in words."""
    model: str = option("", "directory of the base model (make base makes the toy world's)", required=True)
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of samples and batch order", low=0, high=2**64 - 1)
    prompt: str = prompt_option("reft")
    num_questions: int = option(0, "use only the first N training questions; 0: all", low=0)
    method: str = option("reft", "reft; sft: longer SFT of the base on gold; offline_st: on gold and pi_0's right "
                         "samples; online_st: NLL of each batch's right samples and gold", METHODS)
    online_gold: bool = option(True, "online_st trains on gold solutions, too")
    warmup_epochs: int = option(2, "passes over the gold solutions; 0: --model is pi_0 itself", low=0, group="warm-up")
    sft_lr: float = option(1e-5, "peak learning rate of warm-up, sft and offline_st: up over a tenth of the "
                           "steps, then linearly to 0", above=0, high=1)
    sft_batch_size: int = option(48, "batch size of warm-up, sft and offline_st", low=1)
    batch_size: int = option(32, "questions of a batch", low=1, group="steps 1 and 2")
    num_samples: int = option(1, "responses to each question of a batch", low=1)
    max_new_tokens: int = option(400, "longest response (the paper: 700 with a question of up to 300)", low=1)
    partial_reward: float = option(0.1, "score of a wrong answer where answers are numbers")
    num_choices: int = option(0, "score numbers as multiple choice: right if equal to the right answer modulo this "
                              "number (section 4.3 on reward hacking); 0: off", low=0)
    kl_coef: float = option(0.05, "beta, of the KL penalty (the paper: 0.01 for programs)", low=0, group="steps 3 to 5")
    advantage: str = option("gae", "gae; group: score normalised within a question's samples (GRPO); rloo: minus the "
                            "mean of the others'; the last two have no critic", ("gae", "group", "rloo"))
    gamma: float = option(1.0, "discount per token, of gae", low=0, high=1)
    gae_lambda: float = option(0.95, "lambda of gae", low=0, high=1)
    critic: str = option("shared", "V is a linear map on the last hidden state of the policy (shared), or of a trained "
                         "copy of it (separate)", ("shared", "separate"))
    value_init: str = option("zero", "weights of that map: zero, or random as in the paper", ("zero", "random"))
    ppo_epochs: int = option(2, "U, passes over a batch's responses", low=1, group="step 6")
    mini_batch_size: int = option(0, "responses per optimizer step; 0: the entire batch", low=0)
    clip_range: float = option(0.2, "epsilon, of the ratio", low=0)
    value_clip_range: float = option(0.2, "how far V may move from its old value", low=0)
    vf_coef: float = option(5.0, "alpha, weight of the value loss", low=0)
    lr: float = option(3e-7, "learning rate of AdamW (the paper's 125M model: 3e-6, batches of 256)", above=0)
    warmup_steps: int = option(0, "batches over which lr rises to its value", low=0)
    epochs: int = option(300, "passes over the questions", low=1)
    max_steps: int = option(0, "stop after this many batches of questions; 0: only epochs count", low=0)
    offline_samples: int = option(100, "responses to each question", low=1, group="sft and offline_st")
    offline_paths: int = option(10, "different right ones of them to keep, drawn at random", low=1)
    sft_epochs: int = option(20, "epochs of offline_st (20: the authors' code), or of sft, on gold alone (the paper: "
                             "40)", low=1)
    eval_every: int = option(230, "batches between measurements of dev accuracy; 0: at the end only", low=0,
                             group="evaluation")
    eval_samples: int = option(0, "samples per test question at temperature 1; can be added to a finished run; "
                               "0: greedy only", low=0, free=True)
    eval_questions: int = option(0, "use only the first N dev and test questions; 0: all", low=0)
    offload_reference: bool = option(False, "keep pi_0 in the host's memory between its uses", free=True,
                                     group="engine")
    save_every: int = option(50, "steps or batches between saved states, from which a killed run resumes", low=1,
                             free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "separate" and not self.has_critic or self.num_choices and self.method != "reft":
            raise ValueError("--critic separate and --num_choices need --method reft, the first also --advantage gae")
        if self.num_choices and (self.num_choices < 2 or not self.numeric or self.reward):
            raise ValueError(f"--num_choices {self.num_choices}: at least 2, only where answers are numbers, and "
                             "without --reward")
        if self.advantage != "gae" and self.num_samples < 2:
            raise ValueError(f"--advantage {self.advantage} compares a question's samples with each other: give "
                             "--num_samples 2 or more")
        if self.method == "online_st" and (self.mini_batch_size or self.nll_norm == "token"):
            raise ValueError("--mini_batch_size and --nll_norm token: online_st trains on entire batches, with each "
                             "response's mean NLL")

    @property
    def has_critic(self) -> bool:
        return self.method == "reft" and self.advantage == "gae"

    @property
    def numeric(self) -> bool:
        return READ.get(self.kind, read_number) is read_number


TOY = dict(task="toy", prompt="plain", num_questions=100, max_new_tokens=160, sft_lr=8.1e-4, sft_epochs=16,
           sft_batch_size=8, batch_size=50, lr=7.2e-5, kl_coef=0.03, vf_coef=5.0, max_steps=80,
           offline_samples=40, eval_every=20, save_every=10)  # tuned: results/tune/warmup.json and reft.json
SMOKE = TOY | dict(num_questions=40, batch_size=16, max_steps=6, eval_every=3, offline_samples=8, eval_questions=20)


@dataclass(frozen=True)
class Rollout(Example):
    """A sampled response, what the checker says of it, and its row in the table that `measure` returns."""
    finished: bool
    right: bool
    score: float
    row: int


class Policy(nn.Module):
    """A Llama with a linear map from a last hidden state to V(s_t): actor and critic in one."""

    def __init__(self, model: Llama, config: Config) -> None:
        super().__init__()
        self.model, self.value_head = model, None
        self.critic = copy.deepcopy(model.model) if config.critic == "separate" else None
        if config.has_critic:
            D = model.config.hidden_size
            self.value_head = nn.Linear(D, 1)
            bound = D ** -0.5 if config.value_init == "random" else 0.0
            generator = torch.Generator().manual_seed(config.seed)
            for parameter in self.value_head.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            self.value_head.to(model.lm_head.weight.device)

    def forward(self, tokens: Tensor, mask: Tensor, with_entropy: bool = False) -> dict[str, Tensor]:
        """tokens (B, T), mask (B, T-1) -> float32 logps, values and (if asked for) entropy, each (B, T-1).

        Column t is about the state of tokens 0 to t and the action that is token t + 1.
        Log-probs and entropies are 0 where the mask is off. Without a critic there are no values.
        """
        hidden = self.model.model(tokens)  # (B, T, D)
        found = {"logps": self.model.score(hidden, tokens, mask)}
        if with_entropy:
            found["entropy"] = self.model.entropy(hidden, mask)
        if self.value_head is not None:
            states = self.critic(tokens) if self.critic is not None else hidden
            with torch.autocast(tokens.device.type, enabled=False):
                found["values"] = self.value_head(states[:, :-1].float()).squeeze(-1)
        return found


# --- steps 1 to 5: a batch of experience -----------------------------------------------------------

def score(sample: Sample, gold: str, config: Config) -> float:
    """Step 2. A response truncated before EOS is graded by its text like any other, and one that is copied from the
    question, or whose check took too long, has given no answer.

    With multiple choice a wrong answer earns nothing, since any guess is a letter: 0.1 would be a constant. What a
    reward of your own has given is the score.
    """
    if sample.score is not None:
        return sample.score
    if config.num_choices:
        chosen = letter(sample.answer, config.num_choices)
        return float(chosen is not None and chosen == letter(read_number(gold), config.num_choices))
    if sample.right:
        return 1.0
    return config.partial_reward if sample.verdict == "wrong" and config.numeric else 0.0


def letter(answer: str | None, num_choices: int) -> int | None:
    """Which of num_choices options a canonical answer is, if options are numbers modulo num_choices."""
    return int(answer) % num_choices if answer and re.fullmatch(r"-?\d+", answer) else None


def roll_out(model: Llama, tokenizer, problems: list[data.Problem], config: Config, step: int) -> list[Rollout]:
    """Steps 1 and 2: num_samples responses to each problem, question by question."""
    answered = answer(model, tokenizer, problems, config, num_samples=config.num_samples, temperature=1.0,
                      seed=derive_seed(config.seed, step, "rollout"), reward=True)
    sampled = [(question, sample) for question in answered for sample in question.samples]
    return [Rollout(q.id, q.prompt_ids, s.ids, s.finished, s.right, score(s, q.gold, config), row)
            for row, (q, s) in enumerate(sampled)]


@torch.no_grad()
def measure(policy: Policy, reference: Llama, rollouts: list[Rollout], parts: list[list[Rollout]],
            config: Config) -> dict[str, Tensor]:
    """Step 3: name -> (B, T-1) for mask, log-probs, values and so on, a row for each rollout; on all ranks.

    The old log-probs are not the sampler's but those of the training forward pass, in its precision, on the very
    micro-batches of step 6: so the ratios of the first update are 1 to the last bit.
    """
    def known(part: list[Rollout]) -> dict[str, Tensor]:
        with autocast(config.precision):
            tokens, mask = padded(part)
            found = {"mask": mask, **policy(tokens, mask, with_entropy=True),
                     "ref_logps": response_logps(reference, part)[0]}
        return {name: x.float().cpu() for name, x in found.items()}

    found = computed(parts, known)
    width = max(part["mask"].shape[1] for part in found)
    table = {name: torch.zeros(len(rollouts), width, device=device()) for name in found[0]}
    for part, columns in zip(parts, found):
        for name, x in columns.items():
            table[name][[rollout.row for rollout in part], :x.shape[1]] = x.to(device())
    return table


def add_advantages(table: dict[str, Tensor], scores: Tensor, config: Config) -> dict[str, Tensor]:
    """Steps 4 and 5: the table with advantages (B, T-1), and with returns if there is a critic.

    Without one, a response's score is compared with those of the question's other samples, and every token earns the
    same, minus the KL that is still to come. The KL has no part in the comparison: where all scores are equal, GRPO's
    division by their spread would blow up its noise.
    """
    mask = table["mask"]
    shaped = partial(kl_shaped_rewards, logps=table["logps"], ref_logps=table["ref_logps"], mask=mask,
                     kl_coef=config.kl_coef)
    if config.has_critic:
        advantages, returns = gae(shaped(scores), table["values"], mask, config.gamma, config.gae_lambda)
        return table | {"advantages": whiten(advantages, mask), "returns": returns}
    compare = {"group": group_normalized, "rloo": leave_one_out}[config.advantage]
    compared = compare(scores.view(-1, config.num_samples)).flatten()
    to_go, _ = gae(shaped(compared), torch.zeros_like(mask), mask, gamma=1.0, lam=1.0)
    return table | {"advantages": to_go}


def diagnose(rollouts: list[Rollout], table: dict[str, Tensor]) -> dict[str, float]:
    """What a batch says about the run. KL and length are per response, entropy is per token."""
    mask = table["mask"].bool()
    log_ratio = table["logps"] - table["ref_logps"]  # both are 0 where mask is off
    record = {"reward": fmean(r.score for r in rollouts), "accuracy": fmean(r.right for r in rollouts),
              "kl": float(log_ratio.sum(-1).mean()),  # k1, which the reward uses
              "kl_k3": float(((-log_ratio).exp() - 1 + log_ratio).sum(-1).mean()),  # never below 0
              "entropy": float(table["entropy"][mask].mean()),
              "length": fmean(len(r.response) for r in rollouts), "eos_rate": fmean(r.finished for r in rollouts)}
    if "returns" in table:
        returns, values = table["returns"][mask], table["values"][mask]
        left = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        record["explained_variance"] = 1 - float(left)
    return record


UNHEALTHY = {  # name: when a record is unhealthy (rules of thumb), and what to say
    "kl": (lambda record: record["kl"] > 20,
           "KL blow-up: responses are {kl:.1f} nats away from the warm-up model, healthy is below 20; lower --lr, "
           "or with --method reft raise --kl_coef"),
    "reference": (lambda record: record["step"] == 0 and record["kl_k3"] > 0.5,
                  "KL of {kl_k3:.2f} nats before the first update, healthy is 0 (0.5 with rounding): the reference is "
                  "not the model that is trained"),
    "entropy": (lambda record: record["entropy"] < 0.002,
                "entropy collapse: {entropy:.4f} nats per token, healthy is above 0.002; all samples are alike, and "
                "nothing new is found"),
    "eos": (lambda record: record["eos_rate"] < 0.5,
            "only {eos_rate:.0%} of the responses end in EOS, healthy is above 50%; raise --max_new_tokens or "
            "--warmup_epochs"),
    "ratio": (lambda record: record.get("first_ratio_error", 0.0) > 1e-3,
              "a ratio is off by {first_ratio_error:.1e} before the first update, healthy is below 1e-3: old and new "
              "log-probs come from different computations")}


# --- step 6 ----------------------------------------------------------------------------------------

def ppo_loss(policy: Policy, rollouts: list[Rollout], table: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Per response (B,): the loss, and what else is recorded."""
    tokens, mask = padded(rollouts)
    new = policy(tokens, mask)  # each (B, T-1)
    old = {name: x[[rollout.row for rollout in rollouts], :mask.shape[1]] for name, x in table.items()}
    loss = ppo_policy_loss(new["logps"], old["logps"], old["advantages"], mask, config.clip_range)
    off = (((new["logps"] - old["logps"]) * mask).exp() - 1).detach()
    found = {"policy_loss": loss, "ratio_max": off.amax(-1) + 1, "ratio_error": off.abs().amax(-1),
             "clip_fraction": masked_mean((off.abs() > config.clip_range).float(), mask)}
    if config.has_critic:
        found["value_loss"] = ppo_value_loss(new["values"], old["values"], old["returns"], mask,
                                             config.value_clip_range)
        loss = loss + config.vf_coef * found["value_loss"]
    return {"loss": loss, **found}


def self_training_loss(policy: Policy, examples: list[Example], right: float, gold: float) -> dict[str, Tensor]:
    """Online-ST in place of PPO: weight * NLL per response (B,), with one weight for right samples and one for gold."""
    tokens, mask = padded(examples)
    nll = nll_loss(policy(tokens, mask)["logps"], mask)
    weights = [right if isinstance(example, Rollout) else gold for example in examples]
    return {"loss": nll * nll.new_tensor(weights), "nll": nll}


def train_on(policy: Policy, reference: Llama, optimizer: torch.optim.Optimizer, rollouts: list[Rollout],
             golds: list[Example], config: Config, step: int) -> dict:
    """Steps 3 to 6 on a batch of rollouts, and its record. Online-ST trains on its right ones and on gold."""
    shuffled = list(rollouts)
    random.Random(f"{config.seed} {step}").shuffle(shuffled)
    size = config.mini_batch_size or len(shuffled)
    mini_batches = [micro_batches(shuffled[i:i + size], config.micro_batch_tokens)
                    for i in range(0, len(shuffled), size)]

    offloaded = config.offload_reference and world() == 1  # a sharded reference is fetched by FSDP as it computes
    table = measure(policy, reference.to(device()) if offloaded else reference, rollouts, sum(mini_batches, []), config)
    if offloaded:
        reference.to("cpu")

    if config.method == "reft":
        items, table = rollouts, add_advantages(table, table["mask"].new_tensor([r.score for r in rollouts]), config)
        loss = partial(ppo_loss, table=table, config=config)
    else:  # right samples and gold solutions weigh equally, as groups
        right = [rollout for rollout in rollouts if rollout.right and rollout.finished]
        items, half = right + golds, (len(right) + len(golds)) / 2
        loss = partial(self_training_loss, right=half / max(1, len(right)), gold=half / max(1, len(golds)))
        mini_batches = [micro_batches(items, config.micro_batch_tokens)] if items else []

    updates = [descend(policy, optimizer, parts, loss, config) for parts in mini_batches * config.ppo_epochs]
    record = diagnose(rollouts, table)
    for name in updates[0] if updates else ():
        record[name] = mean_or_max(name, [mean_or_max(name, update[name]) for update in updates])
    if "ratio_error" in record:
        record["first_ratio_error"] = max(updates[0]["ratio_error"])
    sampled, scored = sum(len(r.response) for r in rollouts), sum(r.tokens for r in rollouts)
    prompts = (scored - sampled) // config.num_samples  # of each question once
    passes = 0 if config.method != "reft" else 2 + (config.critic == "separate")  # policy, reference, critic
    return record | {"tokens_sampled": sampled, "tokens_forward": sampled + prompts + passes * scored,
                     "tokens": config.ppo_epochs * sum(item.tokens for item in items)}


# --- the loop, and the stages around it ------------------------------------------------------------

def reinforce(config: Config, folder: Path, start: str, tokenizer, problems: list[data.Problem],
              golds: dict[str, Example]) -> Llama:
    """ReFT, or Online-ST on the same rollouts: pi_0, in the directory `start`, becomes pi."""
    policy = load_for_training(start, config, lambda model: Policy(model, config))
    # in bfloat16 on a GPU, unless --precision fp32: there the KL before the first update is not exactly 0
    dtype = dtype_of(config.precision) if device() == "cuda" else torch.float32
    offloaded = replace(config, cpu_offload=config.cpu_offload or config.offload_reference)
    reference = load_for_training(start, offloaded, dtype=dtype).requires_grad_(False)
    optimizer, dev, warned = new_optimizer(policy, config), config.problems("dev", config.eval_questions), set()

    def sampler() -> Llama:  # not kept: a copy of all weights would be held while the policy is trained
        return sampler_of(policy.model, config.precision, config.tensor_parallel)

    def step_once(step: int) -> dict:
        batch = batch_at(step, problems, config.batch_size, config.seed)
        rollouts = roll_out(sampler(), tokenizer, batch, config, step)  # steps 1 and 2
        record = train_on(policy, reference, optimizer, rollouts,  # steps 3 to 6
                          [golds[problem.id] for problem in batch if problem.id in golds], config, step)
        record["warnings"] = {name: text.format(**record) for name, (bad, text) in UNHEALTHY.items()
                              if bad(record | {"step": step})}
        for name in record["warnings"].keys() - warned:
            print_above(f"warning at batch {step}: {record['warnings'][name]}")
            warned.add(name)
        if config.eval_every and (step + 1) % config.eval_every == 0:
            record["dev"] = summarize(answer(sampler(), tokenizer, dev, config), config.task)
            print_above(f"after {step + 1} batches: dev accuracy {record['dev']['accuracy']:.1%}")
        return record

    loop(step_once, num_steps(len(problems), config), policy, optimizer, config, folder, made_of=hash_of(*problems),
         shown=("accuracy", "kl"))
    return policy.model


def sft(config: Config, folder: Path, examples: list[Example], epochs: int) -> Llama:
    """The base model after the paper's SFT: warm-up over a tenth of the steps, linear decay."""
    options = replace(config, epochs=epochs, lr=config.sft_lr, lr_schedule="linear", warmup_share=0.0,
                      batch_size=config.sft_batch_size, max_steps=0)
    options = replace(options, warmup_steps=num_steps(len(examples), options) // 10)
    model = load_for_training(config.model, config)
    fit_sft(model, examples, options, derive_seed(config.seed, folder.name), folder)
    return model


def offline_paths(answered: list[Answered], config: Config) -> list[Example]:
    """Offline-ST: some of each question's different right samples, at random."""
    paths = []
    for question in answered:
        different = list({s.text: s.ids for s in question.samples if s.right and s.finished}.values())
        count = min(config.offline_paths, len(different))
        kept = random.Random(f"{config.seed} {question.id}").sample(different, count)
        paths += [Example(question.id, question.prompt_ids, ids) for ids in kept]
    return paths


def measured(name: str, t: int, directory: str, config: Config, folder: Path) -> list[dict]:
    """evaluate_model, and on test the share of right letters where numbers are scored as multiple choice."""
    rows = evaluate_model(name, t, directory, config, folder)
    if config.num_choices:
        answered = read_records(folder / "eval_samples.jsonl", Answered)[1]
        rows[-1]["letter_accuracy"] = fmean(score(q.samples[0], q.gold, config) for q in answered)
        write_json(folder / "eval.json", rows)
    return rows


def training_row(config: Config, pi_0: Path, pi: Path, found: dict) -> dict:
    """What training did, and the tokens and FLOPs that it took, warm-up included."""
    records = read_jsonl(pi / "train.jsonl")
    totals = {key: sum(record.get(key, 0) for record in records) for key in ("tokens_sampled", "tokens_forward")}
    row = {"name": METHODS[config.method], "iteration": 1, "split": "train", **summary(records), **totals, **found}
    trained = row["tokens_trained"] * (1 + (config.critic == "separate"))
    if config.warmup_epochs and config.method != "sft":  # which starts at the base
        trained += summary(read_jsonl(pi_0 / "train.jsonl"))["tokens_trained"]
    return row | {"flops": flops(config.model, row["tokens_forward"], trained)}


def main() -> None:
    config = parse_config(Config, {"toy": TOY, "smoke": SMOKE}, __doc__)
    tokenizer, problems = load_tokenizer(config.model), config.problems("train", config.num_questions)
    others = config.held_out()
    check_inputs(config, tokenizer, problems, others)
    golds = [Example(p.id, config.prompt_ids(tokenizer, p), config.gold_ids(tokenizer, p))
             for p in problems if p.solution]
    if not golds and (config.warmup_epochs or config.method != "reft"):
        raise InputError(f"{config.task} has no gold solutions: give a warmed-up model as --model with --warmup_epochs "
                         "0 and --method reft")
    golds = fitting(golds, load_config(config.model).max_length) if golds else []
    run = open_run(config, weights=model_hash(config.model), problems=hash_of(problems, others))

    pi_0, pi = run / "iter0", run / "iter1"
    start = config.model
    if config.warmup_epochs:
        start = train_once(pi_0, config.model, partial(sft, config, pi_0, golds, config.warmup_epochs))
    rows = measured("warm-up" if config.warmup_epochs else "base", 0, start, config, pi_0)

    found = {}
    if config.method == "sft":
        last = train_once(pi, start, partial(sft, config, pi, golds, config.sft_epochs))
    elif config.method == "offline_st":
        answered = answer_once(pi / "samples.jsonl", Sampler(start, config), problems, split="train",
                               num_samples=config.offline_samples, temperature=1.0,
                               seed=derive_seed(config.seed, "offline"), label="sample", reward=True)
        paths = offline_paths(answered, config)
        sampled = sum(len(s.ids) for q in answered for s in q.samples)
        found = {"questions": len(problems), "gold": len(golds), "paths": len(paths), "tokens_sampled": sampled,
                 "tokens_forward": sampled + sum(len(q.prompt_ids) for q in answered)}
        last = train_once(pi, start, partial(sft, config, pi, golds + paths, config.sft_epochs))
    else:
        by_id = {example.id: example for example in golds if config.online_gold}
        last = train_once(pi, start, partial(reinforce, config, pi, start, tokenizer, problems, by_id))

    rows.append(training_row(config, pi_0, pi, found))
    rows += measured(METHODS[config.method], 1, last, config, pi)
    write_json(run / "results.json", rows)
    print(f"{run / 'results.json'} is complete; python -m tools.report {run} draws it")


if __name__ == "__main__":
    run_script(main)
