"""ReFT on tiny models: rewards, the first update's identities, gradients, and runs that are killed."""
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch

import evaluate
import reft
import train
from checkpoint import load_model, weights_hash
from evaluate import Answered, Sample
from infra.experiment import parse_config
from reft import (Config, Policy, Rollout, act, add_advantages, cut, diagnose, halves, keep_paths,
                  measure, ppo_loss, score, self_training_loss, train_on, unhealthy, update)
from sample import generate
from test_drivers import base, call, read_lines, remembered_world  # noqa: F401 (two are fixtures)
from tiny import random_tokens, slow_logps, tiny_model

ROOT = Path(reft.__file__).resolve().parent
EVERY = torch.ones(2, 5, dtype=torch.bool)  # mask: all of (2, 6) tokens but the first
VERDICTS = ("correct", "wrong", "unparsed", "correct", "timeout", "wrong", "correct")


def config_of(**options) -> Config:
    return Config(**{"model": "somewhere", "run_dir": "somewhere", "precision": "fp32", "lr": 1e-2,
                     "task": "toy"} | options)


def some_rollouts(count: int = 7, seed: int = 0) -> list[Rollout]:
    """Ragged, of random tokens; every third is cut short of EOS (2)."""
    rollouts = []
    for i in range(count):
        finished, verdict = i % 3 != 2, VERDICTS[i % 7]
        response = random_tokens(seed + 50 + i, 1 + 5 * i % 9).tolist() + [2] * finished
        rollouts.append(Rollout(f"q{i}", random_tokens(seed + i, 1 + 3 * i % 5).tolist(), response,
                                finished, verdict, {"correct": 1.0, "wrong": 0.1}.get(verdict, 0.0)))
    return rollouts


def policy_of(config: Config) -> Policy:
    return Policy(tiny_model(), config)


def batches_of(rollouts: list[Rollout], config: Config) -> list[list[list[int]]]:
    return cut(list(range(len(rollouts))), lambda i: rollouts[i].tokens, config)


def experience(policy: Policy, rollouts: list[Rollout], config: Config, reference=None):
    """Steps 3 to 5: mini-batches and the table."""
    batches = batches_of(rollouts, config)
    table = measure(policy, reference or tiny_model(9), rollouts, sum(batches, []), config)
    return batches, add_advantages(table, torch.tensor([r.score for r in rollouts]), config)


@pytest.fixture
def plain_steps() -> partial:
    """An optimizer whose step is minus the gradient, so that gradients can be read off weights."""
    return partial(torch.optim.SGD, lr=1.0)


def weights_of(module) -> dict:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


# --- step 2: the score ----------------------------------------------------------------------------

def sample(verdict: str, ids=(5, 2), finished: bool = True, text: str = "text") -> Sample:
    return Sample(list(ids), finished, text, verdict, None)


def test_scores():
    """1, 0.1 and 0. The partial reward is for an answer that was given and is wrong, not for silence
    or a program that hangs; and it is a flag."""
    scores = [score(sample(verdict), "1", config_of()) for verdict in VERDICTS[:5]]
    assert scores == [1.0, 0.1, 0.0, 1.0, 0.0]
    scores = [score(sample(verdict), "1", config_of(partial_reward=0.0)) for verdict in VERDICTS[:5]]
    assert scores == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_wrong_letter_earns_nothing():
    """Of multiple choice every guess is an answer: 0.1 for it is a constant that teaches to guess.
    The authors' code pays it for MathQA, even to programs that crash."""
    for task, expected in (("mathqa", 0.0), ("arc", 0.0), ("mathqa-numeric", 0.1), ("gsm8k", 0.1),
                           ("svamp", 0.1)):
        assert score(sample("wrong"), "1", config_of(task=task)) == expected, task
        assert score(sample("correct"), "1", config_of(task=task)) == 1.0


def test_a_response_cut_short_is_judged_by_its_text():
    """As in the authors' code."""
    assert score(sample("correct", finished=False), "1", config_of()) == 1.0


# --- step 3: one forward pass ---------------------------------------------------------------------

