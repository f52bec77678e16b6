"""Responses are draws from the model, and a pure function of seed, prompt and sample number."""
import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from sample import Batch, Response, generate, sample_next_token, uniforms
from tiny import chi_square_p, random_prompts, tiny_model

LENGTHS = [4, 1, 9, 4, 6, 2]
P_FALSE_ALARM = 1e-6  # chance that a correct program with another seed fails one of these checks


def some_responses(model, prompts, **changes) -> list[list[Response]]:
    options = dict(num_samples=5, max_new_tokens=12, temperature=1.5, eos_id=2, seed=3)
    return generate(model, prompts, **{**options, **changes})


@torch.no_grad()
def slow_greedy(model, prompt: list[int], steps: int) -> list[int]:
    """The likeliest token again and again, each from a full forward of one sequence."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_greedy_batch_equals_one_by_one(kv_heads):
    """Padding that is attended to, a wrong position behind a short prompt, or a row that finds
    another's cache after some have left: each makes a batch answer otherwise than one sequence."""
    model = tiny_model(1, num_key_value_heads=kv_heads)
    prompts = random_prompts(40, LENGTHS)
    slow = [slow_greedy(model, prompt, 12) for prompt in prompts]
    # an end token that the six reach at different steps, so that rows leave in between
    ends = {token: sorted(ids.index(token) for ids in slow if token in ids) for token in range(24)}
    eos = max(ends, key=lambda token: (len(set(ends[token])), -sum(ends[token])))
    assert len(set(ends[eos])) >= 3
    got = generate(model, prompts, num_samples=2, max_new_tokens=12, temperature=0, eos_id=eos,
                   seed=0)
    for ids, pair in zip(slow, got):
        expected = ids[:ids.index(eos) + 1] if eos in ids else ids
        assert [response.ids for response in pair] == [expected, expected]


def test_a_response_ends_with_eos_if_and_only_if_finished():
    """An end token that is cut off is never trained on, and one that is glued to a response cut at
    max_new_tokens teaches the model to stop in the middle."""
    responses = sum(some_responses(tiny_model(), random_prompts(1, LENGTHS)), [])
    for response in responses:
        assert response.finished == (response.ids[-1] == 2)
        assert 2 not in response.ids[:-1]
        assert response.finished or len(response.ids) == 12
        assert 1 <= len(response.ids) <= 12
    assert {response.finished for response in responses} == {True, False}
    at_the_end = sum(some_responses(tiny_model(), random_prompts(1, LENGTHS), max_new_tokens=1, num_samples=60), [])
    assert {len(response.ids) for response in at_the_end} == {1}
    assert all(response.finished == (response.ids[-1] == 2) for response in at_the_end)
    assert {response.finished for response in at_the_end} == {True, False}


def test_samples_of_a_prompt_do_not_share_their_first_token():
    """The first token comes from the prompt's one set of logits; once it was drawn there and copied
    to all samples. Were 16 draws right, that all agree has a chance of sum_v p(v)^16 per prompt: at
    most 0.5^15 here, so 1e-20 for five prompts."""
    model, prompts = tiny_model(sharpness=0.8), random_prompts(2, [3, 5, 2, 7, 4])
    with torch.no_grad():
        for prompt in prompts:
            assert model(torch.tensor([prompt]))[0, -1].softmax(-1).max() < 0.5
    groups = some_responses(model, prompts, num_samples=16, temperature=1.0)
    assert sum(len({response.ids[0] for response in group}) > 1 for group in groups) == 5


def test_same_seed_same_responses_other_seed_others():
    """Neither torch's generator nor a call before may reach into the draw."""
    model, prompts = tiny_model(), random_prompts(3, LENGTHS)
    torch.manual_seed(1)
    first = some_responses(model, prompts)
    torch.manual_seed(2)
    assert some_responses(model, prompts) == first
    assert some_responses(model, prompts, seed=4) != first
    large = 2 ** 56 - 1  # as experiment.derive_seed gives them
    assert some_responses(model, prompts, seed=large) != first


@pytest.mark.parametrize("changes", [dict(batch_rows=1), dict(batch_rows=7), dict(batch_rows=10), dict(batch_rows=25),
                                     dict(cache_tokens=40), dict(cache_tokens=150)], ids=str)
