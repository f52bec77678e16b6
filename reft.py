"""Reinforced Fine-Tuning (Luong et al. 2024, arXiv 2401.08967, section 3 and Algorithm 1).

    pi_0 = the base model after a few epochs of SFT on gold solutions      (warm-up)
    pi = pi_0, V = 0
    for every batch of questions:
        1. sample a response to each question from pi, at temperature 1
        2. score it: 1 if its answer is right, 0.1 if it gives another one, 0 if it gives none
        3. by one forward pass: log-probs under pi (the old ones) and values V of its tokens
        4. rewards: the score on the last token (the EOS action), -beta (log pi - log pi_0) on each
        5. advantages by GAE, then whitened over the whole batch; returns = advantages + values
        6. U times: a step of Adam on the clipped policy loss + alpha * the clipped value loss
    accuracy of pi: on dev along the way, on test for the record

"lambda = 1, gamma = 0.95" in the paper is a swap of names: it calls lambda the discount of rewards. Its
delta_t has gamma V(s_{t+1}), and a gamma of 0.95 would leave 0.95^100 = 0.6 % of the reward at the
first of 100 tokens. The authors' code has gamma 1 and lambda 0.95, and so has this.
Left out: picking the best checkpoint (the authors pick it on test). The last model is the result.

    python reft.py --preset toy --model runs/base-s0/model --run_dir runs/reft-s0
    python reft.py --preset toy --kl_coef 0 ...                         # an ablation is a flag
    python reft.py --preset toy --num_samples 4 --advantage group ...   # GRPO's, without a critic
    python reft.py --preset toy --method online_st ...                  # a baseline of the paper's
    python reft.py --task gsm8k --model DIR --run_dir DIR
"""
import copy
import dataclasses
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from checkpoint import load_model, load_sampler, load_state, sampler_of, weights_hash
from data.prompts import PROMPTS
from data.tokenizer import load_tokenizer
from evaluate import (Sample, SampleOptions, answer, answer_to, evaluate_model, held_out, read_answered,
                      self_check, summarize)
from infra.experiment import (at_least, derive_seed, finishing_steps, log, one_of, open_run, option, parse_config,
                        read_json, read_jsonl, run_script, write_json)
from losses import (gae, group_normalized, kl_shaped_rewards, leave_one_out, masked_mean, nll_loss,
                    ppo_policy_loss, ppo_value_loss, whiten)
from model import Llama
from infra.parallel import barrier, computed, device, missing, rank, world
from rewards import READ, read_number
from train import (Example, TrainOptions, autocast, batch_at, descend, fit_sft, fitting, items_hash,
                   load_trained, micro_batches, new_optimizer, num_steps, padded, prepare, response_logps,
                   save_or_stop, save_trained, set_rate, to_train)

NAMES = {"reft": "ReFT", "sft": "SFT", "offline_st": "Offline-ST", "online_st": "Online-ST"}