@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_and_logps_stand_in_the_same_columns(critic):
    """Column t: the action that makes token t + 1, and V of tokens 0 to t. Each against a pass over
    the unpadded prefix alone."""
    config = config_of(critic=critic, value_init="random")
    policy, rollouts = policy_of(config), some_rollouts()
    with torch.no_grad():
        _, logps, values, entropy = act(policy, rollouts, with_entropy=True)
        for row, r in enumerate(rollouts):
            slow = slow_logps(policy.model, r.prompt, r.response)
            for i in range(len(r.response)):
                t = len(r.prompt) + i - 1
                assert float(logps[row, t]) == pytest.approx(slow[i], abs=1e-4)
                prefix = torch.tensor([(r.prompt + r.response)[:t + 1]])
                trunk = policy.critic if critic == "separate" else policy.model.model
                V = policy.value_head(trunk(prefix, None))[0, -1, 0]
                assert float(values[row, t]) == pytest.approx(float(V), abs=1e-4)
                probs = policy.model(prefix)[0, -1].double().softmax(-1)
                assert float(entropy[row, t]) == pytest.approx(-float((probs * probs.log()).sum()), abs=1e-4)


def test_the_value_head_starts_at_zero_or_at_random():
    """Zero: no dip at the start. Random: as the paper, the same for the same seed."""
    tokens = random_tokens(0, 2, 6)
    assert torch.equal(policy_of(config_of())(tokens, EVERY)[1], torch.zeros(2, 5))
    heads = [policy_of(config_of(value_init="random", seed=seed)).value_head for seed in (3, 3, 4)]
    assert torch.equal(heads[0].weight, heads[1].weight) and torch.equal(heads[0].bias, heads[1].bias)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert 0.1 < float(heads[0].weight.detach().abs().max()) <= 32 ** -0.5


def test_values_are_float32_under_autocast():
    """In bfloat16 a value of 0.7 is off by up to 0.002, and returns are made of it."""
    policy = policy_of(config_of(value_init="random"))
    tokens = random_tokens(1, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logps, values, entropy = policy(tokens, EVERY, with_entropy=True)
        hidden = policy.model.hidden(tokens)
    assert logps.dtype == values.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(values, policy.value_head(hidden[:, :-1].float()).squeeze(-1))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_which_trunk_the_value_loss_trains(critic):
    """A separate critic leaves the policy alone; a shared one does not."""
    policy = policy_of(config_of(critic=critic, value_init="random"))
    policy(random_tokens(2, 2, 6), EVERY)[1].sum().backward()
    touched = any(p.grad is not None and p.grad.any() for p in policy.model.parameters())
    assert touched == (critic == "shared")
    assert policy.value_head.weight.grad.any()
    if critic == "separate":
        assert any(p.grad is not None and p.grad.any() for p in policy.critic.parameters())
        ours, theirs = policy.model.model.state_dict(), policy.critic.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_the_table_is_what_each_response_alone_gives(budget):
    """Rows mixed up by the sorting of micro-batches, or a mask that is off by one, train every token
    on another one's advantage."""
    config = config_of(value_init="random", micro_batch_tokens=budget)
    policy, reference, rollouts = policy_of(config), tiny_model(9), some_rollouts()
    table = measure(policy, reference, rollouts, sum(batches_of(rollouts, config), []), config)
    for row, r in enumerate(rollouts):
        first = len(r.prompt) - 1
        places = slice(first, first + len(r.response))
        mask = [float(first <= t < first + len(r.response)) for t in range(table["mask"].shape[1])]
        assert table["mask"][row].tolist() == mask
        for name, model in (("logps", policy.model), ("ref_logps", reference)):
            slow = slow_logps(model, r.prompt, r.response)
            assert table[name][row, places].tolist() == pytest.approx(slow, abs=1e-4)
        with torch.no_grad():
            tokens = torch.tensor([r.prompt + r.response])
            logits, (_, values, _) = policy.model(tokens), policy(tokens, tokens[:, 1:] > 0)
        assert table["values"][row, places].tolist() == pytest.approx(
            values[0, places].tolist(), abs=1e-4)
        entropy = [-sum(p * math.log(p) for p in row.softmax(-1).tolist() if p > 0)
                   for row in logits[0, places].double()]
        assert table["entropy"][row, places].tolist() == pytest.approx(entropy, abs=1e-4)
    assert not any(x.requires_grad for x in table.values())


# --- steps 4 and 5: rewards and advantages --------------------------------------------------------

def test_advantages_of_gae_by_slow_loops():
    """Score on the last response token (the EOS action, or the last token of one that was cut), KL on
    each, GAE on unwhitened numbers, whitening over all tokens of the batch; returns unwhitened."""
    config = config_of(value_init="random", kl_coef=0.3, gae_lambda=0.9, gamma=0.97)
    rollouts = some_rollouts()
    _, table = experience(policy_of(config), rollouts, config)
    all_advantages = []
    for row, r in enumerate(rollouts):
        first = len(r.prompt) - 1
        logps, ref_logps, V = (table[name][row, first:first + len(r.response)].tolist()
                               for name in ("logps", "ref_logps", "values"))
        rewards = [-0.3 * (a - b) for a, b in zip(logps, ref_logps)]
        rewards[-1] += r.score
        A = 0.0
        for t in reversed(range(len(rewards))):
            A = rewards[t] + 0.97 * [*V, 0.0][t + 1] - V[t] + 0.97 * 0.9 * A
            all_advantages.append(((row, first + t), A))
            assert float(table["returns"][row, first + t]) == pytest.approx(A + V[t], abs=1e-4)
    mean = fmean(A for _, A in all_advantages)
    std = math.sqrt(fmean((A - mean) ** 2 for _, A in all_advantages))
    assert len(all_advantages) == int(table["advantages"].count_nonzero())
    for place, A in all_advantages:
        assert float(table["advantages"][place]) == pytest.approx((A - mean) / std, abs=1e-3)


@pytest.mark.parametrize("advantage", ["group", "rloo"])
def test_advantages_without_a_critic(advantage):
    """One number for all tokens of a response, from the scores of its own question; the KL to come
    is taken off, and does not decide where all scores of a question are equal."""
    config = config_of(advantage=advantage, num_samples=3, kl_coef=0.02)
    scores = [1.0, 0.0, 0.1, 0.1, 0.1, 0.1]
    rollouts = [dataclasses.replace(r, score=s) for r, s in zip(some_rollouts(6), scores)]
    policy = policy_of(config)
    assert policy.value_head is None
    _, table = experience(policy, rollouts, config)
    assert "returns" not in table and not table["values"].any()
    std = math.sqrt(fmean((s - 1.1 / 3) ** 2 for s in scores[:3]))
    compared = {"group": [(s - 1.1 / 3) / std for s in scores[:3]],
                "rloo": [1.0 - 0.05, 0.0 - 0.55, 0.1 - 0.5]}[advantage] + [0.0] * 3
    for row, r in enumerate(rollouts):
        first = len(r.prompt) - 1
        kl = (table["logps"] - table["ref_logps"])[row, first:first + len(r.response)].tolist()
        expected = [compared[row] - 0.02 * sum(kl[t:]) for t in range(len(kl))]
        got = table["advantages"][row, first:first + len(kl)].tolist()
        assert got == pytest.approx(expected, abs=1e-3)


# --- step 6: the update ---------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}, {"critic": "separate"},
                                     {"micro_batch_tokens": 30}], ids=str)
