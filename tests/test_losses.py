"""Each formula against a slow loop written from the paper, on ragged masks, and its identities."""
import math
import random

import pytest
import torch
from torch import Tensor

from losses import dpo_loss, dpo_nll_loss, masked_mean, nll_loss, token_logps

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


def slow_dpo(won: float, lost: float, ref_won: float, ref_lost: float, beta: float) -> float:
    """-log sigma(beta log(M(w)/M_t(w)) - beta log(M(l)/M_t(l))), as written."""
    return -math.log(1 / (1 + math.exp(-(beta * (won - ref_won) - beta * (lost - ref_lost)))))


# --- token_logps ---------------------------------------------------------------------------------

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
    """A log-softmax in bfloat16 rounds each token by up to 0.02 nats; over a response that adds
    up."""
    generator = torch.Generator().manual_seed(1)
    logits = (10 * torch.randn(2, 50, 40, generator=generator)).bfloat16()
    tokens = torch.randint(0, 40, (2, 50), generator=generator)
    got = token_logps(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_logps(logits.float(), tokens), rtol=0, atol=1e-6)


def test_token_logps_gradient_is_one_hot_minus_softmax():
    """The gradient of a token's log-probability, and none from the last place, which scores
    nothing."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 4, 5, generator=generator).requires_grad_()
    tokens = torch.tensor([[1, 4, 0, 2]])
    token_logps(logits, tokens).sum().backward()
    expected = -logits.detach().softmax(-1)
    for t in range(3):
        expected[0, t, tokens[0, t + 1]] += 1
    expected[0, 3] = 0
    torch.testing.assert_close(logits.grad, expected)


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


def test_padding_changes_nothing():
    """Neither other values where the mask is off nor a wider batch may reach a sequence's loss."""
    logps, mask = ragged(4)
    junk = torch.where(mask, logps, torch.full_like(logps, -1e6))
    torch.testing.assert_close(nll_loss(junk, mask), nll_loss(logps, mask))
    wider = torch.cat([logps, torch.full((5, 4), -50.0)], 1)
    wider_mask = torch.cat([mask, torch.zeros(5, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(nll_loss(wider, wider_mask), nll_loss(logps, mask))
    alone = [nll_loss(logps[i:i + 1], mask[i:i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), nll_loss(logps, mask))


# --- DPO -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_dpo_is_equation_7(beta):
    """A sign, a reference on the wrong side, or a beta on one of the two ratios only."""
    sums = four_sums(5)
    got = dpo_loss(*sums, beta)
    for values, loss in zip(zip(*(s.tolist() for s in sums)), got.tolist()):
        assert loss == pytest.approx(slow_dpo(*values, beta))


def test_dpo_starts_at_ln_2_with_gradient_half_beta():
    """Where policy = reference: loss ln 2, gradient -beta/2 on the margin, whatever the lengths."""
    chosen, rejected, _, _ = (s.requires_grad_() for s in four_sums(6))
    for beta in (0.1, 0.5):
        chosen.grad = rejected.grad = None
        loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta)
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
        loss.sum().backward()
        torch.testing.assert_close(chosen.grad, torch.full_like(loss, -beta / 2))
        torch.testing.assert_close(rejected.grad, torch.full_like(loss, beta / 2))


def test_dpo_stays_finite_at_large_margins():
    """log(sigmoid(x)) is -inf at x = -1000, where the loss is just 1000."""
    zeros, far = torch.zeros(2), torch.tensor([1e4, -1e4])
    loss = dpo_loss(far, zeros, zeros, zeros, 0.1)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1000.0]))


def test_dpo_cares_about_margins_only():
    """Policy and reference may both give a response any constant more: only the ratio counts."""
    chosen, rejected, ref_chosen, ref_rejected = four_sums(7)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.2)
    shifted = dpo_loss(chosen + 7, rejected - 3, ref_chosen + 7, ref_rejected - 3, 0.2)
    torch.testing.assert_close(shifted, loss)
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.2)
    margin = 0.2 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(swapped - loss, margin)


# --- DPO + NLL -----------------------------------------------------------------------------------

# Two pairs by hand, beta 0.1.
# Pair 1: margin (-10 + 11) - (-12 + 11) = 2, ln(1 + e^-0.2) = 0.598139, NLL 10 / 5 = 2.
# Pair 2: margin (-8 + 6) - (-4 + 7) = -5, ln(1 + e^0.5) = 0.974077, NLL 8 / 16 = 0.5.
@pytest.mark.parametrize("alpha, expected", [(1.0, [2.598139, 1.474077]),
                                             (0.5, [1.598139, 1.224077]),
                                             (0.0, [0.598139, 0.974077])])
def test_dpo_nll_two_pairs_by_hand(alpha, expected):
    """Alpha on the wrong term (as in the paper's first version), an NLL that is not divided by the
    chosen length, or one of the rejected response."""
    loss = dpo_nll_loss(torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -4.0]),
                        torch.tensor([-11.0, -6.0]), torch.tensor([-11.0, -7.0]),
                        torch.tensor([5, 16]), beta=0.1, alpha=alpha)
    assert loss.tolist() == pytest.approx(expected, abs=2e-6)


def test_dpo_nll_is_equation_1():
    """IRPO's eq. 1 term by term on random numbers."""
    rng = random.Random(0)
    for _ in range(20):
        won, lost, ref_won, ref_lost = sums = [-rng.uniform(1, 40) for _ in range(4)]
        length, beta, alpha = rng.randint(1, 50), rng.uniform(0.05, 1), rng.uniform(0, 2)
        got = dpo_nll_loss(*(torch.tensor([x]).double() for x in sums),
                           torch.tensor([length]), beta, alpha)
        expected = slow_dpo(won, lost, ref_won, ref_lost, beta) - alpha * won / length
        assert float(got) == pytest.approx(expected)


# --- all -----------------------------------------------------------------------------------------

def test_gradients_in_float64():
    """Analytic against numeric gradients: a detach or an in-place write in the middle fails
    here."""
    logps, mask = ragged(8)
    chosen, rejected, ref_chosen, ref_rejected = (s.requires_grad_() for s in four_sums(9))
    lengths = torch.arange(1, 7)
    check = torch.autograd.gradcheck
    assert check(lambda x: nll_loss(x, mask), logps.requires_grad_())
    assert check(lambda *sums: dpo_loss(*sums, 0.3), (chosen, rejected, ref_chosen, ref_rejected))
    assert check(lambda *sums: dpo_nll_loss(*sums, lengths, 0.3, 0.7),
                 (chosen, rejected, ref_chosen, ref_rejected))


def test_inputs_are_unchanged():
    """A write through a view of the labels once made a later count of response tokens twice as
    large."""
    logps, mask = ragged(10)
    sums, lengths = four_sums(11), torch.arange(1, 7)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    arguments = [logps, mask, *sums, lengths, logits, tokens]
    before = [x.clone() for x in arguments]
    token_logps(logits, tokens)
    nll_loss(logps, mask)
    dpo_loss(*sums, 0.1)
    dpo_nll_loss(*sums, lengths, 0.1, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))
