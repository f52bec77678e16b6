"""Responses are draws from the model, and a pure function of seed, prompt and sample number."""
import copy
import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from model import KVCache, Llama
from sample import Response, generate, prompt_key, sample_keys, sample_next_token, uniforms
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
    at_the_end = some_responses(tiny_model(), random_prompts(1, LENGTHS), max_new_tokens=1)
    assert {len(response.ids) for response in sum(at_the_end, [])} == {1}


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


def test_order_and_company_of_prompts_change_nothing():
    """A prompt's responses are its own: whoever adds a question, drops one or shuffles them gets
    the same responses to the rest. They changed when the draw was keyed by the place in the
    list."""
    model, prompts = tiny_model(), random_prompts(4, LENGTHS)
    whole = some_responses(model, prompts)
    order = [3, 5, 0, 4, 1, 2]
    shuffled = some_responses(model, [prompts[i] for i in order])
    assert [whole[i] for i in order] == shuffled
    assert [some_responses(model, [prompt])[0] for prompt in prompts] == whole


@pytest.mark.parametrize("batch_rows", [1, 7, 10, 25])
def test_batch_rows_change_nothing(batch_rows):
    """Random numbers dealt by row of the batch would change with its size."""
    model, prompts = tiny_model(), random_prompts(5, LENGTHS)
    whole = some_responses(model, prompts)
    assert some_responses(model, prompts, batch_rows=batch_rows) == whole


def test_drawing_for_some_rows_at_a_time_changes_nothing(monkeypatch):
    """With a large vocabulary the logits of 256 rows are made at a time; a row that has drawn must not be
    moved on, or ended, by those that draw after it."""
    model, prompts = tiny_model(), random_prompts(5, LENGTHS)
    whole = some_responses(model, prompts, num_samples=100)
    monkeypatch.setattr(sample, "LOGITS", 0)
    assert some_responses(model, prompts, num_samples=100) == whole


def test_the_first_samples_stay_when_more_are_drawn():
    """Sample n of a question is a function of n, not of how many there are."""
    model, prompts = tiny_model(), random_prompts(6, LENGTHS)
    few, many = some_responses(model, prompts, num_samples=3), some_responses(model, prompts)
    assert [group[:3] for group in many] == few


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

def watch_admissions(monkeypatch) -> list[tuple[int, list[int]]]:
    """Prompts that begin together, and the own lengths of the rows at work at that time."""
    seen, admit = [], sample.admit

    def watched(model, rows, prompts, slots, settings):
        seen.append((len(prompts), rows.cache.lengths[rows.live].tolist()))
        admit(model, rows, prompts, slots, settings)
    monkeypatch.setattr(sample, "admit", watched)
    return seen


def many_responses(**changes) -> list[list[Response]]:
    prompts = random_prompts(50, [5, 3, 7, 30, 4, 20, 6, 2, 9, 17, 8, 1, 12, 3])
    return some_responses(tiny_model(), prompts, **{"num_samples": 3, "max_new_tokens": 40, **changes})


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_questions_that_begin_late_get_the_responses_they_get_alone(monkeypatch, temperature):
    """A question enters rows that others have left, at places with old keys, values and lengths behind
    it, beside rows in the midst of theirs: what it finds there, or does to them, must not show."""
    alone = [many_responses_of(i, temperature) for i in range(14)]
    seen = watch_admissions(monkeypatch)
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
    """Memory that grows with the number of questions runs out in the night. Counted: columns of rows and
    of prompts together, whenever the cache is made or grows."""
    sizes, make, grow = [], KVCache.__init__, KVCache.grow
    caches = []

    def count() -> None:
        rows = [cache for cache in caches if cache.prompts is not None]
        for cache in rows:
            sizes.append((len(cache.lengths), sum(c.keys[0].shape[0] * c.keys[0].shape[2]
                                                  for c in (cache, cache.prompts))))

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        caches.append(self)
        count()

    def grown(self, *args):
        grow(self, *args)
        count()
    whole = many_responses()
    monkeypatch.setattr(KVCache, "__init__", made)
    monkeypatch.setattr(KVCache, "grow", grown)
    assert many_responses(batch_rows=batch_rows, cache_tokens=cache_tokens) == whole
    assert max(rows for rows, _ in sizes) <= batch_rows
    if cache_tokens:
        assert cache_tokens / 2 < max(tokens for _, tokens in sizes) <= cache_tokens


def test_more_samples_cost_no_more_prompt(monkeypatch):
    """32 samples of a 300-token prompt instead of one: as many tokens through the model before the first
    is drawn, as much memory for the prompt."""
    model, cost = tiny_model(max_position_embeddings=512), {}
    prompt, enter = random_prompts(60, [300]), KVCache.enter
    for num_samples in (1, 32):
        tokens, memory = [], []

        def hidden(x, cache, tokens=tokens):
            tokens.append(x.numel())
            return Llama.hidden(model, x, cache)

        def entered(self, *args, memory=memory):
            enter(self, *args)
            memory.append(sum(x.numel() for x in self.prompts.keys + self.prompts.values))
        monkeypatch.setattr(model, "hidden", hidden)
        monkeypatch.setattr(KVCache, "enter", entered)
        some_responses(model, prompt, num_samples=num_samples, max_new_tokens=3, eos_id=-1)
        assert tokens[1:] == [num_samples] * 2
        cost[num_samples] = (tokens[0], memory)
    assert cost[1] == cost[32]
    assert cost[1][0] == 300