def test_the_first_update_starts_at_ratio_1(precision, options):
    """Old log-probs from the sampler, from another precision or another batch are off by percents,
    and the clip cuts off what is no change. The update after it must not start at 1."""
    config = config_of(precision=precision, value_init="random", **options)
    policy, rollouts = policy_of(config), some_rollouts(12)
    batches, table = experience(policy, rollouts, config)
    optimizer = train.new_optimizer(policy, config)
    records = update(policy, optimizer, batches, partial(ppo_loss, rollouts=rollouts, table=table,
                                                         config=config), config)
    assert len(records) == 2 * len(batches)
    assert records[0]["ratio_error"] < 1e-5 and records[0]["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert records[0]["clip_fraction"] == 0
    assert records[1]["ratio_error"] > 1e-3


def test_kl_is_0_before_the_first_update():
    """The reference is a copy of what is trained: any other number means another model, another
    precision or other tokens."""
    for precision in ("bf16", "fp32"):
        config = config_of(precision=precision)
        policy, rollouts = policy_of(config), some_rollouts()
        _, table = experience(policy, rollouts, config, reference=tiny_model())
        record = diagnose(rollouts, table)
        assert abs(record["kl"]) < 1e-5 and abs(record["kl_k3"]) < 1e-5
        _, table = experience(policy, rollouts, config, reference=tiny_model(1))
        assert diagnose(rollouts, table)["kl_k3"] > 1


def slow_ppo(policy: Policy, r: Rollout, row: int, table: dict, config: Config) -> float:
    """The loss of one response, as the paper has it."""
    new = slow_logps(policy.model, r.prompt, r.response)
    with torch.no_grad():
        tokens = torch.tensor([r.prompt + r.response])
        values = policy(tokens, tokens[:, 1:] > 0)[1][0].tolist()
    total = 0.0
    for i, logp in enumerate(new):
        t = len(r.prompt) - 1 + i
        old = {name: float(x[row, t]) for name, x in table.items()}
        ratio = math.exp(logp - old["logps"])
        clipped = min(max(ratio, 1 - config.clip_range), 1 + config.clip_range)
        total -= min(ratio * old["advantages"], clipped * old["advantages"])
        near = min(max(values[t], old["values"] - config.value_clip_range),
                   old["values"] + config.value_clip_range)
        total += config.vf_coef * 0.5 * max((values[t] - old["returns"]) ** 2,
                                            (near - old["returns"]) ** 2)
    return total / len(new)


def test_the_loss_is_the_papers():
    """Policy loss plus 5 times value loss, a mean over each response's tokens, on a policy that has
    moved away from the one that sampled."""
    config = config_of(value_init="random", clip_range=0.3, value_clip_range=0.1)
    rollouts = some_rollouts()
    _, table = experience(policy_of(config), rollouts, config)
    moved = Policy(tiny_model(0), dataclasses.replace(config, seed=1))
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    rows = [3, 0, 5]
    got = ppo_loss(moved, rows, rollouts, table, config)
    for row, loss in zip(rows, got["loss"].tolist()):
        slow = slow_ppo(moved, rollouts[row], row, table, config)
        assert loss == pytest.approx(slow, rel=1e-3, abs=1e-3)
    assert float(got["clip_fraction"].mean()) > 0.05


def step_of(config: Config, rollouts: list[Rollout], sgd) -> dict:
    """Minus the gradient of one update, by weight."""
    policy = policy_of(config)
    batches, table = experience(policy, rollouts, config)
    before = weights_of(policy)
    [record] = update(policy, sgd(policy.parameters()), batches,
                      partial(ppo_loss, rollouts=rollouts, table=table, config=config), config)
    assert math.isfinite(record["grad_norm"])
    return {name: weight - before[name] for name, weight in weights_of(policy).items()}


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_micro_batches_do_not_change_the_gradient(plain_steps, critic):
    """One per response, or all in one: a mean of means would weigh short micro-batches more."""
    steps = [step_of(config_of(value_init="random", ppo_epochs=1, clip_norm=1e9, critic=critic,
                               micro_batch_tokens=budget), some_rollouts(), plain_steps)
             for budget in (1, 30, 10_000)]
    for name, change in steps[0].items():
        for other in steps[1:]:
            torch.testing.assert_close(other[name], change, rtol=1e-3, atol=1e-5)
    assert all(change.any() for change in steps[0].values())


def test_a_policy_step_at_ratio_1_is_reinforce(plain_steps):
    """Without value loss, the first update is a gradient step on A log pi: mean over each response,
    then over responses."""
    config = config_of(vf_coef=0.0, ppo_epochs=1, clip_norm=1e9)
    rollouts = some_rollouts()
    step = step_of(config, rollouts, plain_steps)
    policy = policy_of(config)
    _, table = experience(policy, rollouts, config)
    for row, r in enumerate(rollouts):
        logits = policy.model(torch.tensor([r.prompt + r.response]))[0].log_softmax(-1)
        for i, token in enumerate(r.response):
            t = len(r.prompt) - 1 + i
            objective = table["advantages"][row, t] * logits[t, token]
            (objective / len(r.response) / len(rollouts)).backward(retain_graph=True)
    for name, weight in policy.model.named_parameters():
        torch.testing.assert_close(step[f"model.{name}"], weight.grad, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_each_update_is_clipped(plain_steps):
    """Once, to clip_norm, over all weights, the value head's too; what is logged is the norm
    before."""
    rollouts = some_rollouts()
    norms = []
    for clip_norm in (1e9, 0.01):
        step = step_of(config_of(value_init="random", ppo_epochs=1, clip_norm=clip_norm,
                                 micro_batch_tokens=30), rollouts, plain_steps)
        norms.append(math.sqrt(sum(float(change.square().sum()) for change in step.values())))
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights():
    """With the numbers and a remedy."""
    policy = policy_of(config_of())
    before = weights_of(policy)
    with pytest.raises(SystemExit, match="--lr"):
        update(policy, train.new_optimizer(policy, config_of()), [[[0]]],
               lambda policy, rows: {"loss": policy.value_head.bias * math.inf}, config_of())
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(policy).items())


@pytest.mark.parametrize("options", [{}, {"advantage": "group"}, {"advantage": "rloo"},
                                     {"critic": "separate"}], ids=str)
def test_it_learns_to_say_what_is_rewarded(options):
    """The whole of steps 3 to 6 on a bandit: a response is right if its first token is 7. A sign, a
    shifted mask or a mixed-up row, and the share of sevens would not rise."""
    config = config_of(num_samples=4, lr=3e-3, kl_coef=0.01, **options)
    policy, reference = Policy(tiny_model(0, sharpness=0.5), config), tiny_model(0, sharpness=0.5)
    optimizer, shares = train.new_optimizer(policy, config), []
    prompts = [random_tokens(i, 2 + i % 3).tolist() for i in range(16)]
    for step in range(25):
        rollouts = []
        for prompt, group in zip(prompts, generate(policy.model, prompts, num_samples=4, eos_id=2,
                                                   max_new_tokens=5, seed=step)):
            for response in group:
                right = response.ids[0] == 7
                rollouts.append(Rollout("q", prompt, response.ids, response.finished,
                                        "correct" if right else "unparsed", float(right)))
        record = train_on(policy, reference, optimizer, rollouts, [], config, step)
        shares.append(record["accuracy"])
    assert fmean(shares[:3]) < 0.15 and fmean(shares[-3:]) > 0.6
    assert record["kl"] > 0.5


# --- Online-ST and Offline-ST ---------------------------------------------------------------------

@pytest.mark.parametrize("right", [0, 1, 4])
def test_online_self_training_is_half_gold(right):
    """1/2 mean NLL of the right samples + 1/2 mean NLL of gold, whatever their numbers; only the half
    of gold where none is right."""
    model, examples = tiny_model(), some_rollouts(7)
    samples, golds = examples[:right], examples[4:]
    weighted = halves(samples, golds)
    loss = self_training_loss(Policy(model, config_of(method="online_st")), weighted)["loss"]
    nll = [-fmean(slow_logps(model, e.prompt, e.response)) for e in examples]
    expected = fmean(nll[4:]) / 2 + (fmean(nll[:right]) / 2 if right else 0)
    assert float(loss.detach().sum() / len(weighted)) == pytest.approx(expected, abs=1e-4)


def test_online_self_training_learns_from_right_samples_that_end():
    """Wrong ones would teach the mistakes, cut ones never to stop; the rest of the record is as of
    ReFT, so that the two can be compared."""
    config = config_of(method="online_st", ppo_epochs=1)
    policy, seen = policy_of(config), []
    rollouts = some_rollouts(9)
    rollouts[2] = dataclasses.replace(rollouts[2], verdict="correct")  # right, but cut
    keep = [r for r in rollouts if r.right and r.finished]
    assert 0 < len(keep) < sum(r.right for r in rollouts)
    golds = [reft.Example("gold", [1, 5], [8, 2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reft, "self_training_loss", lambda policy, weighted: (
            seen.extend(weighted), self_training_loss(policy, weighted))[1])
        record = train_on(policy, tiny_model(), train.new_optimizer(policy, config), rollouts, golds,
                          config, 0)
    assert sorted(e.id for e, _ in seen) == sorted([*(r.id for r in keep), "gold"])
    assert record["tokens"] == sum(e.tokens for e in [*keep, *golds])
    assert record["accuracy"] == fmean(r.right for r in rollouts) and abs(record["kl"]) < 1e-5


def test_offline_paths_are_right_different_and_few():
    """Of 30 samples with 15 right texts, some twice, some cut: ten, all different; the same ones again
    for the same seed, others for another."""
    samples = [sample("correct", [5 + i % 15, 2], text=f"t{i % 15}") for i in range(25)]
    samples += [sample("wrong", [50 + i, 2], text=f"w{i}") for i in range(5)]
    samples += [sample("correct", [60], finished=False, text="cut")]
    random.Random(0).shuffle(samples)
    kept = keep_paths(samples, 10, "0 q")
    assert len(kept) == len({tuple(ids) for ids in kept}) == 10
    assert all(5 <= ids[0] < 20 for ids in kept)
    assert keep_paths(samples, 10, "0 q") == kept != keep_paths(samples, 10, "1 q")
    assert len(keep_paths(samples, 99, "0 q")) == 15
    assert keep_paths([sample("wrong")], 10, "0 q") == []


# --- diagnostics ----------------------------------------------------------------------------------

def test_diagnostics_by_slow_loops():
    """Accuracy is not reward; KL and length are per response, entropy per token; padding and prompt
    have no part in any of them."""
    config = config_of(value_init="random")
    rollouts = some_rollouts()
    _, table = experience(policy_of(config), rollouts, config)
    record = diagnose(rollouts, table)
    tokens = [[(row, len(r.prompt) - 1 + i) for i in range(len(r.response))]
              for row, r in enumerate(rollouts)]
    flat = sum(tokens, [])
    ratios = [[float(table["logps"][t] - table["ref_logps"][t]) for t in row] for row in tokens]
    returns = [float(table["returns"][t]) for t in flat]
    errors = [float(table["returns"][t] - table["values"][t]) for t in flat]

    def variance(x):
        return fmean((value - fmean(x)) ** 2 for value in x)

    expected = {"reward": (3 * 1.0 + 2 * 0.1) / 7, "accuracy": 3 / 7, "eos_rate": 5 / 7,
                "kl": fmean(map(sum, ratios)),
                "kl_k3": fmean(sum(math.exp(-x) - 1 + x for x in row) for row in ratios),
                "entropy": fmean(float(table["entropy"][t]) for t in flat),
                "length": fmean(len(r.response) for r in rollouts),
                "explained_variance": 1 - variance(errors) / variance(returns)}
    assert record == pytest.approx(expected, rel=1e-3)


HEALTHY = {"step": 0, "kl": 0.0, "kl_k3": 0.0, "entropy": 0.1, "eos_rate": 1.0,
           "first_ratio_error": 0.0}


@pytest.mark.parametrize("changed, named", [
    ({"kl": 21.0, "step": 5}, ["21.0 nats", "20", "--kl_coef"]),
    ({"kl_k3": 0.6}, ["0.60", "before the first update", "reference"]),
    ({"entropy": 0.001}, ["0.0010", "0.002"]), ({"eos_rate": 0.4}, ["40%", "EOS", "50%"]),
    ({"first_ratio_error": 0.01}, ["1.0e-02", "ratio", "1e-3"])])
def test_warnings_say_what_is_wrong_and_what_is_healthy(changed, named):
    """In words, with the number and the threshold; and nothing else is said."""
    assert unhealthy(HEALTHY) == {}
    [text] = unhealthy(HEALTHY | changed).values()
    assert all(part in text for part in named), text
    assert unhealthy(HEALTHY | {"kl_k3": 9.0, "step": 1}) == {}  # later a KL is no surprise


# --- config ---------------------------------------------------------------------------------------

def parsed(*argv: str) -> Config:
    return parse_config(Config, reft.PRESETS, "", ["--model", "somewhere", *argv])


def test_defaults_are_the_papers():
    """Section 4 and appendix; gamma and lambda as the authors' code has them."""
    paper = dict(gamma=1.0, gae_lambda=0.95, vf_coef=5.0, clip_range=0.2, value_clip_range=0.2,
                 ppo_epochs=2, kl_coef=0.05, partial_reward=0.1, lr=3e-7, batch_size=32, epochs=300,
                 num_samples=1, mini_batch_size=0, temperature=1.0, warmup_epochs=2, sft_lr=1e-5,
                 sft_batch_size=48, clip_norm=1.0, weight_decay=0.0, lr_schedule="constant",
                 critic="shared", advantage="gae", offline_samples=100, offline_paths=10)
    config = parsed()
    assert {name: getattr(config, name) for name in paper} == paper


@pytest.mark.parametrize("argv, named", [
    (["--temperature", "0.7"], "distribution that was sampled"), (["--method", "ppo"], "--method ppo"),
    (["--advantage", "group"], "--num_samples 2"), (["--advantage", "td"], "--advantage td"),
    (["--critic", "two"], "--critic two"), (["--value_init", "one"], "--value_init one"),
    (["--warmup_epochs", "-1"], "--warmup_epochs -1"), (["--kl_coef", "-0.1"], "--kl_coef -0.1"),
    (["--ppo_epochs", "0"], "--ppo_epochs 0"), (["--num_samples", "0"], "--num_samples 0"),
    (["--method", "online_st", "--mini_batch_size", "4"], "--mini_batch_size"),
    (["--top_k", "50"], "--top_k"), (["--top_p", "0.9"], "--top_p"), (["--model", ""], "--model")])
def test_impossible_flags_fail(argv, named, capsys):
    """A temperature would make ratio and KL those of another distribution; top-k and top-p do not
    exist, for the same reason."""
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


# --- whole runs -----------------------------------------------------------------------------------

SMALL = ["--preset", "smoke", "--num_questions", "10", "--max_new_tokens", "24", "--batch_size", "5",
         "--max_steps", "5", "--eval_every", "2", "--save_every", "2", "--eval_questions", "6",
         "--mini_batch_size", "2", "--sft_batch_size", "4", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:  # noqa: F811
    """A finished run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    call(reft, *SMALL, "--model", base, "--run_dir", folder)
    return folder


def test_a_run_writes_its_files_and_its_record(run, base):  # noqa: F811
    """Under the names that the report relies on; the record is that of the files."""
    for name in ("iter0/train.jsonl", "iter0/model/config.json", "iter0/eval.json",
                 "iter1/train.jsonl", "iter1/model/tokenizer.model", "iter1/eval_samples.jsonl",
                 "log.jsonl", "source/reft.py"):
        assert (run / name).is_file(), name
    assert list(run.rglob("*.tmp")) == list(run.rglob("state")) == []
    rows = json.loads((run / "results.json").read_text())
    assert [(row["name"], row["iteration"], row["split"]) for row in rows] == [
        ("warm-up", 0, "dev"), ("warm-up", 0, "test"), ("ReFT", 1, "train"), ("ReFT", 1, "dev"),
        ("ReFT", 1, "test")]
    assert all(row["n"] == 6 and len(row["ci95"]) == 2 for row in rows if row["split"] != "train")
    steps = read_lines(run / "iter1" / "train.jsonl")
    assert [step["step"] for step in steps] == list(range(5))
    assert [step["step"] for step in steps if "dev" in step] == [1, 3]
    assert rows[2]["steps"] == 5
    assert rows[2]["tokens_sampled"] == sum(step["tokens_sampled"] for step in steps)
    assert weights_hash(load_model(run / "iter0" / "model")) != weights_hash(load_model(base))


def test_a_run_starts_at_its_identities(run):
    """In the run itself, with the sampler, bf16 and all: KL 0 at step 0, ratio 1 at each first
    update; later there is a KL."""
    steps = read_lines(run / "iter1" / "train.jsonl")
    assert abs(steps[0]["kl"]) < 1e-5 and abs(steps[0]["kl_k3"]) < 1e-5
    assert all(step["first_ratio_error"] < 1e-5 for step in steps)
    assert steps[-1]["kl_k3"] > 1e-4
    assert steps[0]["explained_variance"] == pytest.approx(0, abs=1e-6)  # V = 0 explains nothing


def same_run(one: Path, other: Path) -> None:
    """Equal to the byte."""
    for name in ("results.json", "iter0/model/model.safetensors", "iter0/train.jsonl",
                 "iter1/model/model.safetensors", "iter1/train.jsonl", "iter1/eval_samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_interrupted_and_continued_equals_uninterrupted(run, base, tmp_path, monkeypatch):  # noqa: F811
    """Stopped in the middle of batch 3, with the state of two batches: batch 2 must come again, with the
    same moments of Adam and the same samples."""
    arguments = [*SMALL, "--model", base, "--run_dir", tmp_path / "run"]
    roll_out = reft.roll_out

    def stop_at_3(model, tokenizer, problems, config, step):
        if step == 3:
            raise KeyboardInterrupt
        return roll_out(model, tokenizer, problems, config, step)

    monkeypatch.setattr(reft, "roll_out", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        call(reft, *arguments)
    assert [path.name for path in (tmp_path / "run" / "iter1" / "state").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(reft, "roll_out", roll_out)
    call(reft, *arguments)
    same_run(run, tmp_path / "run")


def test_killed_and_continued_equals_uninterrupted(run, base, tmp_path):  # noqa: F811
    """SIGKILL once a state is there, junk under the temporary names, and the same command again."""
    folder = tmp_path / "run"
    arguments = [*SMALL, "--model", str(base), "--run_dir", str(folder)]
    child = subprocess.Popen([sys.executable, "reft.py", *arguments], cwd=ROOT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("iter1/state/step-*[0-9]")):
        assert child.poll() is None, "it ended before a state was there"
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (folder / "iter1" / "model").exists()
    (folder / "iter1" / "state" / "step-00000004.new.tmp").mkdir(exist_ok=True)
    call(reft, *arguments)
    same_run(run, folder)


def test_the_learning_rate_follows_its_schedule(base, tmp_path):  # noqa: F811
    """In batches, not in updates: at the last of five, a fifth of it is left."""
    call(reft, *SMALL, "--lr_schedule", "linear", "--warmup_epochs", "0", "--eval_every", "0",
         "--model", base, "--run_dir", tmp_path / "run")
    steps = read_lines(tmp_path / "run" / "iter1" / "train.jsonl")
    assert [step["lr"] for step in steps] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


def test_rollouts_are_a_function_of_seed_and_step(base):  # noqa: F811
    """Not of what was sampled before, which a continued run has forgotten."""
    config = config_of(max_new_tokens=24, num_samples=2)
    model, tokenizer = load_model(base), reft.load_tokenizer(base)
    problems = config.problems("train", 4)
    first, again, later = (reft.roll_out(model, tokenizer, problems, config, step) for step in (3, 3, 4))
    assert first == again != later
    assert reft.roll_out(model, tokenizer, problems, dataclasses.replace(config, seed=1), 3) != first
    assert [r.id for r in first] == [p.id for p in problems for _ in range(2)]
    assert all((r.response[-1] == 2) == r.finished for r in first)


@pytest.mark.parametrize("flags, name", [
    (["--method", "offline_st"], "Offline-ST"),
    (["--method", "online_st", "--mini_batch_size", "0"], "Online-ST"),
    (["--advantage", "group", "--num_samples", "2"], "ReFT"),
    (["--critic", "separate", "--value_init", "random", "--mini_batch_size", "0"], "ReFT"),
    (["--kl_coef", "0", "--partial_reward", "0", "--gae_lambda", "1"], "ReFT"),
    (["--warmup_epochs", "0"], "ReFT")], ids=str)
def test_every_variant_is_a_flag(flags, name, base, tmp_path):  # noqa: F811
    """Each runs to its record, under its name."""
    call(reft, *SMALL, "--max_steps", "2", "--offline_samples", "2", "--sft_epochs", "1", *flags,
         "--model", base, "--run_dir", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in rows] == ["warm-up"] * 2 + [name] * 3
    steps = read_lines(tmp_path / "run" / "iter1" / "train.jsonl")
    assert ("value_loss" in steps[0]) == (name == "ReFT" and "group" not in flags)
    assert ("explained_variance" in steps[0]) == ("value_loss" in steps[0])
    assert ("nll" in steps[0]) == (name != "ReFT")
    assert (tmp_path / "run" / "iter0" / "model").exists() == ("--warmup_epochs" not in flags)
    if name == "Offline-ST":
        assert rows[2]["gold"] == 10 and rows[2]["tokens_sampled"] > 20


def test_offline_self_training_starts_from_the_base(base, tmp_path, monkeypatch):  # noqa: F811
    """And not from pi_0, on gold and the paths that were kept, each once an epoch."""
    seen, started = [], []
    right = Sample([9, 2], True, "text", "correct", "1")

    def fit(model, items, *args, **options):
        started.append(weights_hash(model))
        seen.append(items)
        return [{"step": 0, "loss": 0.0, "tokens": 1}]

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(evaluate, "answer", lambda model, tokenizer, problems, config, **options: [
        Answered(p.id, "p", [1, 5], "1", [right] * options["num_samples"]) for p in problems])
    config = config_of(model=str(base), method="offline_st", offline_samples=3)
    problems, gold = config.problems("train", 2), reft.Example("g", [1, 5], [8, 2])
    (tmp_path / "run").mkdir()
    reft.offline_self_training(config, tmp_path / "run", str(base), None, problems, {"g": gold})
    assert started == [weights_hash(load_model(base))]
    assert [(e.id, e.response) for e in seen[0]] == [
        ("g", [8, 2]), (problems[0].id, [9, 2]), (problems[1].id, [9, 2])]


def test_multiple_choice_pays_for_a_lucky_letter():
    """Section 4.3: a wrong number with the right letter earns 1, another letter nothing at all."""
    config = config_of(num_choices=2)
    def paid(answer):
        return score(Sample([3], True, "t", "correct" if answer == "6" else "wrong", answer), "6", config)
    assert [paid(a) for a in ("6", "8", "-2", "7", "1/2", None)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert reft.letter("-3", 4) == 1 and reft.letter("7", 4) == 3
    assert score(Sample([3], True, "t", "unparsed", None), "203.0", config) == 0.0
    assert score(Sample([3], True, "t", "correct", "203"), "203.0", config) == 1.0
    assert score(Sample([3], True, "t", "correct", "1234"), "1,234", config) == 1.0
    for bad in (dict(num_choices=1), dict(num_choices=2, task="arc")):
        with pytest.raises(ValueError, match="num_choices"):
            config_of(**bad)
