"""Every formula once, as pure functions on tensors.

B sequences, T tokens, V vocabulary. A loss returns one value per sequence and never averages over
the batch: the training loop divides by the number of sequences in the whole batch, so that the size
of a micro-batch cannot change a gradient. Masks are bool or 0/1, True on response tokens. Nothing
here writes to its arguments.
"""
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B, T-1): log-probability of tokens[:, 1:], each scored one place before.

    The only shift in the code base: column t of the result belongs to token t + 1. Computed in
    float32, since bfloat16 sums over 200 tokens are off by about 1 nat.
    """
    logps = logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)


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
                 chosen_length: Tensor, beta: float, alpha: float) -> Tensor:
    """IRPO (arXiv 2404.19733 v3) eq. 1, per pair (B,): DPO + alpha * length-normalised NLL of chosen.

    Log-probabilities are sums over a response's tokens; chosen_length is its number of tokens.
    """
    nll = -chosen / chosen_length
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta) + alpha * nll