def test_nothing_but_seed_prompt_and_sample_number_matters(changes):
    """A prompt's responses are its own, whoever adds a question, drops one or shuffles them, and whatever fits into a
    batch. They changed when the draw was keyed by the place in the list. Sample n is a function of n, too."""
    model, prompts = tiny_model(), random_prompts(4, LENGTHS)
    together, order = some_responses(model, prompts), [3, 5, 0, 4, 1, 2]
    assert some_responses(model, prompts, **changes) == together
    assert some_responses(model, [prompts[i] for i in order], **changes) == [together[i] for i in order]
    assert [some_responses(model, [prompt], **changes)[0] for prompt in prompts] == together
    assert some_responses(model, prompts, num_samples=3, **changes) == [group[:3] for group in together]


def test_rows_that_leave_equal_rows_that_never_leave():
    """Token 2 ends a response or is a token like any other; up to the first 2 all must be equal."""
    model, prompts = tiny_model(), random_prompts(7, LENGTHS)
    leaving = some_responses(model, prompts, num_samples=8, max_new_tokens=16)
    staying = some_responses(model, prompts, num_samples=8, max_new_tokens=16, eos_id=99)
    for group, full in zip(leaving, staying):
        for response, whole in zip(group, full):
            assert len(whole.ids) == 16 and not whole.finished
            assert response.ids == whole.ids[:len(response.ids)]


def test_progress_is_told_every_response_and_token():
    """The rate that is printed and logged is of tokens in responses, not of steps or padding; and it
    is told while the work goes on."""
    told = []
    groups = some_responses(tiny_model(), random_prompts(8, LENGTHS), batch_rows=10,
                            progress=lambda responses, tokens: told.append((responses, tokens)))
    responses = sum(groups, [])
    assert len(told) >= 3 and max(n for n, _ in told) <= 10
    assert sum(n for n, _ in told) == len(responses) == 30
    assert sum(tokens for _, tokens in told) == sum(len(response.ids) for response in responses)


# --- rows that end make room ----------------------------------------------------------------------

def watch_beginnings(monkeypatch) -> list[tuple[int, list[int]]]:
    """Prompts that begin together, and the own lengths of the rows that are busy at that time."""
    seen, begin = [], Batch.begin

    def watched(self, prompts, slots):
        seen.append((len(prompts), self.cache.lengths[self.live].tolist()))
        begin(self, prompts, slots)
    monkeypatch.setattr(Batch, "begin", watched)
    return seen


def many_responses(**changes) -> list[list[Response]]:
    prompts = random_prompts(50, [5, 3, 7, 30, 4, 20, 6, 2, 9, 17, 8, 1, 12, 3])
    return some_responses(tiny_model(), prompts, **{"num_samples": 3, "max_new_tokens": 40, **changes})


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_questions_that_begin_late_get_the_responses_they_get_alone(monkeypatch, temperature):
    """A question takes over rows that others have left, with old keys, values and lengths in them, next to rows in the
    middle of theirs: what it finds there, or does to them, must not show."""
    alone = [many_responses_of(i, temperature) for i in range(14)]
    seen = watch_beginnings(monkeypatch)
    together = many_responses(temperature=temperature, batch_rows=12)
    assert together == alone
    beside = [lengths for _, lengths in seen if lengths]
    assert len(beside) >= 3 and any(len(set(lengths)) > 1 for lengths in beside)


def many_responses_of(question: int, temperature: float) -> list[Response]:
    prompts = random_prompts(50, [5, 3, 7, 30, 4, 20, 6, 2, 9, 17, 8, 1, 12, 3])
    return some_responses(tiny_model(), [prompts[question]], num_samples=3, max_new_tokens=40,
                          temperature=temperature)[0]


@pytest.mark.parametrize("batch_rows, cache_tokens", [(12, None), (9, None), (1024, 500), (1024, 900)])
def test_the_cache_stays_within_its_budget(monkeypatch, batch_rows, cache_tokens):
    """Memory that grows with the number of questions runs out in the night. Counted: columns of rows and of prompts
    together, after each step."""
    sizes, step = [], Batch.step

    def counted(self):
        step(self)
        caches = (self.cache, self.cache.prompts)
        sizes.append((len(self.cache.lengths), sum(c.keys[0].shape[0] * c.keys[0].shape[2] for c in caches)))
    together = many_responses()
    monkeypatch.setattr(Batch, "step", counted)
    assert many_responses(batch_rows=batch_rows, cache_tokens=cache_tokens) == together
    assert max(rows for rows, _ in sizes) <= batch_rows
    if cache_tokens:
        assert cache_tokens / 2 < max(tokens for _, tokens in sizes) <= cache_tokens


