"""One forward for training and decoding: every way to compute the logits gives the same logits."""
import math

import pytest
import torch

from losses import token_logps
from model import KVCache, Llama, rope_frequencies
from tiny import LLAMA3, random_prompts, random_tokens, slow_angle, slow_logits, tiny_model

CLOSE = dict(rtol=0, atol=2e-4)  # logits here are about 1 to 5


def new_cache(model, rows: int, capacity: int) -> KVCache:
    return KVCache(model.config, rows, capacity, "cpu", torch.float32)


def forked(model, prompts: list[list[int]], num_samples: int, capacity: int, slots: int = 0) -> KVCache:
    """A cache of num_samples rows behind each prompt; prompts of all lengths, padded with junk."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(prompts), int(lengths.max())), 7)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    prefilled = new_cache(model, *tokens.shape)
    model(tokens, prefilled)
    Q, R = len(prompts), len(prompts) * num_samples
    cache = KVCache(model.config, R, capacity, "cpu", torch.float32, new_cache(model, slots or Q, 0), num_samples)
    cache.begin(prefilled, lengths, torch.arange(Q), torch.arange(R))
    return cache


SHAPES = {
    "mha": dict(num_key_value_heads=4), "gqa": dict(num_key_value_heads=2),
    "mqa": dict(num_key_value_heads=1), "llama3": dict(rope_scaling=LLAMA3),
    "tied": dict(tie_word_embeddings=True), "bias": dict(attention_bias=True),
    "wide heads": dict(head_dim=12), "epsilon": dict(rms_norm_eps=0.3),
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_forward_is_the_published_equations(shape):
    """A wrong norm, rotation, head grouping, scale or residual is off from Llama written in
    loops."""
    model = tiny_model(**SHAPES[shape])
    tokens = random_tokens(1, 12)
    torch.testing.assert_close(model(tokens[None])[0].double(), slow_logits(model, tokens.tolist()),
                               **CLOSE)


def test_attention_bias_is_on_q_k_and_v():
    """As Qwen2 has it: one that is missed in the model would be missed by the equations above,
    too."""
    biases = {name.split(".")[-2] for name in tiny_model(attention_bias=True).state_dict()
              if name.endswith(".bias")}
    assert biases == {"q_proj", "k_proj", "v_proj"}
    assert not any(name.endswith(".bias") for name in tiny_model().state_dict())


@torch.no_grad()
def test_logits_are_float32_even_from_bfloat16_weights():
    """Log-probabilities of 200 tokens summed from bfloat16 logits are off by about a nat."""
    model = tiny_model().to(torch.bfloat16)
    assert model(random_tokens(1, 1, 6)).dtype == torch.float32


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 1, 3, 3], [1, 11], [6, 6]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_cached_forward_equals_full_forward(chunks, kv_heads):
    """A causal mask aligned to the top left is right for one token or a first chunk and wrong for
    several tokens behind a cached prefix: they saw only the start of it."""
    model = tiny_model(num_key_value_heads=kv_heads)
    tokens = random_tokens(2, 3, 12)
    cache, parts = new_cache(model, 3, 12), []
    for chunk in tokens.split(chunks, dim=1):
        parts.append(model(chunk, cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **CLOSE)


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa", "llama3", "bias"])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1, 1], [3, 1, 2], [2, 4]])
@torch.no_grad()
def test_forked_rows_equal_full_forward(shape, chunks):
    """Rows behind a shared prompt must see all of their own prompt, none of its padding, and start
    at its true length: one position off, or padding let in, and the logits differ."""
    model = tiny_model(**SHAPES[shape])
    prompts, num_samples = random_prompts(10, [3, 9, 1, 6]), 3
    own = random_tokens(3, len(prompts) * num_samples, sum(chunks))
    cache = forked(model, prompts, num_samples, sum(chunks))
    parts = [model(chunk, cache) for chunk in own.split(chunks, dim=1)]
    for row, logits in enumerate(torch.cat(parts, 1)):
        prompt = prompts[row // num_samples]
        full = model(torch.tensor([prompt + own[row].tolist()]))[0, len(prompt):]
        torch.testing.assert_close(logits, full, **CLOSE)


@torch.no_grad()
def test_rows_that_leave_do_not_change_those_that_stay():
    """After `keep`, rows must still find their own prompt and keys: an old row number finds
    others'."""
    model = tiny_model(num_key_value_heads=1)
    prompts, num_samples = random_prompts(20, [5, 2, 8]), 4
    own = random_tokens(4, 12, 7)
    cache, rows = forked(model, prompts, num_samples, 7), torch.arange(12)
    for step in range(7):
        logits = model(own[rows, step][:, None], cache)[:, -1]
        for row, got in zip(rows.tolist(), logits):
            prompt = prompts[row // num_samples]
            full = model(torch.tensor([prompt + own[row, :step + 1].tolist()]))[0, -1]
            torch.testing.assert_close(got, full, **CLOSE)
        leave = {1: [0, 5], 3: [1, 2, 3], 4: [11]}.get(step, [])  # question 0 is gone after step 3
        stay = torch.tensor([row not in leave for row in rows.tolist()])
        if not stay.all():
            cache.keep(stay.nonzero()[:, 0])
            rows = rows[stay]
    assert len(rows) == 6


@torch.no_grad()
def test_sibling_rows_do_not_share_their_own_tokens():
    """Samples of one prompt part ways: the same next token after other own tokens scores
    otherwise."""
    model = tiny_model()
    cache = forked(model, random_prompts(30, [4]), 2, 2)
    model(torch.tensor([[5], [9]]), cache)
    a, b = model(torch.tensor([[6], [6]]), cache)[:, -1]
    assert (a - b).abs().max() > 0.1


@torch.no_grad()
def test_a_row_never_writes_beyond_its_columns():
    """What follows them in memory are the columns of another row."""
    model = tiny_model()
    cache = forked(model, random_prompts(1, [3, 5]), 2, 4)
    model(random_tokens(1, 4, 4), cache)
    with pytest.raises(ValueError, match="has 4 columns.* token 5"):
        model(random_tokens(2, 4, 1), cache)


@torch.no_grad()
def test_rows_that_begin_anew_equal_full_forward():
    """A row that has ended is given to another prompt, longer or shorter than what was there before, while
    others are in the midst of theirs: old keys, an old length, or another row's place in the grid, and the
    logits differ. Rows and prompts that nobody uses must stay finite: their tokens are drawn, too."""
    model, N = tiny_model(), 2
    first, second = random_prompts(80, [9, 3, 5]), random_prompts(90, [4, 14])
    cache = forked(model, first, N, 12, slots=5)
    sequences = {row: list(first[row // N]) for row in range(6)}

    def step(seed: int) -> None:
        tokens = random_tokens(seed, 6)
        logits = model(tokens[:, None], cache)[:, -1]
        assert logits.isfinite().all()
        for row, ids in sequences.items():
            ids.append(int(tokens[row]))
            full = model(torch.tensor([ids]))[0, -1]
            torch.testing.assert_close(logits[row], full, **CLOSE)
    for seed in range(5):
        step(seed)
    # prompts 0 and 2 end; of the new ones one takes the place of prompt 2, the other a new place
    prefilled = new_cache(model, 2, 14)
    model(torch.tensor([second[0] + [7] * 10, second[1]]), prefilled)
    cache.begin(prefilled, torch.tensor([4, 14]), torch.tensor([4, 2]), torch.tensor([0, 5, 1, 4]))
    sequences |= {0: list(second[0]), 5: list(second[0]), 1: list(second[1]), 4: list(second[1])}
    # slot 3 is empty
    for seed in range(5, 9):
        step(seed)
    del sequences[0], sequences[5]
    cache.lengths[[0, 5]] = 0
    cache.place[[0, 5]] = 3 * N
    step(9)
    cache.look_at(16)
    for seed in range(10, 12):
        step(seed)


@torch.no_grad()
def test_right_padding_changes_nothing():
    """Without a look into the future, tokens after a sequence's end cannot change its logits."""
    model = tiny_model()
    tokens = random_tokens(5, 1, 7)
    for junk in (0, 2, 23):
        padded = torch.cat([tokens, torch.full((1, 5), junk)], 1)
        torch.testing.assert_close(model(padded)[:, :7], model(tokens), **CLOSE)


@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_something_after():
    """A mask that hides too little leaks the answer; one that hides too much forgets the past."""
    model = tiny_model()
    tokens = random_tokens(6, 1, 10)
    for t in range(1, 9):
        changed = tokens.clone()
        changed[0, t] = 3 + (tokens[0, t] - 2) % 21
        gap = (model(changed) - model(tokens)).abs().amax(-1)[0]
        assert gap[:t].max() < 2e-4
        assert (gap[t:] > 1e-3).all()


# --- log-probabilities without logits ------------------------------------------------------------

SPANS = [(0, 3), (2, 9), (4, 5), (0, 11), (5, 5)]  # columns that are scored in each of five rows


def ragged_mask() -> torch.Tensor:
    columns = torch.arange(11)
    return torch.stack([(columns >= a) & (columns < b) for a, b in SPANS])


def value_and_gradients(model: Llama, logps) -> tuple[torch.Tensor, dict]:
    """Of a sum in which every column has a weight of its own, so that none can stand in for another."""
    model.zero_grad()
    (logps * random_tokens(8, *logps.shape)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_logps_are_those_of_the_naive_way(monkeypatch, tied, rows_at_once):
    """Value and gradient of full logits, gathered; 0 where the mask is off, in one chunk or many."""
    monkeypatch.setattr(Llama, "rows_at_once", rows_at_once)
    model, tokens, mask = tiny_model(sharpness=0.7, tie_word_embeddings=tied), random_tokens(7, 5, 12), ragged_mask()
    expected, slopes = value_and_gradients(model, token_logps(model(tokens), tokens) * mask)
    got, gradients = value_and_gradients(model, model.logps(tokens, mask))
    assert got.dtype == torch.float32 and not got[~mask].any()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    for name in slopes:
        torch.testing.assert_close(gradients[name], slopes[name], rtol=0, atol=1e-6 * float(slopes[name].abs().max()))


def test_logps_under_autocast_are_those_of_the_naive_way(monkeypatch):
    """The computation that the backward pass repeats must be in bfloat16, as the first one was."""
    monkeypatch.setattr(Llama, "rows_at_once", 4)
    model, tokens, mask = tiny_model(sharpness=0.7), random_tokens(7, 5, 12), ragged_mask()
    with torch.autocast("cpu", torch.bfloat16):
        naive, ours = token_logps(model(tokens), tokens) * mask, model.logps(tokens, mask)
    expected, slopes = value_and_gradients(model, naive)
    got, gradients = value_and_gradients(model, ours)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for name in slopes:
        torch.testing.assert_close(gradients[name], slopes[name], rtol=0, atol=0.01 * float(slopes[name].abs().max()))


def test_the_head_sees_only_places_that_are_scored(monkeypatch):
    """(B, T, V) is what runs out of memory: no more than rows_at_once rows, and none for a prompt."""
    monkeypatch.setattr(Llama, "rows_at_once", 4)
    monkeypatch.setattr("losses.ROWS", 1)
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(logits.shape))
    mask = ragged_mask()
    logps = model.logps(random_tokens(7, 5, 12), mask)
    assert all(rows <= 4 and V == 24 for rows, V in seen) and sum(rows for rows, _ in seen) == mask.sum()
    logps.sum().backward()
    assert all(len(shape) == 2 and shape[0] <= 4 for shape in seen)
    assert not model.logps(random_tokens(7, 5, 12), torch.zeros_like(mask)).any()


PACKED = [([3, 4, 5, 6], [[7, 8, 2], [9, 2]]), ([5], [[6, 2], [7, 7, 7, 2]]), ([8, 3, 9], [[2], [4, 2], [5, 6, 7]])]


def packed(groups) -> list[torch.Tensor]:
    """Tokens, positions and segments (B, 16) of rows prompt[:-1], then prompt[-1] + response for each response."""
    rows = []
    for prompt, responses in groups:
        row = [(token, i, 0) for i, token in enumerate(prompt[:-1])]
        for number, response in enumerate(responses, start=1):
            row += [(token, len(prompt) - 1 + i, number) for i, token in enumerate(prompt[-1:] + response)]
        rows.append(row + [(0, 0, 0)] * (16 - len(row)))
    return [torch.tensor([[cell[i] for cell in row] for row in rows]) for i in range(3)]


@pytest.mark.parametrize("shape", ["mha", "gqa", "llama3"])
def test_packed_responses_are_the_sequences_they_stand_for(shape):
    """A response in a row with others has the log-probabilities, and gives the gradients, that it has alone after its
    prompt: no look at the other one, no position off, the shared prompt counted for both."""
    model = tiny_model(sharpness=0.7, **SHAPES[shape])
    tokens, positions, segments = packed(PACKED)
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    got = model.logps(tokens, mask, positions, segments)
    got.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, (prompt, responses) in enumerate(PACKED):
        for i, response in enumerate(responses):
            alone = torch.tensor([prompt + response])
            logps = token_logps(model(alone), alone)[0, len(prompt) - 1:]
            torch.testing.assert_close(got[row, segments[row, 1:].eq(i + 1) & mask[row]], logps, rtol=0, atol=1e-5)
            logps.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5)


def test_llama3_scaling_slows_long_waves_only():
    """Short waves stay, waves longer than the old context are slowed by the factor, between them a
    smooth mix; swapping low and high, or dividing turns by 2 pi twice, fails."""
    model = tiny_model(head_dim=32, rope_scaling=LLAMA3)
    got = rope_frequencies(model.config, "cpu").tolist()
    expected = [slow_angle(model.config, i, 1) for i in range(16)]
    assert got == pytest.approx(expected, rel=1e-5)
    plain = [100.0 ** (-i / 16) for i in range(16)]
    ratios = [frequency / base for frequency, base in zip(got, plain)]
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(1 / 8)
    assert sum(1 / 7.9 < ratio < 0.99 for ratio in ratios) >= 2  # the smooth middle was tested


@torch.no_grad()
def test_attention_depends_on_distance_only():
    """Rotary positions: the same tokens later in the context attend to each other the same way."""
    model = tiny_model(num_hidden_layers=1)
    prompt, places = random_tokens(7, 1, 5), torch.arange(5)[None]
    here, later, stretched = (model.model(prompt, None, p) for p in (places, places + 40, 2 * places))
    torch.testing.assert_close(later, here, **CLOSE)
    assert not torch.allclose(stretched, here, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("limits", [dict(max_position_embeddings=12), dict(sliding_window=12)])
def test_a_sequence_beyond_the_limit_is_refused(limits):
    """Attention here has no window: a longer input than Mistral's would see what it must not, and
    talk nonsense after a while. Prompt, cached tokens and new ones count together."""
    model = tiny_model(**limits)
    assert model.config.max_length == 12
    assert model(random_tokens(1, 1, 12)).shape == (1, 12, 24)
    with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
        model(random_tokens(1, 1, 13))
    cache = new_cache(model, 1, 13)
    model(random_tokens(2, 1, 9), cache)
    model(random_tokens(3, 1, 3), cache)
    with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
        model(random_tokens(4, 1, 1), cache)
    rows = forked(model, random_prompts(5, [2, 9]), 2, 4)
    model(random_tokens(6, 4, 3), rows)
    with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
        model(random_tokens(7, 4, 1), rows)


@torch.no_grad()
def test_slow_reference_is_what_it_claims():
    """The yardstick itself: uniform attention over equal keys, and angles that grow with
    position."""
    model = tiny_model()
    assert slow_angle(model.config, 0, 3) == 3.0
    assert slow_angle(model.config, 2, 10) == pytest.approx(10 * 100 ** -0.5)
    assert math.isclose(float(slow_logits(model, [5])[0, 0]),
                        float(model(torch.tensor([[5]]))[0, 0, 0]), abs_tol=1e-3)
