"""ReFT on tiny models: scores, advantages, identities, gradients; and which model does what in a run."""
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

import evaluate
import reft
import train
from checkpoint import load_model, model_hash, num_parameters
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample
from infra.config import parse_config
from infra.run import derive_seed, hash_of, read_json, read_records, write_records
from reft import (Config, Policy, Rollout, add_advantages, diagnose, measure, measured, offline_paths, ppo_loss,
                  roll_out, score, train_on)
from runs import call, read_lines, refusal, settings
from tiny import random_tokens, slow_logps, tiny_model
from train import Example, autocast, batch_at, micro_batches, new_optimizer

EVERY = torch.ones(2, 5, dtype=torch.bool)  # mask: all of (2, 6) tokens but the first
SCORES = (1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 1.0)


def config_of(**options) -> Config:
    return Config(**{"model": "somewhere", "run_dir": "somewhere", "precision": "fp32", "lr": 1e-2, "task": "toy"}
                  | options)


def some_rollouts(count: int = 7) -> list[Rollout]:
    """Make ragged rollouts of random tokens; every third is truncated before EOS (2)."""
    rollouts = []
    for i in range(count):
        prompt, response, finished = random_tokens(i, 1 + 3 * i % 5), random_tokens(50 + i, 1 + 5 * i % 9), i % 3 != 2
        rollouts.append(Rollout(f"q{i}", prompt.tolist(), response.tolist() + [2] * finished, finished,
                                SCORES[i % 7] == 1.0, SCORES[i % 7], i))
    return rollouts


def columns_of(r: Rollout) -> slice:
    """Give the columns of a response in a table."""
    return slice(len(r.prompt) - 1, len(r.prompt) - 1 + len(r.response))


def policy_of(config: Config) -> Policy:
    return Policy(tiny_model(), config)


def experience(policy: Policy, rollouts: list[Rollout], config: Config) -> dict[str, torch.Tensor]:
    """Run steps 3 to 5, with a reference of other weights."""
    table = measure(policy, tiny_model(9), rollouts, micro_batches(rollouts, config.micro_batch_tokens), config)
    return add_advantages(table, torch.tensor([r.score for r in rollouts]), config)


# --- steps 1 and 2: responses and scores -----------------------------------------------------------

def sample(verdict: str, ids=(5, 2), finished: bool = True, text: str = "text", answer: str | None = None) -> Sample:
    return Sample(list(ids), finished, text, verdict, answer)


@pytest.mark.parametrize("options, wrong", [
    ({}, 0.1), ({"partial_reward": 0.3}, 0.3), ({"task": "gsm8k"}, 0.1), ({"task": "svamp"}, 0.1),
    ({"task": "mathqa-numeric"}, 0.1), ({"task": "mathqa"}, 0.0), ({"task": "arc"}, 0.0)], ids=str)
def test_scores(options, wrong):
    """The partial reward is for an answer that is given and wrong, not for silence or a program that hangs. Of multiple
    choice every guess is an answer: 0.1 for it is a constant that teaches to guess. (The authors' code pays it for
    MathQA, even to programs that crash.) A truncated response is graded by its text, as in the authors' code."""
    for finished in (True, False):
        assert [score(sample(verdict, finished=finished), "1", config_of(**options))
                for verdict in ("correct", "wrong", "unparsed", "timeout")] == [1.0, wrong, 0.0, 0.0]