def test_more_samples_cost_no_more_prompt():
    """32 samples of a 300-token prompt instead of one: as many tokens through the model before the first is drawn."""
    model, prompt = tiny_model(max_position_embeddings=512), random_prompts(60, [300])
    for num_samples in (1, 32):
        tokens = []
        hook = model.model.register_forward_pre_hook(lambda module, args, seen=tokens: seen.append(args[0].numel()))
        some_responses(model, prompt, num_samples=num_samples, max_new_tokens=3, eos_id=-1)
        hook.remove()
        assert tokens == [300, num_samples, num_samples]


def test_prompts_are_computed_in_parts(monkeypatch):
    """A short prompt among long ones must not let all of them be computed, padded and scored, at once."""
    prompts = random_prompts(80, [2, *[15] * 5, 60])
    alone = [some_responses(tiny_model(), [prompt], num_samples=2, max_new_tokens=4)[0] for prompt in prompts]
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 40)
    seen = watch_beginnings(monkeypatch)
    assert some_responses(tiny_model(), prompts, num_samples=2, max_new_tokens=4) == alone
    assert [count for count, _ in seen] == [2, 2, 2, 1]


# --- what a GPU does, as far as a CPU can tell ------------------------------------------------------

class Waits(TorchDispatchMode):
    """Counts operations whose result a GPU would have to be waited for."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "aten.item", "nonzero", "unique", "masked_select", "is_nonzero", "equal.")
        self.count += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


def memory_of(batch: Batch) -> set[int]:
    """Where everything lies that one decoding step leaves to the next."""
    cache, prompts = batch.cache, batch.cache.prompts
    tensors = [batch.uniforms, batch.ids, batch.newest, batch.live, cache.lengths, cache.place, cache.row_at,
               prompts.lengths, *cache.keys, *cache.values, *prompts.keys, *prompts.values]
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("changes", [dict(batch_rows=12), {}, dict(batch_rows=3), dict(temperature=0, batch_rows=12),
                                     dict(top_p=0.9, top_k=12, batch_rows=12)], ids=str)
def test_a_decoding_step_can_be_recorded_and_replayed(monkeypatch, changes):
    """A CUDA graph works on the memory it was recorded with, and must not wait. So a step may move nothing, and what
    moves between two steps must change what `recorded` goes by: rows and windows. Looking only every eighth step, as
    on a GPU, gives the responses that a CPU's habits do."""
    expected, make, step, layouts, memories = many_responses(**changes), Batch.__init__, Batch.step, [], []

    def made(self, *args, **options):
        make(self, *args, **options)
        self.check_every = 8

    def watched(self):
        before = memory_of(self)
        layout = len(self.owner), self.cache.window, self.cache.prompts.window
        if layouts and layouts[-1] == layout:
            assert memories[-1] == before
        with Waits() as waits:
            step(self)
        assert waits.count == 2  # the checks of lengths, which are made on a CPU only
        assert memory_of(self) == before
        layouts.append(layout)
        memories.append(before)
    monkeypatch.setattr(Batch, "__init__", made)
    monkeypatch.setattr(Batch, "step", watched)
    assert many_responses(**changes) == expected
    assert len(set(layouts)) < len(layouts) / 4


# --- bfloat16 -------------------------------------------------------------------------------------

@torch.no_grad()
def test_bfloat16_samples_are_close_to_float32():
    """The log-probabilities of what a bfloat16 copy drew, under the float32 model, must be what that
    model expects of its own draws: the mean over some 9,000 tokens within five standard errors plus
    0.02 nats, which is what bfloat16 may cost."""
    model, prompts = tiny_model(sharpness=0.8), random_prompts(70, [6, 3, 11, 2])
    options = dict(num_samples=200, max_new_tokens=12, temperature=1.0, eos_id=-1)
    exact = some_responses(model, prompts, **options)
    rounded = some_responses(copy.deepcopy(model).bfloat16(), prompts, **options)
    surprises = []
    for groups in (exact, rounded):
        values = []
        for prompt, group in zip(prompts, groups):
            ids = torch.tensor([response.ids for response in group])
            tokens = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], 1)
            logps = model(tokens)[:, len(prompt) - 1:-1].log_softmax(-1)
            values.append((logps.gather(-1, ids[..., None])[..., 0] + entropy(logps)).flatten())
        surprises.append(torch.cat(values))
    for values in surprises:
        assert abs(float(values.mean())) < 5 * float(values.std()) / math.sqrt(len(values)) + 0.02
    same = [a.ids[0] == b.ids[0] for x, y in zip(exact, rounded) for a, b in zip(x, y)]
    assert sum(same) > 0.97 * len(same)  # the same uniforms: only draws near a boundary may differ


