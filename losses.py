"""Every formula once, as pure functions on tensors.

B sequences, T tokens, V vocabulary. A loss returns one value per sequence and never averages over the batch: the
training loop divides by the number of sequences in the global batch, so that the size of a micro-batch cannot change a
gradient. Masks are bool or 0/1, True on response tokens. Nothing here writes to its arguments.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 128  # in_chunks pads to a multiple of this many tokens


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V), (N,) -> (N,): log-probability of each target, in float32.

    In bfloat16, rounding would bias the sum over a response's 200 tokens. Logits that were computed in bfloat16 stay
    noisy; --precision fp32 avoids that, too.
    """
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B, T-1): log-probability of tokens[:, 1:], each predicted one position before.

    Column t of the result belongs to token t + 1. Llama.logps computes the same without building all logits at once.
    """
    logps = target_logps(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return logps.view(tokens[:, 1:].shape)


def entropies(logits: Tensor) -> Tensor:
    """(N, V) -> (N,): entropy of each distribution in nats, in float32."""
    logps = logits.float().log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def in_chunks(f: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """Apply a row-wise function f to the N rows of its arguments, in chunks of at most `size`.

    Intermediate results (the logits) exist for one chunk at a time, also in the backward pass, which recomputes them; a
    single chunk is not recomputed. Rows are padded to a multiple of ROWS, because a CPU compiles and caches a kernel
    for every new shape.
    """
    N = len(rows[0])
    rows = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, -N % ROWS)) for x in rows]
    if len(rows[0]) <= size:
        return f(*rows)[:N]
    chunks = zip(*(x.split(size) for x in rows))
    return torch.cat([checkpoint(f, *chunk, use_reentrant=False, preserve_rng_state=False)
                      for chunk in chunks])[:N]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B,): mean over the tokens under the mask of each sequence."""
    return (x * mask).sum(-1) / mask.sum(-1)


def nll_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B,): mean negative log-likelihood of a sequence's response tokens."""
    return -masked_mean(logps, mask)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float) -> Tensor:
    """(B,) summed log-probabilities of responses -> (B,): -log sigmoid(beta * margin).

    DPO (arXiv 2305.18290) eq. 7, the first term of IRPO's eq. 1; ln 2 where policy = reference.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def dpo_nll_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
                 chosen_length: Tensor | float, beta: float, alpha: float) -> Tensor:
    """IRPO (arXiv 2404.19733 v3) eq. 1, per pair (B,): DPO + alpha * length-normalised NLL of chosen.

    Log-probabilities are sums over a response's tokens; chosen_length is their number, or the mean over responses.
    """
    nll = -chosen / chosen_length
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta) + alpha * nll


def kl_shaped_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor,
                      kl_coef: float) -> Tensor:
    """(B,) scores, (B, T) log-probs of policy and reference -> (B, T) rewards, 0 where mask is off.

    ReFT (arXiv 2401.08967) section 3, r_total = r - beta KL. The score goes to the last response token, which is the
    EOS action where there is one. A token's KL is estimated by the log-ratio of the token that was sampled, as the
    authors' code does: right on average, negative at times.
    """
    mask = mask.bool()
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    kl = torch.where(mask, logps - ref_logps, 0.0)
    return scores[:, None] * last - kl_coef * kl


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """(B, T) x 3 -> advantages and returns (B, T), 0 where mask is off.

    Generalized advantage estimation (arXiv 1506.02438) eq. 16: the sum of (gamma lam)^l delta_{t+l} with delta_t = r_t
    + gamma V(s_{t+1}) - V(s_t); returns are advantages + values. V is 0 after the last response token, also for a
    response that was truncated before EOS: nothing is bootstrapped.
    """
    rewards, values = rewards * mask, values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    running, sums = torch.zeros_like(values[:, 0]), []
    for delta in deltas.flip(-1).unbind(-1):  # from the last token to the first
        running = delta + gamma * lam * running
        sums.append(running)
    advantages = torch.stack(sums[::-1], -1) * mask
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """(B, T), (B, T) -> (B, T) with mean 0 and variance 1 over the mask, 0 where it is off.

    Over all tokens of the batch at once, so that a good response stays better than a bad one. Where this is only part
    of the batch, the global mean and (uncorrected) variance may be given.
    """
    if mean is None:
        mean = (x * mask).sum() / mask.sum()
    if var is None:
        var = ((x - mean).square() * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def group_normalized(scores: Tensor) -> Tensor:
    """(Q, N) scores of N responses to Q questions -> (Q, N): (r - mean) / std over a question's own.

    GRPO (arXiv 2402.03300) section 4.1.2, with uncorrected std; 0 where all N scores are equal.
    """
    centered = scores - scores.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + 1e-8)


def leave_one_out(scores: Tensor) -> Tensor:
    """(Q, N) -> (Q, N): score minus the mean of the question's other N - 1 (RLOO, arXiv 2402.14740)."""
    N = scores.shape[-1]
    return (scores - scores.mean(-1, keepdim=True)) * N / (N - 1)


def ppo_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
                    clip_range: float) -> Tensor:
    """(B, T) x 4 -> (B,): PPO (arXiv 1707.06347) eq. 7, negated, as a mean over response tokens."""
    ratio = ((logps - old_logps) * mask).exp()  # 1 where mask is off: nothing there can overflow
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
                   clip_range: float) -> Tensor:
    """(B, T) x 4 -> (B,): half the squared error of V, where V may not move far from its old value.

    ReFT section 3, with the band around V - R as [-A - eps, -A + eps] (the first version of the paper lost a sign): V
    is clipped to old V +- clip_range, and the larger of the two errors counts.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(errors, mask)