def test_multiple_choice_pays_for_a_lucky_letter():
    """Section 4.3: a wrong number with the right letter earns 1, another letter nothing at all."""
    config = config_of(num_choices=2)

    def paid(answer, gold="6"):
        return score(sample("correct" if answer == gold else "wrong", answer=answer), gold, config)

    assert [paid(answer) for answer in ("6", "8", "-2", "7", "1/2", None)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert reft.letter("-3", 4) == 1 and reft.letter("7", 4) == 3
    assert paid(None, "203.0") == 0.0 and paid("203", "203.0") == 1.0 and paid("1234", "1,234") == 1.0


def test_lucky_letters_are_counted_on_test_only(tmp_path, monkeypatch):
    """Of the file that the evaluation wrote; without --num_choices there is no such number."""
    monkeypatch.setattr(reft, "evaluate_model", lambda *args: [{"split": "dev"}, {"split": "test"}])
    answered = [Answered("q", "p", [1], "6", [sample("wrong", answer=answer), sample("correct", answer="6")])
                for answer in ("6", "7", "8")]
    write_records(tmp_path / "eval_samples.jsonl", answered, {"seed": 0})
    counted = [measured("M", 1, "somewhere", config_of(num_choices=n), tmp_path) for n in (2, 0)]
    assert counted == [[{"split": "dev"}, {"split": "test", "letter_accuracy": pytest.approx(2 / 3)}],
                       [{"split": "dev"}, {"split": "test"}]]
    assert read_json(tmp_path / "eval.json") == counted[0]  # which the report of an unfinished run reads


def test_rollouts_are_samples_with_their_scores_and_rows(monkeypatch):
    """Question by question, as they were answered."""
    monkeypatch.setattr(reft, "answer", lambda *args, **how: [
        Answered("a", "p", [1, 5], "1", [sample("correct", [6, 2]), sample("wrong", [7], finished=False)]),
        Answered("b", "p", [1, 8], "1", [sample("unparsed", [9, 2]), sample("correct", [9, 9, 2])])])
    assert roll_out("model", "tokenizer", [], config_of(num_samples=2, partial_reward=0.3), 0) == [
        Rollout("a", [1, 5], [6, 2], True, True, 1.0, 0), Rollout("a", [1, 5], [7], False, False, 0.3, 1),
        Rollout("b", [1, 8], [9, 2], True, False, 0.0, 2), Rollout("b", [1, 8], [9, 9, 2], True, True, 1.0, 3)]


# --- step 3: one forward pass ----------------------------------------------------------------------

@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_the_table_is_what_each_response_alone_gives(budget, critic):
    """Column t: the action that makes token t + 1, and V of tokens 0 to t, each against a pass over the unpadded prefix
    alone. Rows mixed up by the sorting of micro-batches, or a mask that is off by one, train every token on another
    one's advantage."""
    config = config_of(value_init="random", micro_batch_tokens=budget, critic=critic)
    policy, reference, rollouts = policy_of(config), tiny_model(9), some_rollouts()
    with torch.no_grad():
        for weight in policy.critic.parameters() if critic == "separate" else ():
            weight *= 1.1  # as after some training
        table = measure(policy, reference, rollouts, micro_batches(rollouts, budget), config)
        assert not any(x.requires_grad for x in table.values())
        for r in rollouts:
            columns, values, entropies = columns_of(r), [], []
            mask = [float(columns.start <= t < columns.stop) for t in range(table["mask"].shape[1])]
            assert table["mask"][r.row].tolist() == mask
            for t in range(columns.start, columns.stop):
                prefix = torch.tensor([(r.prompt + r.response)[:t + 1]])
                trunk = policy.critic if critic == "separate" else policy.model.model
                values.append(float(policy.value_head(trunk(prefix))[0, -1, 0]))
                probs = policy.model(prefix)[0, -1].double().softmax(-1)
                entropies.append(-float((probs * probs.log()).sum()))
            expected = {"values": values, "entropy": entropies, "logps": slow_logps(policy.model, r.prompt, r.response),
                        "ref_logps": slow_logps(reference, r.prompt, r.response)}
            for name, slow in expected.items():
                assert table[name][r.row, columns].tolist() == pytest.approx(slow, abs=1e-4), name


def test_the_value_head_starts_at_zero_or_at_random():
    """Zero: no dip at the start. Random: as the paper, the same for the same seed."""
    assert torch.equal(policy_of(config_of())(random_tokens(0, 2, 6), EVERY)["values"], torch.zeros(2, 5))
    heads = [policy_of(config_of(value_init="random", seed=seed)).value_head for seed in (3, 3, 4)]
    assert torch.equal(heads[0].weight, heads[1].weight) and torch.equal(heads[0].bias, heads[1].bias)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert 0.1 < float(heads[0].weight.detach().abs().max()) <= 32 ** -0.5


def test_values_are_float32_under_autocast():
    """In bfloat16 a value of 0.7 is off by up to 0.002, and returns are made of it."""
    policy, tokens = policy_of(config_of(value_init="random")), random_tokens(1, 2, 6)
    with autocast("bf16"):
        found = policy(tokens, EVERY, with_entropy=True)
        hidden = policy.model.model(tokens)
    assert {x.dtype for x in found.values()} == {torch.float32} and len(found) == 3
    torch.testing.assert_close(found["values"], policy.value_head(hidden[:, :-1].float()).squeeze(-1))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_which_trunk_the_value_loss_trains(critic):
    """A separate critic, which starts as a copy, leaves the policy alone; a shared one does not."""
    policy = policy_of(config_of(critic=critic, value_init="random"))
    policy(random_tokens(2, 2, 6), EVERY)["values"].sum().backward()
    learning = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"value_head", "model" if critic == "shared" else "critic"}
    if critic == "separate":
        trunk = tiny_model().model.state_dict()
        assert all(torch.equal(weight, trunk[name]) for name, weight in policy.critic.state_dict().items())


# --- steps 4 and 5: rewards and advantages ---------------------------------------------------------

def test_advantages_of_gae_by_slow_loops():
    """Score on the last response token (EOS, unless it was truncated), KL on each, GAE on unwhitened numbers, whitening
    over all tokens of the batch; returns unwhitened."""
    config = config_of(value_init="random", kl_coef=0.3, gae_lambda=0.9, gamma=0.97)
    rollouts = some_rollouts()
    table = experience(policy_of(config), rollouts, config)
    slow = []
    for r in rollouts:
        logps, ref_logps, V = (table[name][r.row, columns_of(r)].tolist() for name in ("logps", "ref_logps", "values"))
        rewards = [-0.3 * (a - b) for a, b in zip(logps, ref_logps)]
        rewards[-1] += r.score
        A = 0.0
        for t in reversed(range(len(rewards))):
            A = rewards[t] + 0.97 * [*V, 0.0][t + 1] - V[t] + 0.97 * 0.9 * A
            slow.append(((r.row, len(r.prompt) - 1 + t), A))
            assert float(table["returns"][slow[-1][0]]) == pytest.approx(A + V[t], abs=1e-4)
    mean = fmean(A for _, A in slow)
    std = math.sqrt(fmean((A - mean) ** 2 for _, A in slow))
    assert len(slow) == int(table["advantages"].count_nonzero())
    for place, A in slow:
        assert float(table["advantages"][place]) == pytest.approx((A - mean) / std, abs=1e-3)


