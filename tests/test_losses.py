"""Each formula against a slow loop written from the paper, on ragged masks, and its identities."""
import math

import pytest
import torch
from torch import Tensor

import losses
from losses import (dpo_loss, dpo_nll_loss, entropies, gae, group_normalized, in_chunks, kl_shaped_rewards,
                    leave_one_out, masked_mean, nll_loss, ppo_policy_loss, ppo_value_loss, token_logps, whiten)

SPANS = [(0, 3), (2, 9), (4, 5), (0, 9), (1, 8)]  # where each sequence's response lies


def ragged(seed: int) -> tuple[Tensor, Tensor]:
    """Float64 log-probabilities (5, 9), junk included where the mask is off, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    logps = -4 * torch.rand(5, 9, generator=generator, dtype=torch.float64)
    columns = torch.arange(9)
    return logps, torch.stack([(columns >= a) & (columns < b) for a, b in SPANS])


def four_sums(seed: int, n: int = 6) -> list[Tensor]:
    """Summed log-probabilities: chosen, rejected, and both under the reference."""
    generator = torch.Generator().manual_seed(seed)
    return [-30 * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]


def noise(seed: int, scale: float = 1.0) -> Tensor:
    """Float64 numbers (5, 9), junk included where the mask is off."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 9, generator=generator, dtype=torch.float64)


def ratio_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probs whose ratios lie on both sides of the clip, advantages, mask."""
    old_logps, mask = ragged(seed)
    return old_logps + noise(seed + 1, 0.3), old_logps, noise(seed + 2), mask


def slow_dpo(won: float, lost: float, ref_won: float, ref_lost: float, beta: float) -> float:
    """-log sigma(beta log(M(w)/M_t(w)) - beta log(M(l)/M_t(l))), as written."""
    return -math.log(1 / (1 + math.exp(-(beta * (won - ref_won) - beta * (lost - ref_lost)))))


# --- log-probabilities and entropies -----------------------------------------------------------------

def test_token_logps_scores_each_token_one_place_before():
    """Labels that are not shifted, or shifted twice, or a softmax over the wrong axis."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 6, 11, generator=generator)
    tokens = torch.randint(0, 11, (3, 6), generator=generator)
    got = token_logps(logits, tokens)
    assert got.shape == (3, 5)
    for b in range(3):
        for t in range(1, 6):  # token t is scored by the logits at t - 1
            row = logits[b, t - 1].tolist()
            expected = row[tokens[b, t]] - math.log(sum(math.exp(x) for x in row))
            assert float(got[b, t - 1]) == pytest.approx(expected, abs=1e-5)


def test_token_logps_are_float32_whatever_the_logits():
    """A log-softmax in bfloat16 rounds each token by up to 0.02 nats; over a response that adds up."""
    generator = torch.Generator().manual_seed(1)
    logits = (10 * torch.randn(2, 50, 40, generator=generator)).bfloat16()
    tokens = torch.randint(0, 40, (2, 50), generator=generator)
    got = token_logps(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_logps(logits.float(), tokens), rtol=0, atol=1e-6)


def test_entropies_of_known_distributions():
    """Uniform over 8 is ln 8, two of four equal is ln 2 whatever the dtype, and certainty is 0, not NaN."""
    logits = torch.zeros(3, 8)
    logits[1, 2:] = -1e4
    logits[2, 1:] = -math.inf
    for x in (logits[:2], logits[:2].bfloat16()):
        assert entropies(x).tolist() == pytest.approx([math.log(8), math.log(2)], abs=1e-6)
    assert entropies(logits[2:].clamp(min=-1e30)).tolist() == [0.0]


