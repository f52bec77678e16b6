"""One forward for training and decoding: every way to compute the logits gives the same logits."""
import pytest
import torch
from torch import Tensor

from losses import token_logps
from model import KVCache, Llama, pad, rope_frequencies
from tiny import LLAMA3, random_prompts, random_tokens, slow_angle, slow_logits, tiny_model

CLOSE = dict(rtol=0, atol=2e-4)  # logits here are about 1 to 5
SHAPES = {
    "mha": dict(num_key_value_heads=4), "gqa": dict(num_key_value_heads=2), "mqa": dict(num_key_value_heads=1),
    "llama3": dict(rope_scaling=LLAMA3), "tied": dict(tie_word_embeddings=True), "bias": dict(attention_bias=True),
    "wide heads": dict(head_dim=12), "q and k norms": dict(qk_norm=True), "epsilon": dict(rms_norm_eps=0.3),
}

close = torch.testing.assert_close


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_forward_is_the_published_equations(shape):
    """A wrong norm, rotation, head grouping, scale or residual is off from Llama written in loops."""
    model, tokens = tiny_model(**SHAPES[shape]), random_tokens(1, 12)
    close(model(tokens[None])[0].double(), slow_logits(model, tokens.tolist()), **CLOSE)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (shape == "tied")


def test_llama3_scaling_slows_long_waves_only():
    """Short waves stay, waves longer than the old context are slowed by the factor, and between them is a smooth mix;
    swapping low and high, or dividing turns by 2 pi twice, fails."""
    model = tiny_model(head_dim=32, rope_scaling=LLAMA3)
    got = rope_frequencies(model.config, "cpu").tolist()
    assert got == pytest.approx([slow_angle(model.config, i, 1) for i in range(16)], rel=1e-5)
    ratios = [frequency / 100.0 ** (-i / 16) for i, frequency in enumerate(got)]
    assert ratios[0] == pytest.approx(1) and ratios[-1] == pytest.approx(1 / 8)
    assert sum(1 / 7.9 < ratio < 0.99 for ratio in ratios) >= 2  # the smooth middle was tested


@torch.no_grad()
def test_logits_are_float32_even_from_bfloat16_weights():
    """Log-probabilities of 200 tokens summed from bfloat16 logits are off by about a nat."""
    assert tiny_model().bfloat16()(random_tokens(1, 1, 6)).dtype == torch.float32


def test_padding_is_on_the_right_to_a_multiple():
    tokens, lengths = pad([[3, 4, 5], [6]], "cpu", multiple=2)
    assert tokens.tolist() == [[3, 4, 5, 0], [6, 0, 0, 0]] and lengths.tolist() == [3, 1]
    assert pad([[3, 4, 5], [6]], "cpu")[0].shape == (2, 3)
    assert pad([[3, 4]], "cpu", multiple=2)[0].shape == (1, 2)


# --- the cache -------------------------------------------------------------------------------------

def new_cache(model: Llama, rows: int, columns: int) -> KVCache:
    return KVCache(model.config, rows, columns, "cpu", torch.float32)