@pytest.mark.parametrize("advantage", ["group", "rloo"])
def test_advantages_without_a_critic(advantage):
    """One number for all tokens of a response, from the scores of its own question; the KL to come is taken off, and
    does not decide where all scores of a question are equal."""
    config, scores = config_of(advantage=advantage, num_samples=3, kl_coef=0.02), [1.0, 0.0, 0.1, 0.1, 0.1, 0.1]
    rollouts = [replace(r, score=s) for r, s in zip(some_rollouts(6), scores)]
    policy = policy_of(config)
    assert policy.value_head is None
    table = experience(policy, rollouts, config)
    assert "returns" not in table and "values" not in table
    std = math.sqrt(fmean((s - 1.1 / 3) ** 2 for s in scores[:3]))
    compared = {"group": [(s - 1.1 / 3) / std for s in scores[:3]],
                "rloo": [1.0 - 0.05, 0.0 - 0.55, 0.1 - 0.5]}[advantage] + [0.0] * 3
    for r in rollouts:
        kl = (table["logps"] - table["ref_logps"])[r.row, columns_of(r)].tolist()
        expected = [compared[r.row] - 0.02 * sum(kl[t:]) for t in range(len(kl))]
        assert table["advantages"][r.row, columns_of(r)].tolist() == pytest.approx(expected, abs=1e-3)


# --- step 6: the update ----------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}, {"critic": "separate"}, {"micro_batch_tokens": 30},
                                     {"advantage": "rloo", "num_samples": 2}], ids=str)
def test_the_first_update_starts_at_ratio_1_and_kl_0(precision, options):
    """Old log-probs from the sampler, another precision or another batch are off by percents, and the clip cuts off
    what is no change. The second update must not start at 1. A reference equal to what is trained has a KL of 0."""
    config = config_of(precision=precision, **{"value_init": "random"} | options)
    policy = policy_of(config)
    record = train_on(policy, tiny_model(), new_optimizer(policy, config), some_rollouts(12), [], config, 0)
    assert record["first_ratio_error"] == 0 and record["kl"] == record["kl_k3"] == 0
    assert record["ratio_error"] > 1e-3 and record["ratio_max"] > 1

    record = train_on(policy_of(config), tiny_model(1), new_optimizer(policy, config), some_rollouts(12), [],
                      replace(config, ppo_epochs=1, mini_batch_size=0), 0)
    assert record["ratio_max"] == 1 and record["ratio_error"] == record["clip_fraction"] == 0
    assert record["kl_k3"] > 1


@pytest.mark.parametrize("size, sizes", [(0, [7]), (3, [3, 3, 1]), (100, [7])])
def test_each_response_is_in_one_mini_batch_of_each_pass(size, sizes, monkeypatch):
    """And there are ppo_epochs passes; which responses are together differs by step and seed. The old log-probs come
    from the same micro-batches: from others, ratios would start a little off 1."""
    updates, parts, orders, rollouts = [], [], [], some_rollouts()
    monkeypatch.setattr(reft, "descend", lambda model, optimizer, parts, *rest: (
        updates.append(parts), train.descend(model, optimizer, parts, *rest))[1])
    monkeypatch.setattr(reft, "measure", lambda *args: (parts.extend(args[3]), measure(*args))[1])
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        config = config_of(ppo_epochs=3, mini_batch_size=size, micro_batch_tokens=20, seed=seed)
        policy = policy_of(config)
        record = train_on(policy, tiny_model(9), new_optimizer(policy, config), rollouts, [], config, step)
        assert sum(updates, []) == 3 * parts and len(parts) > len(sizes)
        orders.append([sorted(r.row for part in update for r in part) for update in updates])
        updates.clear()
        parts.clear()
        assert [len(update) for update in orders[-1]] == 3 * sizes
        assert Counter(sum(orders[-1], [])) == dict.fromkeys(range(7), 3)
        assert record["tokens"] == 3 * sum(len(r.prompt + r.response) for r in rollouts)
    assert orders[0] == orders[1] and (size != 3 or orders[2] != orders[0] != orders[3])