@pytest.mark.parametrize("size, multiple, total", [(1, 1, 7), (3, 1, 7), (7, 1, 7), (8, 1, 7), (3, 4, 8), (100, 4, 8),
                                                   (100, 128, 128)])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, size, multiple, total):
    """And f never sees more than `size` rows, forward or backward: in every other sense chunks are for nothing.
    Together they are a multiple of ROWS: 7 itself would be one more shape that kernels are made for."""
    monkeypatch.setattr(losses, "ROWS", multiple)
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3,)))
    y = torch.randint(0, 9, (7,), generator=generator)
    sizes = []

    def f(rows: Tensor, shift: Tensor) -> Tensor:
        sizes.append(len(rows))
        return (rows * weight).sum(-1).exp() * shift

    results = []
    for call in (lambda: f(x, y), lambda: in_chunks(f, size, x, y)):
        for leaf in (x, weight):
            leaf.requires_grad_(True).grad = None
        sizes.clear()
        out = call()
        out.square().sum().backward()
        results.append((out.detach(), x.grad, weight.grad))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    assert max(sizes) <= size and sum(sizes) == (total if size >= total else 2 * total)  # again only if cut


# --- NLL -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_nll_is_the_mean_over_each_response(seed):
    """A sum instead of a mean, a mean over the padded width, or one over the whole batch."""
    logps, mask = ragged(seed)
    got = nll_loss(logps, mask)
    assert got.shape == (5,)
    for row, (a, b), value in zip(logps.tolist(), SPANS, got.tolist()):
        assert value == pytest.approx(-sum(row[t] for t in range(a, b)) / (b - a))
    torch.testing.assert_close(masked_mean(logps, mask), -got)
    torch.testing.assert_close(nll_loss(logps, mask.double()), got)  # a 0/1 mask is as good


# --- DPO -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta, alpha", [(0.05, 1.0), (0.1, 0.3), (1.0, 2.0), (0.3, 0.0)])
def test_dpo_is_equation_7_and_with_nll_equation_1(beta, alpha):
    """Of the DPO and the IRPO paper, term by term: a sign, a reference on the wrong side, or a beta on one of the two
    ratios only."""
    sums, lengths = four_sums(5), torch.tensor([1, 5, 16, 40, 2, 7])
    plain, both = dpo_loss(*sums, beta), dpo_nll_loss(*sums, lengths, beta, alpha)
    for i, (won, *others) in enumerate(zip(*(x.tolist() for x in sums))):
        expected = slow_dpo(won, *others, beta)
        assert float(plain[i]) == pytest.approx(expected)
        assert float(both[i]) == pytest.approx(expected - alpha * won / int(lengths[i]))


def test_dpo_stays_finite_at_large_margins():
    """log(sigmoid(x)) is -inf at x = -1000, where the loss is just 1000."""
    zeros, far = torch.zeros(2), torch.tensor([1e4, -1e4])
    loss = dpo_loss(far, zeros, zeros, zeros, 0.1)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1000.0]))


# --- PPO: rewards and advantages -----------------------------------------------------------------

def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, as written, for one response."""
    L = len(rewards)
    V = [*values, 0.0]  # V(s_{L+1}) := 0
    delta = [-V[t] + rewards[t] + gamma * V[t + 1] for t in range(L)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(L - t)) for t in range(L)]


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0])
def test_rewards_are_the_score_at_the_end_and_the_kl_everywhere(kl_coef):
    """A score on the place after EOS, on the last column of the padded batch, or on every token; a KL with the wrong
    sign, or one that is charged for the prompt."""
    logps, mask = ragged(20)
    ref_logps, scores = ragged(21)[0], [1.0, 0.1, 0.0, 1.0, 0.1]
    got = kl_shaped_rewards(torch.tensor(scores), logps, ref_logps, mask, kl_coef).tolist()
    for row, (a, b) in enumerate(SPANS):
        for t in range(9):
            expected = -kl_coef * float(logps[row, t] - ref_logps[row, t]) if a <= t < b else 0.0
            expected += scores[row] if t == b - 1 else 0.0
            assert got[row][t] == pytest.approx(expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.7), (0.0, 0.5), (1.0, 0.0)])
def test_gae_is_equation_16(gamma, lam):
    """A sum that leaks from one response's padding, or from a value after EOS, into the next."""
    rewards, values, mask = noise(22), noise(23), ragged(0)[1]
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, (a, b) in enumerate(SPANS):
        slow = slow_gae(rewards[row, a:b].tolist(), values[row, a:b].tolist(), gamma, lam)
        expected = [0.0] * a + slow + [0.0] * (9 - b)
        assert advantages[row].tolist() == pytest.approx(expected)
        targets = [A + float(V) for A, V in zip(slow, values[row, a:b])]
        assert returns[row].tolist() == pytest.approx([0.0] * a + targets + [0.0] * (9 - b))