def prefilled(model: Llama, prompts: list[list[int]]) -> tuple[KVCache, Tensor]:
    """A cache of prompts of all lengths, padded with junk, and the lengths."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.tensor([prompt + [7] * (int(lengths.max()) - len(prompt)) for prompt in prompts])
    cache = new_cache(model, *tokens.shape)
    model(tokens, cache)
    return cache, lengths


class Rows:
    """Rows of a cache that continue shared prompts, and the sequence that each stands for."""

    def __init__(self, model: Llama, prompts: list[list[int]], num_samples: int, columns: int, slots: int = 0) -> None:
        self.model, R = model, len(prompts) * num_samples
        shared = new_cache(model, slots or len(prompts), 0)
        self.cache = KVCache(model.config, R, columns, "cpu", torch.float32, shared, num_samples)
        self.cache.begin(*prefilled(model, prompts), torch.arange(len(prompts)), torch.arange(R))
        self.sequences = {row: prompts[row // num_samples] for row in range(R)}

    def step(self, seed: int, num_tokens: int = 1) -> None:
        """Feed random tokens. Logits of every sequence are those of a full forward, and unused rows stay finite."""
        tokens = random_tokens(seed, len(self.cache.lengths), num_tokens)
        logits = self.model(tokens, self.cache)
        assert logits.isfinite().all()
        for row, ids in self.sequences.items():
            self.sequences[row] = ids + tokens[row].tolist()
            close(logits[row], self.model(torch.tensor([self.sequences[row]]))[0, len(ids):], **CLOSE)


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 1, 3, 3], [1, 11], [6, 6]], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_cached_forward_equals_full_forward(chunks, kv_heads):
    """A causal mask aligned to the top left is right for one token or a first chunk, and wrong for several tokens after
    a cached prefix."""
    model, tokens = tiny_model(num_key_value_heads=kv_heads), random_tokens(2, 3, 12)
    cache = new_cache(model, 3, 12)
    logits = torch.cat([model(chunk, cache) for chunk in tokens.split(chunks, dim=1)], 1)
    close(logits, model(tokens), **CLOSE)


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa", "llama3", "bias"])
@pytest.mark.parametrize("chunks", [[1] * 6, [3, 1, 2], [2, 4]], ids=str)
@torch.no_grad()
def test_rows_that_share_a_prompt_equal_full_forward(shape, chunks):
    """They must see all of their own prompt, none of its padding or of another sample, and start at its true length."""
    rows = Rows(tiny_model(**SHAPES[shape]), random_prompts(10, [3, 9, 1, 6]), 3, sum(chunks))
    for seed, num_tokens in enumerate(chunks):
        rows.step(seed, num_tokens)


@torch.no_grad()
def test_rows_that_leave_do_not_change_those_that_stay():
    """After `keep`, rows must still find their own prompt and keys: an old row number finds others'."""
    rows = Rows(tiny_model(num_key_value_heads=1), random_prompts(20, [5, 2, 8]), 4, 7)
    for seed, leave in enumerate([[], [0, 5], [], [0, 1, 2], [6], [], []]):  # question 0 is gone after the fourth step
        rows.step(seed)
        stay = [row for row in rows.sequences if row not in leave]
        rows.cache.keep(torch.tensor(stay))
        rows.sequences = {new: rows.sequences[old] for new, old in enumerate(stay)}
    assert len(rows.sequences) == len(rows.cache.lengths) == 6 and len(rows.cache.prompts.lengths) == 2


@torch.no_grad()
def test_rows_that_begin_anew_equal_full_forward():
    """A row that has finished is given to another prompt, longer or shorter than what was there before, while others
    are halfway: old keys, an old length, or another row's place in the grid, and the logits differ. The tokens of rows
    and prompts that nobody uses are drawn, too."""
    model, N = tiny_model(), 2
    second = random_prompts(90, [4, 14])
    rows = Rows(model, random_prompts(80, [9, 3, 5]), N, 12, slots=5)
    for seed in range(5):
        rows.step(seed)
    # prompts 0 and 2 end; of the new ones one takes the place of prompt 2, the other a new place; slot 3 is empty
    rows.cache.begin(*prefilled(model, second), torch.tensor([4, 2]), torch.tensor([0, 5, 1, 4]))
    rows.sequences |= {0: second[0], 5: second[0], 1: second[1], 4: second[1]}
    for seed in range(5, 9):
        rows.step(seed)
    del rows.sequences[0], rows.sequences[5]
    rows.cache.lengths[[0, 5]] = 0
    rows.cache.place[[0, 5]] = 3 * N
    rows.step(9)
    rows.cache.look_at(16)
    for seed in range(10, 12):
        rows.step(seed)
    rows.cache.keep(torch.tensor([1, 2, 4]))  # those of prompt 2 are not neighbours
    rows.sequences = {new: rows.sequences[old] for new, old in enumerate([1, 2, 4])}
    rows.step(12)