def slow_ppo(policy: Policy, r: Rollout, table: dict, config: Config) -> dict[str, float]:
    """Compute the losses of one response as the paper has them, and what its ratios are."""
    new = slow_logps(policy.model, r.prompt, r.response)
    with torch.no_grad():
        tokens = torch.tensor([r.prompt + r.response])
        values = policy(tokens, tokens[:, 1:] > 0)["values"][0].tolist()
    policy_loss, value_loss, ratios = [], [], []
    for i, logp in enumerate(new):
        t = len(r.prompt) - 1 + i
        old = {name: float(x[r.row, t]) for name, x in table.items()}
        ratios.append(math.exp(logp - old["logps"]))
        clipped = min(max(ratios[-1], 1 - config.clip_range), 1 + config.clip_range)
        policy_loss.append(-min(ratios[-1] * old["advantages"], clipped * old["advantages"]))
        near = min(max(values[t], old["values"] - config.value_clip_range), old["values"] + config.value_clip_range)
        value_loss.append(0.5 * max((values[t] - old["returns"]) ** 2, (near - old["returns"]) ** 2))
    return {"loss": fmean(policy_loss) + config.vf_coef * fmean(value_loss), "policy_loss": fmean(policy_loss),
            "value_loss": fmean(value_loss), "ratio_max": max(*ratios, 1.0),
            "ratio_error": max(abs(ratio - 1) for ratio in ratios),
            "clip_fraction": fmean(abs(ratio - 1) > config.clip_range for ratio in ratios)}


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_loss_is_the_papers(critic):
    """Policy loss plus alpha times value loss, a mean over each response's tokens, on a policy that has moved away from
    the one that sampled; and its ratios, and how many of them the clip affects."""
    config = config_of(value_init="random", clip_range=0.3, value_clip_range=0.1, vf_coef=2.5, critic=critic)
    rollouts = some_rollouts()
    table = experience(policy_of(config), rollouts, config)
    moved = policy_of(replace(config, seed=1))
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    part = [rollouts[row] for row in (3, 0, 5, 4)]
    got, slow = ppo_loss(moved, part, table, config), [slow_ppo(moved, r, table, config) for r in part]
    for name, x in got.items():
        assert x.tolist() == pytest.approx([one[name] for one in slow], rel=1e-3, abs=1e-3), name
    assert len(got) == 6 and len({one["clip_fraction"] for one in slow}) > 2


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_the_first_step_is_reinforce_with_a_baseline(critic, budget):
    """At ratio 1 and with the old V, it is minus the gradient of -A log pi + alpha (V - R)^2 / 2: a mean over each
    response, then over responses, in whichever micro-batches; all weights take part."""
    config, rollouts = config_of(vf_coef=2.5, ppo_epochs=1, clip_norm=1e9, value_init="random", critic=critic,
                                 micro_batch_tokens=budget), some_rollouts()
    policy, slow = policy_of(config), policy_of(config)
    train_on(policy, tiny_model(9), torch.optim.SGD(policy.parameters(), lr=1.0), rollouts, [], config, 0)
    table = experience(slow, rollouts, config)
    for r in rollouts:
        tokens = torch.tensor([r.prompt + r.response])
        logps = slow.model(tokens)[0].log_softmax(-1)[columns_of(r)][range(len(r.response)), r.response]
        values = slow(tokens, tokens[:, 1:] > 0)["values"][0, columns_of(r)]
        A, R = (table[name][r.row, columns_of(r)] for name in ("advantages", "returns"))
        ((-A * logps + 2.5 * (values - R).square() / 2).mean() / len(rollouts)).backward()
    for (name, weight), stepped in zip(slow.named_parameters(), policy.parameters()):
        torch.testing.assert_close(weight - stepped, weight.grad, rtol=1e-3, atol=1e-4, msg=name)
        assert weight.grad.any()


# --- Online-ST and Offline-ST ----------------------------------------------------------------------

@pytest.mark.parametrize("right", [0, 1, 3])
@pytest.mark.parametrize("golds", [0, 2])
@pytest.mark.parametrize("budget", [20, 10_000])
def test_online_self_training_is_half_gold(right, golds, budget):
    """1/2 mean NLL of the right samples that end + 1/2 mean NLL of gold, whatever their numbers; only one half where
    there is only one, and no step where there is neither. Wrong samples would teach the mistakes, truncated ones never
    to stop. The rest of the record is that of ReFT, so that the two can be compared."""
    config = config_of(method="online_st", ppo_epochs=1, micro_batch_tokens=budget)
    rollouts = [replace(r, right=r.row < right or not r.finished, finished=r.finished or r.row < right)
                for r in some_rollouts(9)]
    learned, solutions = rollouts[:right], [Example(f"g{i}", [1, 5, 6 + i], [8, 9, 2][i:]) for i in range(golds)]
    model, policy = tiny_model(), policy_of(config)
    record = train_on(policy, model, new_optimizer(policy, config), rollouts, solutions, config, 0)

    halves = [fmean(-fmean(slow_logps(model, e.prompt, e.response)) for e in half) / 2
              for half in (learned, solutions) if half]
    assert record.get("loss", 0) == pytest.approx(sum(halves), abs=1e-4)
    assert any((weight != before).any() for weight, before in zip(policy.parameters(), tiny_model().parameters())) == (
        right + golds > 0)
    assert record["tokens"] == sum(len(e.prompt + e.response) for e in [*learned, *solutions])
    assert record["tokens_sampled"] == sum(len(r.response) for r in rollouts)
    assert record["accuracy"] == fmean(r.right for r in rollouts) and record["kl"] == 0


def test_offline_paths_are_right_different_and_few():
    """Of 31 samples with 15 right texts, some twice, one truncated: ten, all different; the same again for the seed."""
    samples = [sample("correct", [5 + i % 15, 2], text=f"t{i % 15}") for i in range(25)]
    samples += [sample("wrong", [50 + i, 2], text=f"w{i}") for i in range(5)]
    samples += [sample("correct", [60], finished=False, text="truncated")]
    random.Random(0).shuffle(samples)

    def kept(count: int, seed: int, samples=samples) -> list[list[int]]:
        paths = offline_paths([Answered("q", "p", [1, 4], "1", samples)], config_of(offline_paths=count, seed=seed))
        assert all((path.id, path.prompt) == ("q", [1, 4]) for path in paths)
        return [path.response for path in paths]

    assert len(kept(10, 0)) == len({tuple(ids) for ids in kept(10, 0)}) == 10
    assert all(5 <= ids[0] < 20 for ids in kept(10, 0))
    assert kept(10, 0) == kept(10, 0) != kept(10, 1)
    assert len(kept(99, 0)) == 15 and kept(10, 0, [sample("wrong")]) == []


# --- diagnostics -----------------------------------------------------------------------------------

