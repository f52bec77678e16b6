"""Responses are draws from the model, and a pure function of seed, prompt and sample number."""
import math

import pytest
import torch

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
    """The rate that is printed and logged is of tokens in responses, not of steps or padding."""
    told = []
    groups = some_responses(tiny_model(), random_prompts(8, LENGTHS), batch_rows=10,
                            progress=lambda responses, tokens: told.append((responses, tokens)))
    responses = sum(groups, [])
    assert [n for n, _ in told] == [10, 10, 10]
    assert sum(tokens for _, tokens in told) == sum(len(response.ids) for response in responses)


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
    for sample in samples:
        counts[sample.ids[0] * 9 + sample.ids[1]] += 1
    assert chi_square_p(counts, expected) > P_FALSE_ALARM


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 2 ** -53])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (0, 0.5)])
def test_a_token_of_probability_zero_is_never_drawn(u, top_k, top_p):
    """At u = 0 a search from the wrong side finds the first token even if it cannot occur; at the
    other end rounding of the sum found an index past the vocabulary."""
    never = -math.inf
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = 5 * torch.randn(1, 40, generator=generator)
        logits[0, :7], logits[0, 20], logits[0, 33:] = never, never, never
        uniform = torch.tensor([u], dtype=torch.float64)
        token = int(sample_next_token(logits, uniform, 1.0, top_p, top_k))
        assert 0 <= token < 40
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