@dataclass(frozen=True)
class Config(TrainOptions, SampleOptions):
    """Defaults are the paper's values for GSM8K and chains of thought in words."""
    model: str = option("", "directory of the base model")
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of samples and batch order")
    prompt: str = option("reft", f"prompt template: {', '.join(PROMPTS)}")
    num_questions: int = option(0, "only the first so many training questions; 0: all")
    method: str = option("reft", "reft; sft: more SFT of the base; offline_st: SFT of the base on gold and "
                         "sampled paths that are right; online_st: NLL of each batch's right samples and "
                         "gold")
    # warm-up
    warmup_epochs: int = option(2, "passes over the gold solutions; 0: --model is pi_0 itself")
    sft_lr: float = option(1e-5, "peak learning rate of warm-up and offline_st: it rises over a tenth "
                           "of the steps and falls linearly to 0")
    sft_batch_size: int = option(48, "solutions of a step of warm-up and offline_st")
    # steps 1 and 2
    batch_size: int = option(32, "questions of a batch")
    num_samples: int = option(1, "responses to each question of a batch")
    temperature: float = option(1.0, "of the samples; nothing but 1 is possible")
    max_new_tokens: int = option(400, "longest response (the paper: 700 with a question of up to 300)")
    partial_reward: float = option(0.1, "score of a wrong answer where answers are numbers")
    num_choices: int = option(0, "score numbers as multiple choice: right if equal to the right answer "
                              "modulo so many (section 4.3 on reward hacking); 0: do not")
    # steps 3 to 5
    kl_coef: float = option(0.05, "beta, of the KL penalty (the paper: 0.01 for programs)")
    advantage: str = option("gae", "gae; group: score normalised within a question's samples (GRPO); "
                            "rloo: minus the mean of the others'; the last two have no critic")
    gamma: float = option(1.0, "discount per token, of gae")
    gae_lambda: float = option(0.95, "lambda of gae")
    critic: str = option("shared", "V is a linear map on the policy's last hidden state (shared), or on "
                         "that of a trained copy of it (separate)")
    value_init: str = option("zero", "weights of that map: zero, or random as in the paper")
    # step 6
    ppo_epochs: int = option(2, "U, passes over a batch's responses")
    mini_batch_size: int = option(0, "responses of an optimizer step; 0: the whole batch")
    clip_range: float = option(0.2, "epsilon, of the ratio")
    value_clip_range: float = option(0.2, "how far V may move from its old value")
    vf_coef: float = option(5.0, "alpha, weight of the value loss")
    lr: float = option(3e-7, "learning rate of AdamW (the paper's 125M model: 3e-6, batches of 256)")
    warmup_steps: int = option(0, "batches over which lr rises to its value")
    epochs: int = option(300, "passes over the questions")
    max_steps: int = option(0, "stop after this many batches of questions; 0: only epochs count")
    # sft and offline_st
    offline_samples: int = option(100, "responses to each question")
    offline_paths: int = option(10, "different right ones of them to keep, drawn at random")
    sft_epochs: int = option(20, "passes over these and gold (from the authors' code), or over gold alone "
                             "(the paper: 40)")
    # evaluation, memory and state
    eval_every: int = option(230, "batches between measurements of dev accuracy; 0: at the end only")
    offload_reference: bool = option(False, "pi_0 is in the host's memory between its uses")
    save_every: int = option(50, "steps or batches after which the state is saved, from which a killed run goes on")
    eval_samples: int = option(0, "samples per test question at temperature 1; 0: greedy only")
    eval_questions: int = option(0, "only the first so many dev and test questions; 0: all")

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        SampleOptions.__post_init__(self)
        self.refuse_one_file()
        if not self.model:
            raise ValueError("--model: give a base model's directory; `make base` makes the toy world's")
        one_of(self, method=NAMES, advantage=("gae", "group", "rloo"), critic=("shared", "separate"),
               value_init=("zero", "random"))
        at_least(self, 1, "num_samples", "ppo_epochs", "sft_batch_size", "sft_epochs", "offline_samples",
                 "offline_paths")
        at_least(self, 0, "warmup_epochs", "mini_batch_size")
        if self.temperature != 1:
            raise ValueError(f"--temperature {self.temperature}: the ratio and the KL are those of the "
                             "distribution that was sampled, and so of temperature 1")
        for name, high in (("sft_lr", 1), ("gamma", 1), ("gae_lambda", 1), ("vf_coef", 1e6), ("kl_coef", 1e6),
                           ("clip_range", 1e6), ("value_clip_range", 1e6)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"--{name} {getattr(self, name)}: must be from 0 to {high:g}")
        if self.critic == "separate" and not self.has_critic or self.num_choices and self.method != "reft":
            raise ValueError("--critic separate and --num_choices are for --method reft, the first with "
                             "--advantage gae")
        if self.num_choices and (self.num_choices < 2 or READ[self.task] is not read_number):
            raise ValueError(f"--num_choices {self.num_choices}: at least 2, and only where answers are "
                             "numbers")
        if self.advantage != "gae" and self.num_samples < 2:
            raise ValueError(f"--advantage {self.advantage} compares a question's samples with each "
                             "other: give --num_samples 2 or more")
        if self.method == "online_st" and self.mini_batch_size:
            raise ValueError("--mini_batch_size: online_st trains on whole batches")

    @property
    def has_critic(self) -> bool:
        return self.method == "reft" and self.advantage == "gae"


TOY = dict(task="toy", prompt="plain", num_questions=1000, max_new_tokens=96, sft_lr=5e-5, batch_size=128, lr=3e-4,
           max_steps=40, offline_samples=20, sft_epochs=2, eval_every=10, save_every=10)
SMOKE = TOY | dict(num_questions=40, batch_size=16, max_steps=6, eval_every=3, offline_samples=8,
                   eval_questions=20)