def test_whitening_is_over_all_tokens_of_the_batch():
    """Mean 0 and variance 1 over the tokens under the mask, not per response (which would make a bad response as good
    as a right one) and not with the padding. Equal numbers become 0: all responses right, no KL, nothing to learn."""
    x, mask = 3 * noise(26) + 2, ragged(0)[1]
    tokens = [float(x[row, t]) for row, (a, b) in enumerate(SPANS) for t in range(a, b)]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((v - mean) ** 2 for v in tokens) / len(tokens))
    got = whiten(x, mask)
    for row, (a, b) in enumerate(SPANS):
        for t in range(9):
            expected = (float(x[row, t]) - mean) / std if a <= t < b else 0.0
            assert float(got[row, t]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(whiten(torch.ones(5, 9), mask), torch.zeros(5, 9))


def test_whitening_with_given_statistics_is_that_of_the_whole_batch():
    """Each rank has a part of the batch, and all must use the same mean and variance."""
    x, mask = noise(27), ragged(0)[1]
    tokens = x[mask]
    mean, var = tokens.mean(), tokens.var(correction=0)
    parts = [whiten(x[rows], mask[rows], mean, var) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask))
    alone = torch.cat([whiten(x[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 5))])
    assert not torch.allclose(alone, whiten(x, mask), atol=0.01)