@torch.no_grad()
@pytest.mark.parametrize("limits", [dict(max_position_embeddings=12), dict(sliding_window=12)], ids=str)
def test_a_sequence_beyond_the_limit_is_refused(limits):
    """Attention here has no window: a longer input than Mistral's would see what it must not, and the model talk
    nonsense after a while. Prompt, cached tokens and new ones count together."""
    model = tiny_model(**limits)
    assert model.config.max_length == 12 and model(random_tokens(1, 1, 12)).shape == (1, 12, 24)
    cache, rows = new_cache(model, 1, 13), Rows(model, random_prompts(5, [2, 9]), 2, 4)
    for chunk in (9, 3):
        model(random_tokens(2, 1, chunk), cache)
    rows.step(3, 3)
    for tokens, full in ((random_tokens(1, 1, 13), None), (random_tokens(4, 1, 1), cache),
                         (random_tokens(7, 4, 1), rows.cache)):
        with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
            model(tokens, full)


@torch.no_grad()
def test_a_row_never_writes_beyond_its_columns():
    """What follows them in memory are the columns of another row."""
    rows = Rows(tiny_model(), random_prompts(1, [3, 5]), 2, 4)
    rows.step(1, 4)
    with pytest.raises(ValueError, match="has 4 columns.* token 5"):
        rows.step(2)


# --- log-probabilities without logits ----------------------------------------------------------------

SPANS = [(0, 3), (2, 9), (4, 5), (0, 11), (5, 5)]  # columns that are scored in each of five rows


def ragged_mask() -> Tensor:
    columns = torch.arange(11)
    return torch.stack([(columns >= a) & (columns < b) for a, b in SPANS])


def value_and_gradients(model: Llama, logps: Tensor) -> tuple[Tensor, dict]:
    """Of a sum in which every column has a weight of its own, so that none can stand in for another."""
    model.zero_grad()
    (logps * random_tokens(8, *logps.shape)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_logps_are_those_of_the_naive_way(monkeypatch, tied, rows_at_once, autocast):
    """Value and gradient of full logits, gathered; 0 where the mask is off, in one chunk or many. Under autocast, what
    the backward pass repeats must be in bfloat16, as it was the first time."""
    monkeypatch.setattr(Llama, "rows_at_once", rows_at_once)
    model, tokens, mask = tiny_model(sharpness=0.7, tie_word_embeddings=tied), random_tokens(7, 5, 12), ragged_mask()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        naive, ours = token_logps(model(tokens), tokens) * mask, model.logps(tokens, mask)
    expected, slopes = value_and_gradients(model, naive)
    got, gradients = value_and_gradients(model, ours)
    assert got.dtype == torch.float32 and not got[~mask].any()
    close(got, expected, rtol=0, atol=1e-5)
    for name, slope in slopes.items():
        close(gradients[name], slope, rtol=0, atol=(0.01 if autocast else 1e-6) * float(slope.abs().max()))


@pytest.mark.parametrize("rows_at_once", [4, 100])
def test_scores_and_entropies_are_those_of_the_equations(monkeypatch, rows_at_once):
    """One pass of the network serves both; an entropy is a diagnostic, and no gradient flows back from it."""
    monkeypatch.setattr(Llama, "rows_at_once", rows_at_once)
    model, tokens, mask = tiny_model(sharpness=0.7), random_tokens(7, 5, 12), ragged_mask()
    hidden = model.model(tokens)
    scores, entropies = model.score(hidden, tokens, mask), model.entropy(hidden, mask)
    assert scores.requires_grad and not entropies.requires_grad
    for row in range(5):
        logps = slow_logits(model, tokens[row].tolist())[:-1].log_softmax(-1)
        for got, slow in ((scores, logps.gather(-1, tokens[row, 1:, None])[:, 0]),
                          (entropies, -(logps.exp() * logps).sum(-1))):
            close(got[row].double(), torch.where(mask[row], slow, 0.0), **CLOSE)


def test_the_head_sees_only_places_that_are_scored(monkeypatch):
    """(B, T, V) is what runs out of memory: no more than rows_at_once rows, and none for a prompt."""
    monkeypatch.setattr(Llama, "rows_at_once", 4)
    monkeypatch.setattr("losses.ROWS", 1)
    model, mask, seen = tiny_model(), ragged_mask(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(logits.shape))
    logps = model.logps(random_tokens(7, 5, 12), mask)
    assert sum(rows for rows, _ in seen) == mask.sum()
    logps.sum().backward()
    assert all(rows <= 4 for rows, _ in seen)
    assert not model.logps(random_tokens(7, 5, 12), torch.zeros_like(mask)).any()