# --- what a GPU does, as far as a CPU can tell ------------------------------------------------------

def state_of(rows: sample.Rows) -> dict[str, int]:
    """Where in memory everything lies that one decoding step leaves to the next, and how much is looked at."""
    objects = {"rows": rows, "cache": rows.cache, "prompts": rows.cache.prompts}
    names = {"rows": ["keys", "tokens", "drawn", "live"], "cache": ["lengths", "places", "row_at"],
             "prompts": ["lengths"]}
    state = {f"{key}.{name}": getattr(objects[key], name).data_ptr()
             for key, group in names.items() for name in group}
    for key in ("cache", "prompts"):
        state |= {f"{key}.{i}": x.data_ptr() for i, x in enumerate(objects[key].keys + objects[key].values)}
    return state | {"window": rows.cache.window, "prompts.window": rows.cache.prompts.window}


class Waits(TorchDispatchMode):
    """Counts operations whose result a GPU would have to be waited for."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "aten.item", "nonzero", "unique", "masked_select", "is_nonzero", "equal.")
        self.count += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


def test_a_decoding_step_can_be_recorded_and_replayed(monkeypatch):
    """A CUDA graph works on the memory it was recorded with, and must not wait. So a step may move
    nothing, and what moves between two steps must change the layout by which recorded() knows. The
    habits of a GPU (all memory at once, a look every eight steps, rows that stay when they have ended)
    give the responses that a CPU's do."""
    layouts, replays, rows_seen = [], [], []
    init = sample.Rows.__init__

    def remembered(self, *args):
        init(self, *args)
        rows_seen.append(self)

    def prepare(step, cache):
        recorded_state = {}

        def run():
            rows = rows_seen[-1]
            before = state_of(rows)
            if layouts and layouts[-1] == cache.layout():
                assert before == recorded_state
                replays.append(1)
            layouts.append(cache.layout())
            with Waits() as waits:
                step()
            assert waits.count == 2  # the checks of the length, which are made on a CPU only
            assert state_of(rows) == before
            recorded_state.clear()
            recorded_state.update(before)
        return run
    expected = {name: many_responses(**options) for name, options in GPU_CASES.items()}
    monkeypatch.setattr(sample.Rows, "__init__", remembered)
    monkeypatch.setitem(sample.HABITS, "cpu",
                        dataclasses.replace(sample.HABITS["cuda"], prepare=prepare, columns=16))
    for name, options in GPU_CASES.items():
        assert many_responses(**options) == expected[name], name
    assert len(set(layouts)) < len(layouts) / 4
    assert len(replays) > len(layouts) / 2


GPU_CASES = {"refilled": dict(batch_rows=12), "all at once": {}, "one question": dict(batch_rows=3),
             "greedy": dict(temperature=0, batch_rows=12), "nucleus": dict(top_p=0.9, top_k=12, batch_rows=12)}


def test_prompts_are_computed_in_parts(monkeypatch):
    """A short prompt among long ones must not let all of them be computed, padded and scored, at once."""
    parts = []
    prefill = sample.prefill
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 40)
    monkeypatch.setattr(sample, "prefill", lambda model, prompts: parts.append(prompts) or prefill(model, prompts))
    prompts = random_prompts(80, [2, *[15] * 5, 60])
    alone = [some_responses(tiny_model(), [prompt], num_samples=2, max_new_tokens=4)[0] for prompt in prompts]
    parts.clear()
    assert some_responses(tiny_model(), prompts, num_samples=2, max_new_tokens=4) == alone
    assert [len(part) for part in parts] == [2, 2, 2, 1]


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
    keys = sample_keys(11, torch.arange(n), torch.zeros(n, dtype=torch.long))
    logits = torch.tensor(row).expand(n, -1)
    tokens = sample_next_token(logits, uniforms(keys, 0), temperature, top_p, top_k)
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
    keys = sample_keys(12, torch.arange(n), torch.zeros(n, dtype=torch.long))
    logits = torch.tensor(row).expand(n, -1)
    tokens = sample_next_token(logits, uniforms(keys, 0), temperature, top_p, top_k)
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

def uniform_grid(seed: int = 0, questions: int = 60, samples: int = 40,
                 steps: int = 30) -> torch.Tensor:
    """(questions, samples, steps): all the numbers that a small run draws from."""
    q = torch.arange(questions).repeat_interleave(samples)
    n = torch.arange(samples).repeat(questions)
    keys = sample_keys(seed, q, n)
    numbers = torch.stack([uniforms(keys, s) for s in range(steps)], -1)
    return numbers.view(questions, samples, steps)


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


def test_every_prompt_has_its_own_key():
    """Prompts of the same tokens in another order, or of digits that read alike, are not the
    same."""
    prompts = [[5, 6], [6, 5], [5, 6, 6], [56], [1, 23], [12, 3], [1, 2, 3], [1], [1, 1]]
    assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts)
    assert all(-2 ** 63 <= prompt_key(prompt) < 2 ** 63 for prompt in prompts)


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