def test_group_baselines():
    """(r - mean) / std of a question's own samples, and r minus the mean of the others. 30 scores that are all 0.1
    have a rounding error for a standard deviation, which must not be divided by."""
    scores = torch.tensor([[1.0, 0.0, 0.1, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    normalized, others = group_normalized(scores), leave_one_out(scores)
    for row, values in enumerate(scores.tolist()):
        mean = sum(values) / 4
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
        for i, value in enumerate(values):
            expected = (value - mean) / std if row != 1 else 0.0
            assert float(normalized[row, i]) == pytest.approx(expected, abs=1e-3)
            rest = (sum(values) - value) / 3
            assert float(others[row, i]) == pytest.approx(value - rest, abs=1e-6)
    assert group_normalized(torch.full((1, 30), 0.1)).abs().max() < 1e-3


# --- PPO: losses ---------------------------------------------------------------------------------

@pytest.mark.parametrize("clip_range", [0.05, 0.2])
def test_policy_loss_is_equation_7(clip_range):
    """min taken for max, a clip that holds gains back only or losses only, a mean over the batch's tokens in place of
    each response's own."""
    logps, old_logps, advantages, mask = ratio_inputs(30)
    got = ppo_policy_loss(logps, old_logps, advantages, mask, clip_range)
    sides = set()
    for row, (a, b) in enumerate(SPANS):
        total = 0.0
        for t in range(a, b):
            ratio, A = math.exp(logps[row, t] - old_logps[row, t]), float(advantages[row, t])
            clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
            total += min(ratio * A, clipped * A)
            sides.add((A > 0, ratio > clipped, ratio < clipped))
        assert float(got[row]) == pytest.approx(-total / (b - a))
    assert len(sides) == 6  # the numbers reach every case: A of both signs, above, below, within


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 10.0])
def test_value_loss_is_the_larger_of_two_errors(clip_range):
    """The paper's band around V - R, with its sign right: [-A - eps, -A + eps] for A = R - old V."""
    values, old_values, returns, mask = noise(50), noise(51), noise(52), ragged(0)[1]
    got = ppo_value_loss(values, old_values, returns, mask, clip_range)
    for row, (a, b) in enumerate(SPANS):
        total = 0.0
        for t in range(a, b):
            V, old, R = (float(x[row, t]) for x in (values, old_values, returns))
            A = R - old
            clipped = min(max(V - R, -A - clip_range), -A + clip_range)
            total += 0.5 * max((V - R) ** 2, clipped ** 2)
        assert float(got[row]) == pytest.approx(total / (b - a))


def test_masked_places_have_no_say_and_get_no_gradient():
    """Prompt and padding: whatever stands there, losses and gradients of the response stay, and there is none for the
    rest. A ratio of e^800 is infinite, and 0 times that is no number."""
    logps, old_logps, advantages, mask = ratio_inputs(60)
    results = []
    for junk in (0.0, 800.0):
        x = [torch.where(mask, v, torch.full_like(v, junk)).requires_grad_()
             for v in (logps, advantages, noise(63), noise(64))]
        loss = (ppo_policy_loss(x[0], old_logps, x[1], mask, 0.2) + nll_loss(x[0], mask)
                + ppo_value_loss(x[2], noise(65), x[3], mask, 0.2))
        gradients = torch.autograd.grad(loss.sum(), x)
        assert all(torch.equal(g[~mask], torch.zeros_like(g[~mask])) for g in gradients)
        assert all((g[mask] != 0).any() for g in gradients)
        rewards = kl_shaped_rewards(torch.ones(5), x[0], old_logps, mask, 0.1)
        tokens = [rewards, *gae(x[1], x[2], mask, 1.0, 0.95), whiten(x[2], mask)]
        results.append([loss, *gradients, *tokens])
    for clean, other in zip(*results):
        torch.testing.assert_close(clean, other)


# --- all -----------------------------------------------------------------------------------------

def test_gradients_in_float64():
    """Analytic against numeric gradients: a detach or an in-place write in the middle fails here."""
    logps, mask = ragged(8)
    chosen, rejected, ref_chosen, ref_rejected = (s.requires_grad_() for s in four_sums(9))
    lengths = torch.arange(1, 7)
    check = torch.autograd.gradcheck
    assert check(lambda x: nll_loss(x, mask), logps.requires_grad_())
    assert check(lambda *sums: dpo_loss(*sums, 0.3), (chosen, rejected, ref_chosen, ref_rejected))
    assert check(lambda *sums: dpo_nll_loss(*sums, lengths, 0.3, 0.7),
                 (chosen, rejected, ref_chosen, ref_rejected))
    logps, old_logps, advantages, mask = ratio_inputs(80)
    logps = logps.requires_grad_()
    assert check(lambda x: ppo_policy_loss(x, old_logps, advantages, mask, 0.2), logps)
    assert check(lambda x: ppo_value_loss(x, old_logps, advantages, mask, 0.2), logps)


def test_inputs_are_unchanged():
    """A write through a view of the labels once made a later count of response tokens twice as large."""
    logps, mask = ragged(10)
    sums, lengths = four_sums(11), torch.arange(1, 7)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    rest, scores = [noise(seed) for seed in (90, 91, 92)], torch.rand(5, 3)
    arguments = [logps, mask, *sums, lengths, logits, tokens, *rest, scores]
    before = [x.clone() for x in arguments]
    token_logps(logits, tokens)
    nll_loss(logps, mask)
    dpo_loss(*sums, 0.1)
    dpo_nll_loss(*sums, lengths, 0.1, 1.0)
    kl_shaped_rewards(scores[:, 0], logps, rest[0], mask, 0.1)
    gae(logps, rest[0], mask, 1.0, 0.95)
    whiten(logps, mask)
    group_normalized(scores)
    leave_one_out(scores)
    ppo_policy_loss(logps, *rest[:2], mask, 0.2)
    ppo_value_loss(logps, *rest[:2], mask, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))