def test_diagnostics_by_slow_loops():
    """Accuracy is not reward; KL and length are per response, entropy per token; padding and prompt have no part in any
    of them."""
    config, rollouts = config_of(value_init="random"), some_rollouts()
    table = experience(policy_of(config), rollouts, config)
    tokens = [{name: x[r.row, columns_of(r)].double() for name, x in table.items()} for r in rollouts]
    ratios = [row["logps"] - row["ref_logps"] for row in tokens]
    entropy, values, returns = (torch.cat([row[name] for row in tokens]) for name in ("entropy", "values", "returns"))
    expected = {"reward": (3 * 1.0 + 2 * 0.1) / 7, "accuracy": 3 / 7, "eos_rate": 5 / 7,
                "kl": fmean(float(x.sum()) for x in ratios),
                "kl_k3": fmean(float(((-x).exp() - 1 + x).sum()) for x in ratios),
                "entropy": float(entropy.mean()), "length": fmean(len(r.response) for r in rollouts),
                "explained_variance": 1 - float((returns - values).var() / returns.var())}
    assert diagnose(rollouts, table) == pytest.approx(expected, rel=1e-3)
    same = table | dict.fromkeys(("returns", "values"), table["mask"])  # all responses alike: 0 / 0 is no number
    assert diagnose(rollouts, same)["explained_variance"] == 1


HEALTHY = {"step": 0, "kl": 20.0, "kl_k3": 0.5, "entropy": 0.002, "eos_rate": 0.5, "first_ratio_error": 1e-3}  # just


@pytest.mark.parametrize("changed, named", [
    ({"kl": 21.0, "step": 5}, ["21.0 nats", "20", "--kl_coef"]), ({"entropy": 0.001}, ["0.0010", "0.002"]),
    ({"kl_k3": 0.6}, ["0.60", "before the first update", "reference"]), ({"eos_rate": 0.4}, ["40%", "EOS", "50%"]),
    ({"first_ratio_error": 0.01}, ["1.0e-02", "ratio", "1e-3"])])
def test_warnings_say_what_is_wrong_and_what_is_healthy(changed, named):
    """In words, with the number and the threshold; and nothing else is said."""
    def said(record: dict) -> list[str]:
        return [text.format(**record) for bad, text in reft.UNHEALTHY.values() if bad(record)]

    assert said(HEALTHY) == said(HEALTHY | {"kl_k3": 9.0, "step": 1}) == []  # later a KL is no surprise
    [text] = said(HEALTHY | changed)
    assert all(part in text for part in named), text


# --- config ----------------------------------------------------------------------------------------

def parsed(*argv: str) -> Config:
    return parse_config(Config, {"toy": reft.TOY, "smoke": reft.SMOKE}, "", ["--model", "somewhere", *argv])


def test_defaults_are_the_papers():
    """Section 4 and appendix; gamma and lambda as the authors' code has them."""
    paper = dict(gamma=1.0, gae_lambda=0.95, vf_coef=5.0, clip_range=0.2, value_clip_range=0.2, ppo_epochs=2,
                 kl_coef=0.05, partial_reward=0.1, lr=3e-7, batch_size=32, epochs=300, num_samples=1,
                 mini_batch_size=0, warmup_epochs=2, sft_lr=1e-5, sft_batch_size=48, clip_norm=1.0, weight_decay=0.0,
                 lr_schedule="constant", critic="shared", advantage="gae", offline_samples=100, offline_paths=10)
    config = parsed()
    assert {name: getattr(config, name) for name in paper} == paper


@pytest.mark.parametrize("flags, said", [
    ("--temperature 0.7", "--temperature"), ("--top_k 50", "--top_k"), ("--top_p 0.9", "--top_p"),
    ("--advantage group", "--num_samples 2"), ("--num_choices 1", "--num_choices 1"),
    ("--method ppo", "--method ppo"), ("--value_init one", "--value_init one"), ("--kl_coef -0.1", "--kl_coef -0.1"),
    ("--warmup_epochs -1", "--warmup_epochs -1"), ("--ppo_epochs 0", "--ppo_epochs 0"),
    ("--method online_st --mini_batch_size 4", "--mini_batch_size"), ("--critic two", "--critic two"),
    ("--method online_st --nll_norm token", "--nll_norm token"), ("--sft_lr 0", "--sft_lr 0"),
    ("--method sft --critic separate", "--critic separate"), ("--advantage td", "--advantage td"),
    ("--advantage rloo --num_samples 2 --critic separate", "--critic separate"),
    ("--method online_st --num_choices 4", "--num_choices"), ("--task arc --num_choices 2", "--num_choices 2")])