PRESETS = {"toy": TOY, "smoke": SMOKE}


@dataclass(frozen=True)
class Rollout(Example):
    """A sampled response, with what the checker says of it."""
    finished: bool
    verdict: str
    score: float

    @property
    def right(self) -> bool:
        return self.verdict == "correct"


class Policy(nn.Module):
    """A Llama with a linear map from its last hidden state to V(s_t): actor and critic in one."""

    def __init__(self, model: Llama, config: Config) -> None:
        super().__init__()
        self.model = model
        self.value_head = self.critic = None
        if config.has_critic:
            if config.critic == "separate":
                self.critic = copy.deepcopy(model.model)
            D = model.config.hidden_size
            self.value_head = nn.Linear(D, 1)
            bound = D ** -0.5 if config.value_init == "random" else 0.0
            generator = torch.Generator().manual_seed(config.seed)
            for parameter in self.value_head.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            self.value_head.to(model.lm_head.weight.device)

    def forward(self, tokens: Tensor, mask: Tensor,
                with_entropy: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens (B, T), mask (B, T-1) -> float32 log-probs, values and entropies (B, T-1).

        Column t is about the action that makes token t + 1, as in train.response_logps, and about the
        state in which it is taken, which is tokens 0 to t. Log-probs and entropies are 0 where mask is off.
        """
        hidden = self.model.hidden(tokens)  # (B, T, D)
        logps = self.model.score(hidden, tokens, mask)
        entropy = self.model.entropy(hidden, mask) if with_entropy else None
        if self.value_head is None:
            return logps, torch.zeros_like(logps), entropy
        if self.critic is not None:
            hidden = self.critic(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return logps, self.value_head(hidden[:, :-1].float()).squeeze(-1), entropy


# ---- steps 1 to 5: a batch of experience ---------------------------------------------------------

def score(sample: Sample, gold: str, config: Config) -> float:
    """Step 2. A response that was cut short of EOS is judged by its text, like any other.

    A wrong letter earns nothing: any guess is one, so that 0.1 would be a constant.
    """
    if config.num_choices:
        chosen = letter(sample.answer, config.num_choices)
        return float(chosen is not None and chosen == letter(read_number(gold), config.num_choices))
    if sample.right:
        return 1.0
    numeric = READ[config.task] is read_number
    return config.partial_reward if sample.verdict == "wrong" and numeric else 0.0


def letter(answer: str | None, num_choices: int) -> int | None:
    """Which of num_choices options a canonical answer is, if options are numbers modulo num_choices."""
    return int(answer) % num_choices if answer and re.fullmatch(r"-?\d+", answer) else None


def roll_out(model: Llama, tokenizer, problems: list[data.Problem], config: Config,
             step: int) -> list[Rollout]:
    """Steps 1 and 2: num_samples responses to each problem, question by question."""
    answered = answer(model, tokenizer, problems, config, num_samples=config.num_samples,
                      temperature=config.temperature, seed=derive_seed(config.seed, step, "rollout"),
                      label="")
    return [Rollout(q.id, q.prompt_ids, s.ids, s.finished, s.verdict,
                    score(s, q.gold, config))
            for q in answered for s in q.samples]


def act(policy: Policy, rollouts: list[Example], with_entropy: bool = False,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Mask, log-probs, values and entropies (B, T-1) of the rollouts' response tokens: see Policy.forward."""
    tokens, mask, _ = padded([(r.prompt, r.response) for r in rollouts])
    return mask, *policy(tokens, mask, with_entropy)


@torch.no_grad()
def measure(policy: Policy, reference: Llama, rollouts: list[Rollout], batches: list[list[int]],
            config: Config) -> dict[str, Tensor]:
    """Step 3: what is known of each token, as name -> (B, T-1) with a row for every rollout.

    The old log-probs are not the sampler's but those of the training forward, in its precision, on the
    very micro-batches of step 6: so the ratios of the first update are 1 to the last bit. All ranks get the
    whole table.
    """
    def columns(rows: list[int]) -> dict[str, Tensor]:
        batch = [rollouts[i] for i in rows]
        with autocast(config.precision):
            mask, logps, values, entropy = act(policy, batch, with_entropy=True)
            ref_logps = response_logps(reference, [(r.prompt, r.response) for r in batch])[0]
        found = {"logps": logps, "values": values, "ref_logps": ref_logps, "mask": mask, "entropy": entropy}
        return {name: x.float().cpu() for name, x in found.items()}

    table: dict[str, Tensor] = {}
    for rows, found in zip(batches, computed(batches, columns)):
        for name, x in found.items():
            if name not in table:
                table[name] = torch.zeros(len(rollouts), max(r.tokens for r in rollouts) - 1, device=device())
            table[name][rows, :x.shape[1]] = x.to(device())
    return table


def add_advantages(table: dict[str, Tensor], scores: Tensor, config: Config) -> dict[str, Tensor]:
    """Steps 4 and 5: the table with advantages (B, T-1), and with returns if there is a critic.

    Without one, a response's score is compared with those of the question's other samples, and every
    token earns the same, less the KL that is still to come. The KL has no part in the comparison: where
    all scores are equal, GRPO's division by their spread would blow up its noise.
    """
    mask = table["mask"]
    shaped = partial(kl_shaped_rewards, logps=table["logps"], ref_logps=table["ref_logps"], mask=mask,
                     kl_coef=config.kl_coef)
    if config.has_critic:
        advantages, returns = gae(shaped(scores), table["values"], mask, config.gamma,
                                  config.gae_lambda)
        return table | {"advantages": whiten(advantages, mask), "returns": returns}
    compared = {"group": group_normalized, "rloo": leave_one_out}[config.advantage](
        scores.view(-1, config.num_samples)).flatten()
    to_go, _ = gae(shaped(compared), torch.zeros_like(mask), mask, gamma=1.0, lam=1.0)
    return table | {"advantages": to_go}


def diagnose(rollouts: list[Rollout], table: dict[str, Tensor]) -> dict[str, float]:
    """What a batch of rollouts says about the run. KL and length per response, entropy per token."""
    mask = table["mask"].bool()
    log_ratio = torch.where(mask, table["logps"] - table["ref_logps"], 0.0)
    record = {"reward": fmean(r.score for r in rollouts), "accuracy": fmean(r.right for r in rollouts),
              "kl": float(log_ratio.sum(-1).mean()),  # k1, which the reward uses
              "kl_k3": float(((-log_ratio).exp() - 1 + log_ratio).sum(-1).mean()),  # never below 0
              "entropy": float(table["entropy"][mask].mean()),
              "length": fmean(len(r.response) for r in rollouts),
              "eos_rate": fmean(r.finished for r in rollouts)}
    if "returns" in table:
        returns, values = table["returns"][mask], table["values"][mask]
        left = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        record["explained_variance"] = 1 - float(left)
    return record


def unhealthy(record: dict) -> dict[str, str]:
    """What has left its healthy range, in words; the thresholds are rules of thumb."""
    checks = {
        "kl": (record["kl"] > 20,
               "KL blow-up: responses are {kl:.1f} nats away from the warm-up model, healthy is below "
               "20; raise --kl_coef or lower --lr"),
        "reference": (record["step"] == 0 and record["kl_k3"] > 0.5,
                      "KL of {kl_k3:.2f} nats before the first update, healthy is 0 (0.5 with rounding): "
                      "the reference is not the model that is trained"),
        "entropy": (record["entropy"] < 0.002,
                    "entropy collapse: {entropy:.4f} nats per token, healthy is above 0.002; samples are "
                    "all alike, and nothing new is found"),
        "eos": (record["eos_rate"] < 0.5,
                "only {eos_rate:.0%} of the responses end in EOS, healthy is above 50%; raise "
                "--max_new_tokens or --warmup_epochs"),
        "ratio": (record.get("first_ratio_error", 0.0) > 1e-3,
                  "a ratio is off by {first_ratio_error:.1e} before the first update, healthy is below "
                  "1e-3: old and new log-probs come from different computations")}
    return {name: text.format(**record) for name, (bad, text) in checks.items() if bad}


# ---- step 6 --------------------------------------------------------------------------------------

def ppo_loss(policy: Policy, rows: list[int], rollouts: list[Rollout], table: dict[str, Tensor],
             config: Config) -> dict[str, Tensor]:
    """Per response (B,): the loss, and what else is logged."""
    mask, logps, values, _ = act(policy, [rollouts[i] for i in rows])  # (B, T-1)
    old = {name: x[rows, :logps.shape[1]] for name, x in table.items()}
    loss = ppo_policy_loss(logps, old["logps"], old["advantages"], mask, config.clip_range)
    off = (((logps - old["logps"]) * mask).exp() - 1).detach()
    measured = {"loss": loss, "policy_loss": loss, "ratio_max": off.amax(-1) + 1,
                "ratio_error": off.abs().amax(-1),
                "clip_fraction": masked_mean((off.abs() > config.clip_range).float(), mask)}
    if policy.value_head is not None:
        value_loss = ppo_value_loss(values, old["values"], old["returns"], mask,
                                    config.value_clip_range)
        measured |= {"value_loss": value_loss, "loss": loss + config.vf_coef * value_loss}
    return measured


def self_training_loss(policy: Policy, weighted: list[tuple[Example, float]]) -> dict[str, Tensor]:
    """Online-ST in place of PPO: weight * NLL per response (B,)."""
    mask, logps, _, _ = act(policy, [example for example, _ in weighted])
    nll = nll_loss(logps, mask)
    return {"loss": nll * nll.new_tensor([weight for _, weight in weighted]), "nll": nll}


def halves(right: list[Example], golds: list[Example]) -> list[tuple[Example, float]]:
    """Half of the mean loss for the right samples together, half for gold; the first half may be empty."""
    count = len(right) + len(golds)
    return [(example, count / 2 / len(group)) for group in (right, golds) for example in group]


def update(policy: Policy, optimizer: torch.optim.Optimizer, mini_batches: list[list[list]],
           loss: Callable[[Policy, list], dict[str, Tensor]], config: Config, folder: Path | None = None,
           label: str = "update", name: Callable = str) -> list[dict]:
    """Step 6: ppo_epochs times an optimizer step per mini-batch; a record of means for each step.

    A mini-batch is a list of micro-batches, whose gradients are summed and divided once.
    """
    records = []
    for mini_batch in mini_batches * config.ppo_epochs:
        values, figures = descend(policy, optimizer, mini_batch, loss, config, folder, label, name)
        records.append({name: (max if name.startswith("ratio") else fmean)(x) for name, x in values.items()} | figures)
    return records


def cut(items: list, length: Callable, config: Config) -> list[list[list]]:
    """Items as mini-batches (one, or of mini_batch_size), each of them as micro-batches."""
    size = config.mini_batch_size or len(items)
    return [micro_batches(items[i:i + size], length, config.micro_batch_tokens)
            for i in range(0, len(items), size)]


def train_on(policy: Policy, reference: Llama, optimizer: torch.optim.Optimizer, rollouts: list[Rollout],
             golds: list[Example], config: Config, step: int, folder: Path | None = None) -> dict:
    """Steps 3 to 6 on a batch of rollouts, and its record. Online-ST trains on right ones and gold."""
    rows = list(range(len(rollouts)))
    random.Random(f"{config.seed} {step}").shuffle(rows)
    mini_batches = cut(rows, lambda row: rollouts[row].tokens, config)  # for all passes over them
    move(reference, device(), config)
    table = measure(policy, reference, rollouts, sum(mini_batches, []), config)
    move(reference, "cpu", config)
    if config.method == "reft":
        scores = table["mask"].new_tensor([rollout.score for rollout in rollouts])
        table = add_advantages(table, scores, config)
        loss = partial(ppo_loss, rollouts=rollouts, table=table, config=config)
        trained, name = rollouts, lambda row: rollouts[row].id
    else:
        weighted = halves([r for r in rollouts if r.right and r.finished], golds)
        mini_batches = cut(weighted, lambda pair: pair[0].tokens, config) if weighted else []
        loss = self_training_loss
        trained, name = [example for example, _ in weighted], lambda pair: pair[0].id
    record = {"step": step, **diagnose(rollouts, table)}
    inner = update(policy, optimizer, mini_batches, loss, config, folder, f"batch {step}", name)
    for name in inner[0] if inner else ():
        record[name] = (max if name.startswith("ratio") else fmean)(r[name] for r in inner)
    if "ratio_error" in record:
        record["first_ratio_error"] = inner[0]["ratio_error"]
    record["tokens_sampled"] = sum(len(rollout.response) for rollout in rollouts)
    record["tokens"] = config.ppo_epochs * sum(example.tokens for example in trained)
    return record


# ---- the loop, and the stages around it ----------------------------------------------------------

def load_reference(directory: str, config: Config) -> Llama:
    """pi_0, on a GPU in bfloat16, so that the KL before the first update is not exactly 0 there. With several
    ranks it is sharded like the policy."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    options = dataclasses.replace(config, cpu_offload=config.cpu_offload or config.offload_reference)
    reference = load_trained(directory, options, dtype=dtype).requires_grad_(False)
    move(reference, "cpu", config)
    return reference


def move(reference: Llama, to: str, config: Config) -> None:
    """Fetch or put away an offloaded reference; a sharded one is fetched by FSDP as it computes."""
    if config.offload_reference and world() == 1:
        reference.to(to)


def reinforce(config: Config, folder: Path, start: str, tokenizer, problems: list[data.Problem],
              golds: dict[str, Example]) -> tuple[Llama, list[dict]]:
    """ReFT, or Online-ST on the same rollouts: pi_0, in the directory `start`, becomes pi."""
    policy = load_trained(start, config, lambda model: Policy(model, config))
    prepare(policy, config)
    reference, optimizer = load_reference(start, config), new_optimizer(policy, config)
    dev, steps = config.problems("dev", config.eval_questions), num_steps(len(problems), config)
    made_of = {"weights": weights_hash(policy), "problems": items_hash(problems), "steps": steps}
    records = load_state(folder / "state", policy, optimizer, made_of)
    bar = tqdm(range(len(records), steps), desc=config.method, unit="batch", initial=len(records), total=steps,
               dynamic_ncols=True, disable=rank() > 0)
    with finishing_steps() as asked_to_stop:
        for step in bar:
            rate = set_rate(optimizer, step, steps, config)
            batch = [problems[i] for i in batch_at(step, len(problems), config.batch_size, config.seed)]
            rollouts = roll_out(sampler_of(policy.model, config.tensor_parallel), tokenizer, batch, config,
                                step)  # steps 1 and 2
            record = train_on(policy, reference, optimizer, rollouts,  # steps 3 to 6
                              [golds[p.id] for p in batch if p.id in golds], config, step, folder)
            record["lr"] = rate
            if config.eval_every and (step + 1) % config.eval_every == 0:
                answered = answer(sampler_of(policy.model, config.tensor_parallel), tokenizer, dev, config,
                                  num_samples=1, temperature=0.0, seed=0, label="")
                record["dev"] = summarize(answered, config.task)
                tqdm.write(f"after {step + 1} batches: dev accuracy {record['dev']['accuracy']:.1%}")
            record["warnings"] = unhealthy(record)
            for name, text in record["warnings"].items():
                if not records or name not in records[-1]["warnings"]:
                    tqdm.write(f"warning at batch {step}: {text}")
            records.append(record)
            bar.set_postfix_str(f"accuracy {record['accuracy']:.2f}, KL {record['kl']:.2f}", refresh=False)
            save_or_stop(asked_to_stop(), folder, policy, optimizer, records, steps, made_of, config)
    return policy.model, records


def sft(config: Config, folder: Path, examples: list[Example], epochs: int) -> tuple[Llama, list[dict]]:
    """The base model after the paper's SFT: linear decay after a tenth of warm-up, all tokens alike."""
    options = dataclasses.replace(config, epochs=epochs, lr=config.sft_lr, lr_schedule="linear",
                                  batch_size=config.sft_batch_size, max_steps=0)
    options = dataclasses.replace(options, warmup_steps=num_steps(len(examples), options) // 10)
    model = load_trained(config.model, config)
    return model, fit_sft(model, examples, options, derive_seed(config.seed, folder.name), folder, "SFT")


def keep_paths(samples: list[Sample], count: int, seed: str) -> list[list[int]]:
    """Offline-ST: `count` of a question's different right samples, at random."""
    different = {sample.text: sample.ids for sample in samples if sample.right and sample.finished}
    return random.Random(seed).sample(list(different.values()), min(count, len(different)))


def offline_self_training(config: Config, folder: Path, start: str, tokenizer, problems: list[data.Problem],
                          golds: dict[str, Example]) -> tuple[Llama, list[dict]]:
    """Offline-ST: pi_0, in the directory `start`, samples; the base is trained on the right ones and gold."""
    path = folder / "samples.jsonl"
    if missing(path):
        sampler = load_sampler(start, config.tensor_parallel)
        answer_to(path, sampler, tokenizer, problems, config, split="train", weights=weights_hash(sampler),
                  num_samples=config.offline_samples, temperature=config.temperature,
                  seed=derive_seed(config.seed, "offline"), label="sample")
        barrier()
    answered = read_answered(path)[1]
    paths = [Example(q.id, q.prompt_ids, ids) for q in answered
             for ids in keep_paths(q.samples, config.offline_paths, f"{config.seed} {q.id}")]
    write_json(folder / "coverage.json", {
        "questions": len(problems), "gold": len(golds), "paths": len(paths),
        "tokens_sampled": sum(len(sample.ids) for q in answered for sample in q.samples)})
    return sft(config, folder, [*golds.values(), *paths], config.sft_epochs)


def evaluate_step(config: Config, folder: Path, model_dir: str, tokenizer, t: int) -> None:
    """Dev and test accuracy of pi_0 (t = 0) or pi (t = 1)."""
    began, name = time.perf_counter(), NAMES[config.method] if t else "warm-up"
    rows = evaluate_model(load_sampler(model_dir, config.tensor_parallel), tokenizer, config, folder,
                          config.eval_questions, config.eval_samples, seed=config.seed, label=name)
    if config.num_choices:
        barrier()
        answered = read_answered(folder / "eval_samples.jsonl")[1]
        rows[-1]["letter_accuracy"] = fmean(score(q.samples[0], q.gold, config) for q in answered)
    write_json(folder / "eval.json", [{"name": name, "iteration": t, **row} for row in rows])
    log(folder.parent, event="evaluate", iteration=t, seconds=time.perf_counter() - began)


def training_row(config: Config, folder: Path) -> dict:
    """Means over the last quarter of the steps that made pi, and the tokens that all of them took."""
    records = read_jsonl(folder / "train.jsonl")
    counted = [record for record in records if not record.get("skipped")] or records
    last_quarter = counted[-max(1, len(counted) // 4):]
    means = {name: (max if name.startswith("ratio") else fmean)(record[name] for record in last_quarter)
             for name, value in records[0].items() if isinstance(value, float)}
    coverage = (read_json(folder / "coverage.json") if config.method == "offline_st" else
                {"tokens_sampled": sum(record.get("tokens_sampled", 0) for record in records)})
    return {"name": NAMES[config.method], "iteration": 1, "split": "train", **means,
            "steps": len(records), "tokens_trained": sum(record["tokens"] for record in records),
            **coverage}


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    tokenizer = load_tokenizer(config.model)
    problems = config.problems("train", config.num_questions)
    model = load_model(config.model, dtype=None)
    max_tokens = model.config.max_length
    others = held_out(config)
    self_check(config, tokenizer, problems, model.config, others)
    if not any(p.solution for p in problems) and (config.warmup_epochs or config.method != "reft"):
        raise SystemExit(f"{config.task} has no gold solutions: give a warmed-up model as --model with "
                         "--warmup_epochs 0 and --method reft")
    run = open_run(config, config.run_dir, weights=weights_hash(model), problems=items_hash([*problems, *others]))
    del model
    golds = [Example(p.id, config.prompt_ids(tokenizer, p), config.gold_ids(tokenizer, p))
             for p in problems if p.solution]
    golds = {example.id: example for example in fitting(golds, max_tokens)} if golds else {}

    pi_0, pi = run / "iter0", run / "iter1"  # the names under which report.py looks for models
    start = str(pi_0 / "model") if config.warmup_epochs else config.model
    if config.warmup_epochs and to_train(pi_0):
        save_trained(*sft(config, pi_0, list(golds.values()), config.warmup_epochs), pi_0, config)
    if missing(pi_0 / "eval.json"):
        evaluate_step(config, pi_0, start, tokenizer, 0)
    if to_train(pi):
        began = time.perf_counter()
        if config.method == "sft":
            trained = sft(config, pi, list(golds.values()), config.sft_epochs)
        else:
            method = offline_self_training if config.method == "offline_st" else reinforce
            trained = method(config, pi, start, tokenizer, problems, golds)
        save_trained(*trained, pi, config)
        log(run, event="train", iteration=1, seconds=time.perf_counter() - began)
    if missing(pi / "eval.json"):
        evaluate_step(config, pi, str(pi / "model"), tokenizer, 1)
    barrier()
    rows = [*read_json(pi_0 / "eval.json"), training_row(config, pi), *read_json(pi / "eval.json")]
    write_json(run / "results.json", rows)
    print(f"{run / 'results.json'} is written; python -m tools.report_reft {run} draws it")


if __name__ == "__main__":
    run_script(main)