def entropy(logps: torch.Tensor) -> torch.Tensor:
    return -(logps.exp() * logps).sum(-1)


# --- the draw ------------------------------------------------------------------------------------

def slow_distribution(logits: list[float], temperature: float, top_k: int,
                      top_p: float) -> list[float]:
    """Temperature, then the k best, then the smallest set of the best that holds top_p;
    renormalised."""
    weights = [math.exp(x / temperature) for x in logits]
    best = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = best[:top_k] if top_k else best
    total, nucleus, mass = sum(weights[i] for i in kept), [], 0.0
    for i in kept:
        if mass < top_p:
            nucleus.append(i)
        mass += weights[i] / total
    inside = sum(weights[i] for i in nucleus)
    return [weights[i] / inside if i in nucleus else 0.0 for i in range(len(logits))]


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 0, 1.0), (1.0, 4, 1.0), (1.0, 1, 1.0),
            (1.0, 0, 0.6),
            (0.8, 5, 0.7), (2.0, 50, 0.95)]


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square of 20,000 draws against the definition: temperature multiplied instead of divided,
    top_p of the wrong end, or probabilities left unnormalised give p far below 1e-6."""
    row = [1.3, -0.4, 0.2, 2.1, -2.0, 0.9, 0.0, 1.7, -1.1, 0.5]
    n = 20_000
    logits = torch.tensor(row).expand(n, -1)
    tokens = sample_next_token(logits, uniforms(11, [1], 1, n)[0], temperature, top_p, top_k)
    expected = slow_distribution(row, temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=len(row)).tolist()
    assert all(count == 0 for count, p in zip(counts, expected) if p == 0)
    if sum(p > 0 for p in expected) > 1:
        assert chi_square_p(counts, [n * p for p in expected]) > P_FALSE_ALARM


@pytest.mark.parametrize("temperature, top_k, top_p", [*SETTINGS, (1.0, 90, 0.8)])
def test_draws_follow_the_distribution_over_blocks_of_the_vocabulary(temperature, top_k, top_p):
    """The same for 150 tokens, which are drawn by block and then within it: a block's share, the rest of
    the random number or the padding of the last block wrong, and p is far below 1e-6. One block cannot
    be drawn at all."""
    n, generator = 60_000, torch.Generator().manual_seed(1)
    row = (1.5 * torch.randn(150, generator=generator)).tolist()
    row[sample.BLOCK:2 * sample.BLOCK] = [-math.inf] * sample.BLOCK
    logits = torch.tensor(row).expand(n, -1)
    tokens = sample_next_token(logits, uniforms(12, [1], 1, n)[0], temperature, top_p, top_k)
    expected = slow_distribution(row, temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=len(row)).tolist()
    assert len(counts) == len(row)
    assert all(count == 0 for count, p in zip(counts, expected) if p == 0)
    if sum(p > 0 for p in expected) > 1:
        assert chi_square_p(counts, [n * p for p in expected]) > P_FALSE_ALARM


def test_generated_pairs_of_tokens_follow_the_model():
    """Chi-square of the first two tokens of 6,000 samples against the model's own joint
    probabilities: one random number used for both steps, or for two samples, keeps each token's
    frequencies and ruins those of pairs."""
    model, prompt, n = tiny_model(vocab_size=9, sharpness=0.9), [4, 7, 3], 6000
    [samples] = generate(model, [prompt], num_samples=n, max_new_tokens=2, eos_id=99, seed=5)
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)
        rows = model(torch.tensor([prompt + [a] for a in range(9)]))[:, -1].double().softmax(-1)
    expected = (first[:, None] * rows * n).flatten().tolist()
    counts = [0] * 81
    for response in samples:
        counts[response.ids[0] * 9 + response.ids[1]] += 1
    assert chi_square_p(counts, expected) > P_FALSE_ALARM


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 2 ** -53])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (0, 0.5)])
def test_a_token_of_probability_zero_is_never_drawn(u, top_k, top_p):
    """At u = 0 a search from the wrong side finds the first token even if it cannot occur; at the
    other end rounding of the sum found an index past the vocabulary."""
    never = -math.inf
    generator = torch.Generator().manual_seed(0)
    for size in [40, 200] * 30:
        logits = 5 * torch.randn(1, size, generator=generator)
        logits[0, :7], logits[0, 20], logits[0, 33:] = never, never, never
        logits[0, 150:180] = 0.0
        uniform = torch.tensor([u], dtype=torch.float64)
        token = int(sample_next_token(logits, uniform, 1.0, top_p, top_k))
        assert 0 <= token < size
        assert logits[0, token] > never


def test_temperature_zero_takes_the_best_whatever_the_random_number():
    """Greedy must not divide by zero, nor draw."""
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 4.9]])
    for u in (0.0, 0.999):
        uniform = torch.full((2,), u, dtype=torch.float64)
        assert sample_next_token(logits, uniform, 0, 1.0, 0).tolist() == [1, 0]


# --- the random numbers --------------------------------------------------------------------------

def uniform_grid(seed: int = 0) -> torch.Tensor:
    """(60 questions, 40 samples, 30 steps): all the numbers that a small run draws from."""
    return torch.stack([uniforms(seed, [1, question], 40, 30) for question in range(60)])


def test_a_number_is_a_function_of_seed_prompt_sample_and_step():
    """Of prompts as lists: the same tokens in another order, or digits that read alike, are other prompts. More samples
    or longer responses change no number."""
    prompts = [[5, 6], [6, 5], [5, 6, 6], [56], [1, 23], [12, 3], [1, 2, 3], [1], [1, 1]]
    assert len({float(uniforms(0, prompt, 1, 1)) for prompt in prompts}) == len(prompts)
    many = uniforms(2 ** 56 - 1, [5, 6], 8, 30)  # a seed as derive_seed gives them
    assert torch.equal(uniforms(2 ** 56 - 1, [5, 6], 3, 10), many[:3, :10])


def test_uniforms_are_uniform():
    """72,000 numbers in [0, 1): 64 equal bins by chi-square, mean within five standard errors."""
    u = uniform_grid()
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    counts = torch.bincount((u.flatten() * 64).long(), minlength=64).tolist()
    assert chi_square_p(counts, [u.numel() / 64] * 64) > P_FALSE_ALARM
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())
    low_bits = (u.flatten() * 2 ** 53).long() % 64
    counts = torch.bincount(low_bits, minlength=64).tolist()
    assert chi_square_p(counts, [u.numel() / 64] * 64) > P_FALSE_ALARM


def test_no_random_number_is_used_twice():
    """Counters that are added up rather than mixed make (question 1, sample 0) draw what (0, 1)
    draws. Among 2 * 72,000 numbers of 53 bits one true coincidence has a chance of 1e-6."""
    u = torch.cat([uniform_grid(0).flatten(), uniform_grid(1).flatten()])
    assert u.unique().numel() == u.numel()


NEIGHBOURS = {  # two slices of the grid whose numbers must not know of each other
    "next question": lambda u, v: (u[:-1], u[1:]),
    "next sample": lambda u, v: (u[:, :-1], u[:, 1:]),
    "next step": lambda u, v: (u[..., :-1], u[..., 1:]),
    "step after next": lambda u, v: (u[..., :-2], u[..., 2:]),
    "question for sample": lambda u, v: (u[:-1, 1:], u[1:, :-1]),
    "sample for step": lambda u, v: (u[:, :-1, 1:], u[:, 1:, :-1]),
    "question for step": lambda u, v: (u[:-1, :, 1:], u[1:, :, :-1]),
    "next seed": lambda u, v: (u, v),
    "next seed, last question": lambda u, v: (u[1:], v[:-1]),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_uniforms_are_independent(name):
    """Neighbours in any direction: correlation within five standard errors and an 8 by 8 table of
    both by chi-square. A counter that is not mixed well enough fails here."""
    a, b = (x.flatten() for x in NEIGHBOURS[name](uniform_grid(0), uniform_grid(1)))
    n = a.numel()
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(n)
    counts = torch.bincount((a * 8).long() * 8 + (b * 8).long(), minlength=64).tolist()
    assert chi_square_p(counts, [n / 64] * 64) > P_FALSE_ALARM


# --- what is refused -----------------------------------------------------------------------------

def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers():
    """Past its last position the model talks nonsense, so nothing may be cut or sampled there."""
    model = tiny_model(max_position_embeddings=32)
    fits, long = random_prompts(9, [20, 21])
    assert len(some_responses(model, [fits])[0]) == 5  # 20 + 12 is exactly the limit
    with pytest.raises(ValueError) as error:
        some_responses(model, [fits, long])
    message = str(error.value)
    assert "prompt 1" in message
    assert all(number in message for number in ("21", "20", "32", "12"))
    with pytest.raises(ValueError, match="prompt 0"):
        some_responses(model, [[]])