def test_impossible_flags_fail(flags, said, capsys):
    """Temperature, top-k and top-p do not exist: ratio and KL would be those of another distribution."""
    with pytest.raises(SystemExit) as stop:
        parsed(*flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err


# --- runs ------------------------------------------------------------------------------------------

SMALL = ["--preset", "smoke", "--num_questions", "10", "--max_new_tokens", "24", "--batch_size", "5",
         "--max_steps", "5", "--eval_every", "2", "--save_every", "2", "--eval_questions", "5", "--eval_samples", "2",
         "--seed", "3", "--mini_batch_size", "2", "--warmup_epochs", "5", "--sft_batch_size", "2", "--sft_lr", "2e-3",
         "--lr", "1e-3", "--lr_schedule", "cosine", "--warmup_share", "0.4"]
SHORT = [*SMALL, "--eval_samples", "0", "--warmup_epochs", "1"]


def fingerprint(model: torch.nn.Module) -> str:
    """Hash the weights of a model in training, or of the sampler that it gave, in whichever dtype."""
    model = model.model if isinstance(model, Policy) else model
    return hash_of(*(weight.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes()
                     for weight in model.parameters()))


def watch(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Note which models answer, train and are the reference in a run, whose scores differ whatever is sampled."""
    seen = SimpleNamespace(rollouts=[], dev=[], batches=[], fits=[])

    def answer(model, tokenizer, problems, options, **how):
        (seen.rollouts if how else seen.dev).append((fingerprint(model), [p.id for p in problems], how))
        return evaluate.answer(model, tokenizer, problems, options, **how)

    def noted(policy, reference, optimizer, rollouts, golds, config, step):
        batch = SimpleNamespace(before=fingerprint(policy), reference=fingerprint(reference), golds=golds, step=step,
                                ids=[r.id for r in rollouts])
        record = train_on(policy, reference, optimizer, rollouts, golds, config, step)
        batch.after = fingerprint(policy)
        seen.batches.append(batch)
        return record

    def fit_sft(model, examples, options, seed, folder):
        seen.fits.append(SimpleNamespace(model=fingerprint(model), examples=examples, seed=seed))
        return train.fit_sft(model, examples, options, seed, folder)

    patch.setattr(reft, "score", lambda sample, gold, config: sum(sample.ids) % 10 / 10)
    for name, stand_in in (("answer", answer), ("train_on", noted), ("fit_sft", fit_sft)):
        patch.setattr(reft, name, stand_in)
    return seen


def golds_of(base: Path) -> list[Example]:
    tokenizer, config = load_tokenizer(base), config_of(prompt="plain")
    return [Example(p.id, config.prompt_ids(tokenizer, p), config.gold_ids(tokenizer, p))
            for p in config.problems("train", 10)]


def ids_of(split: str, count: int) -> list[str]:
    return [problem.id for problem in config_of().problems(split, count)]


@pytest.fixture(scope="module")
def watched(base, tmp_path_factory) -> tuple[Path, SimpleNamespace]:
    """A finished run that nothing interrupted, and what was seen of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        call(reft, *SMALL, "--num_samples", "2", "--model", base, "--run_dir", folder)
    return folder, seen


@pytest.fixture
def run(watched) -> Path:
    return watched[0]


def test_a_run_writes_its_files_and_its_record(run):
    """Under the names that the report relies on; the record is that of the files."""
    for name in ("iter0/train.jsonl", "iter0/model/config.json", "iter0/eval.json", "iter1/train.jsonl",
                 "iter1/model/tokenizer.model", "iter1/eval_samples.jsonl", "log.jsonl", "source/reft.py"):
        assert (run / name).is_file(), name
    assert list(run.rglob("*.tmp")) == list(run.rglob("state")) == []
    rows = read_json(run / "results.json")
    assert [(row["name"], row["iteration"], row["split"]) for row in rows] == [
        ("warm-up", 0, "dev"), ("warm-up", 0, "test"), ("ReFT", 1, "train"), ("ReFT", 1, "dev"), ("ReFT", 1, "test")]
    assert rows[:2] == read_json(run / "iter0" / "eval.json") and rows[3:] == read_json(run / "iter1" / "eval.json")
    assert all(row["n"] == 5 and len(row["ci95"]) == 2 for row in rows if row["split"] != "train")

    steps = read_lines(run / "iter1" / "train.jsonl")
    assert [step["step"] for step in steps] == list(range(5))
    assert [step["step"] for step in steps if "dev" in step] == [1, 3]
    assert rows[2]["steps"] == 5 and rows[2]["reward"] == steps[-1]["reward"]
    assert rows[2]["tokens_sampled"] == sum(step["tokens_sampled"] for step in steps)
    assert rows[2]["tokens_trained"] == sum(step["tokens"] for step in steps)
    sampled, scored = rows[2]["tokens_sampled"], rows[2]["tokens_trained"] // 2
    forward = sampled + (scored - sampled) // 2 + 2 * scored  # samples, prompts, policy and reference
    warm_up = sum(step["tokens"] for step in read_lines(run / "iter0" / "train.jsonl"))
    assert rows[2]["flops"] == num_parameters(run / "iter1" / "model") * (2 * forward + 6 * (2 * scored + warm_up))


def test_learning_rates_and_numbers_of_steps(run):
    """Warm-up: warmup_epochs passes over 10 solutions, 2 at a time, rising to sft_lr over a tenth of the steps and
    falling linearly; max_steps, batch_size and --warmup_share are not about it. ReFT: in batches, not in updates."""
    warm_up, steps = (read_lines(run / f"iter{t}" / "train.jsonl") for t in (0, 1))
    expected = [1e-3, 2e-3, *(2e-3 * (1 - i / 23) for i in range(23))]
    assert [step["lr"] for step in warm_up] == pytest.approx(expected)
    assert [step["lr"] for step in steps] == pytest.approx(
        [5e-4, 1e-3, *(5e-4 * (1 + math.cos(math.pi * i / 3)) for i in range(3))])


def test_which_model_samples_trains_and_is_the_reference(watched, base):
    """pi_0 is the base after warm-up, pi begins as pi_0, each batch is sampled from pi as it is by then, and the
    reference is pi_0 throughout. A sampler that is made once, and the run would train on ever older samples."""
    run, seen = watched
    pi_0, pi = (fingerprint(load_model(run / f"iter{t}" / "model")) for t in (0, 1))
    [fit] = seen.fits
    assert fit.model == fingerprint(load_model(base)) != pi_0 and fit.examples == golds_of(base)
    assert [model for model, _, _ in seen.rollouts] == [b.before for b in seen.batches]
    assert [b.before for b in seen.batches] + [pi] == [pi_0] + [b.after for b in seen.batches]
    assert len({b.before for b in seen.batches}) == 5 and {b.reference for b in seen.batches} == {pi_0}

    for step, ((_, ids, how), batch) in enumerate(zip(seen.rollouts, seen.batches)):
        assert ids == batch_at(step, ids_of("train", 10), 5, seed=3) == [gold.id for gold in batch.golds]
        assert batch.ids == [id for id in ids for _ in range(2)] and batch.step == step
        assert how == {"num_samples": 2, "temperature": 1.0, "seed": derive_seed(3, step, "rollout"),
                       "reward": True}
    assert seen.dev == [(seen.batches[step].after, ids_of("dev", 5), {}) for step in (1, 3)]


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("name, split, temperature, num_samples", [
    ("eval_dev", "dev", 0.0, 1), ("eval_samples", "test", 0.0, 1), ("eval_sampled", "test", 1.0, 2)])
def test_which_model_is_evaluated_on_what(t, name, split, temperature, num_samples, run):
    """pi_0 and pi, greedy; as the first line of each file says, and its questions."""
    path = run / f"iter{t}" / f"{name}.jsonl"
    wanted = dict(weights=model_hash(run / f"iter{t}" / "model"), split=split, temperature=temperature,
                  num_samples=num_samples, seed=3, max_new_tokens=24, prompt="plain")
    assert {key: settings(path)[key] for key in wanted} == wanted
    assert [row["id"] for row in read_lines(path)] == ids_of(split, 5)


def test_interrupted_and_resumed_equals_uninterrupted(run, base, tmp_path, monkeypatch):
    """Stopped in the middle of batch 3, with the state of two batches: batch 2 must come again, with the same value
    head, moments of Adam and samples. Equal to the byte."""
    arguments = [*SMALL, "--num_samples", "2", "--model", base, "--run_dir", tmp_path / "run"]

    def stop_at_3(*args):
        if args[-1] == 3:
            raise KeyboardInterrupt
        return roll_out(*args)

    watch(monkeypatch)
    monkeypatch.setattr(reft, "roll_out", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        call(reft, *arguments)
    assert [path.name for path in (tmp_path / "run" / "iter1" / "state").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(reft, "roll_out", roll_out)
    call(reft, *arguments)
    for name in ("results.json", "iter0/model/model.safetensors", "iter0/train.jsonl", "iter1/model/model.safetensors",
                 "iter1/train.jsonl", "iter1/eval_samples.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.parametrize("flags", [
    ["--advantage", "group", "--num_samples", "2"], ["--advantage", "rloo", "--num_samples", "2"],
    ["--critic", "separate", "--value_init", "random", "--mini_batch_size", "0"],
    ["--kl_coef", "0", "--partial_reward", "0", "--gae_lambda", "1"], ["--warmup_epochs", "0", "--offload_reference"]],
    ids=" ".join)
def test_every_variant_is_a_flag(flags, base, tmp_path, monkeypatch, capsys):
    """Each runs to its record. What is unhealthy is in the record of every batch, and said once."""
    monkeypatch.setitem(reft.UNHEALTHY, "late", (lambda record: record["step"] > 0, "accuracy {accuracy}, unheard of"))
    seen = watch(monkeypatch)
    call(reft, *SHORT, "--max_steps", "3", "--eval_every", "0", *flags, "--model", base, "--run_dir", tmp_path / "run")
    rows, steps = read_json(tmp_path / "run" / "results.json"), read_lines(tmp_path / "run" / "iter1" / "train.jsonl")
    cold = "--warmup_epochs" in flags
    assert [row["name"] for row in rows] == ["base" if cold else "warm-up"] * 2 + ["ReFT"] * 3 and rows[2]["steps"] == 3
    assert ("value_loss" in steps[0]) == ("explained_variance" in steps[0]) == ("--advantage" not in flags)
    assert ["late" in step["warnings"] for step in steps] == [False, True, True]
    assert steps[1]["warnings"]["late"] == f"accuracy {steps[1]['accuracy']}, unheard of"
    assert capsys.readouterr().out.count("unheard of") == 1

    if "separate" in flags:  # its passes and its training count
        sampled, scored = rows[2]["tokens_sampled"], rows[2]["tokens_trained"] // 2
        warm_up = sum(step["tokens"] for step in read_lines(tmp_path / "run" / "iter0" / "train.jsonl"))
        forward, trained = scored + 3 * scored, 2 * 2 * scored + warm_up  # sampled with its prompt; then three models
        assert 0 < sampled < scored
        assert rows[2]["flops"] == num_parameters(tmp_path / "run/iter1/model") * (2 * forward + 6 * trained)

    pi_0 = base if cold else tmp_path / "run" / "iter0" / "model"
    assert (tmp_path / "run" / "iter0" / "model").exists() != cold and len(seen.fits) == (not cold)
    assert seen.batches[0].before == seen.batches[0].reference == fingerprint(load_model(pi_0)) and not seen.dev
    assert settings(tmp_path / "run" / "iter0" / "eval_dev.jsonl")["weights"] == model_hash(pi_0)


@pytest.mark.parametrize("with_gold, flags", [({0}, ()), ({1}, ()), ({0, 1}, ()), ({}, ("--no-online_gold",))], ids=str)
def test_a_run_of_online_self_training(with_gold, flags, base, tmp_path, monkeypatch):
    """Where no sample is right and no question of a batch has a gold solution, there is nothing to train on: the run
    goes on to its record all the same."""
    batches = [batch_at(step, ids_of("train", 10), 5, seed=3) for step in (0, 1)]
    usable = {id for step in with_gold for id in batches[step]}
    if not flags:
        monkeypatch.setattr(reft, "fitting", lambda golds, length: [gold for gold in golds if gold.id in usable])
    monkeypatch.setattr(reft, "roll_out", lambda *args: [replace(r, right=False) for r in roll_out(*args)])
    seen = watch(monkeypatch)
    call(reft, *SHORT, "--mini_batch_size", "0", "--method", "online_st", "--max_steps", "2", "--model", base,
         "--run_dir", tmp_path / "run", *flags)
    rows, steps = read_json(tmp_path / "run" / "results.json"), read_lines(tmp_path / "run" / "iter1" / "train.jsonl")
    assert [row["name"] for row in rows] == ["warm-up"] * 2 + ["Online-ST"] * 3 and rows[2]["steps"] == 2
    assert ("nll" in rows[2]) == (1 in with_gold) and 0.0 <= rows[2]["entropy"] <= math.log(288)
    golds = {gold.id: gold for gold in golds_of(base)}
    prompts = sum(len(golds[id].prompt) for batch in batches for id in batch)
    assert rows[2]["tokens_forward"] == rows[2]["tokens_sampled"] + prompts, "nothing is scored"
    for i, (batch, step) in enumerate(zip(seen.batches, steps, strict=True)):
        assert batch.golds == [golds[id] for id in batches[i] if id in usable] and batch.ids == batches[i]
        assert ("nll" in step) == (batch.before != batch.after) == (step["tokens"] > 0) == (i in with_gold)
    assert seen.batches[0].before == seen.batches[0].reference == fingerprint(load_model(tmp_path / "run/iter0/model"))


@pytest.mark.parametrize("method, name", [("sft", "SFT"), ("offline_st", "Offline-ST")])
def test_baselines_fine_tune_the_base(method, name, base, tmp_path, monkeypatch):
    """And not pi_0, from which Offline-ST samples, at temperature 1; on gold, and on gold and the paths that were kept,
    for sft_epochs passes. Every stage and every --seed has an order of its own."""
    def all_right(*args, **options):
        answered = evaluate.answer_once(*args, **options)
        return [replace(q, samples=[replace(s, verdict="correct", finished=True) for s in q.samples]) for q in answered]

    monkeypatch.setattr(reft, "answer_once", all_right)  # of a tiny model, none might be
    seen, golds, seeds = watch(monkeypatch), golds_of(base), []
    for seed in (0, 1):
        run = tmp_path / str(seed)
        call(reft, *SHORT, "--method", method, "--offline_samples", "3", "--offline_paths", "2", "--sft_epochs", "2",
             "--sft_batch_size", "4", "--seed", seed, "--model", base, "--run_dir", run)
        (warm_up, fit), pi_0 = seen.fits[-2:], run / "iter0" / "model"
        seeds += [warm_up.seed, fit.seed]
        assert fit.model == warm_up.model == fingerprint(load_model(base)) != fingerprint(load_model(pi_0))
        assert warm_up.examples == golds == fit.examples[:10]

        paths, found = fit.examples[10:], {}
        if method == "offline_st":
            said, answered = read_records(run / "iter1" / "samples.jsonl", Answered)
            wanted = dict(weights=model_hash(pi_0), temperature=1.0, num_samples=3, split="train")
            assert {key: said[key] for key in wanted} == wanted
            seeds.append(said["seed"])
            assert {q.id: 1 <= sum(path.id == q.id for path in paths) <= 2 for q in answered} == {
                gold.id: True for gold in golds}
            sampled = [(q.id, s.ids) for q in answered for s in q.samples]
            assert all((path.id, path.response) in sampled for path in paths)
            found = {"questions": 10, "gold": 10, "paths": len(paths),
                     "tokens_sampled": sum(len(ids) for _, ids in sampled)}

        rows, steps = read_json(run / "results.json"), read_lines(run / "iter1" / "train.jsonl")
        assert [row["name"] for row in rows] == ["warm-up"] * 2 + [name] * 3 and rows[2] | found == rows[2]
        forward, trained = 0, sum(step["tokens"] for step in steps)  # SFT of the base needs no pi_0 and no samples
        if method == "offline_st":
            forward = found["tokens_sampled"] + sum(len(gold.prompt) for gold in golds)
            trained += sum(step["tokens"] for step in read_lines(run / "iter0" / "train.jsonl"))
        assert rows[2]["flops"] == num_parameters(base) * (2 * forward + 6 * trained)
        assert len(steps) == 2 * math.ceil(len(golds + paths) / 4) and max(step["lr"] for step in steps) == 2e-3
        assert settings(run / "iter1" / "eval_samples.jsonl")["weights"] == model_hash(run / "iter1" / "model")
        assert bool(paths) == (method == "offline_st")
    assert len(set(seeds)) == len(seeds) and not seen.batches


def test_without_gold_solutions(base, tmp_path, monkeypatch, capsys):
    """There is no warm-up, and only ReFT: refused with the flags that help, which are enough."""
    problems = Config.problems
    monkeypatch.setattr(Config, "problems", lambda *args: [replace(p, solution="") for p in problems(*args)])
    flags = [*SHORT, "--max_steps", "1", "--model", base, "--run_dir", tmp_path / "run"]
    for more in ([], ["--warmup_epochs", "0", "--method", "online_st", "--mini_batch_size", "0"],
                 ["--warmup_epochs", "0", "--method", "sft"]):
        said = refusal(capsys, reft, *flags, *more)
        assert "--warmup_epochs 0" in said and "--method reft" in said
    assert not (tmp_path / "run").exists()
    call(reft, *flags, "--warmup_epochs", "0")
    assert read_json(tmp_path / "run" / "results.json")[2]["steps"] == 1
