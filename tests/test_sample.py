"""Responses are draws from the model, and a function of seed, prompt and sample number alone."""
import contextlib
import copy
import itertools
import math
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infra import InputError
import sample
from model import KVCache, Llama
from sample import Batch, Response, cache_budget, generate, recorded, sample_next_token, uniforms
from tiny import chi_square_p, random_prompts, tiny_model

EOS, SAMPLES = 2, 3
P_FALSE_ALARM = 1e-6  # chance that a correct program with another seed fails one of these checks


def some_prompts() -> list[list[int]]:
    return random_prompts(50, [5, 3, 7, 30, 4, 20, 6, 2, 9, 17, 8, 2, 12, 3])


def some_responses(model: Llama, prompts: list[list[int]], **changes) -> list[list[Response]]:
    options = dict(num_samples=SAMPLES, max_new_tokens=40, temperature=1.5, eos_ids=(EOS,), seed=3)
    return generate(model, prompts, **{**options, **changes})


@pytest.fixture(scope="module")
def alone() -> list[list[Response]]:
    """Responses to each of some_prompts, asked one at a time."""
    return [some_responses(tiny_model(), [prompt])[0] for prompt in some_prompts()]


# --- batches ---------------------------------------------------------------------------------------

@torch.no_grad()
def slow_greedy(model: Llama, prompt: list[int], steps: int) -> list[int]:
    """Take the most likely token again and again, each from a full forward of one sequence."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_greedy_batch_equals_one_by_one(kv_heads):
    """Padding that is attended to, a wrong position after a short prompt, or a row that reads the cache of another."""
    model, prompts = tiny_model(1, num_key_value_heads=kv_heads), random_prompts(40, [4, 1, 9, 4, 6, 2])
    slow = [slow_greedy(model, prompt, 12) for prompt in prompts]
    # an end token that the six reach at different steps, so that rows finish in between
    ends = {token: sorted(ids.index(token) for ids in slow if token in ids) for token in range(24)}
    eos = max(ends, key=lambda token: (len(set(ends[token])), -sum(ends[token])))
    assert len(set(ends[eos])) >= 3
    got = generate(model, prompts, num_samples=2, max_new_tokens=12, temperature=0, eos_ids=(eos,), seed=0,
                   batch_rows=8)
    for ids, pair in zip(slow, got, strict=True):
        expected = ids[:ids.index(eos) + 1] if eos in ids else ids
        assert [response.ids for response in pair] == [expected, expected]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
def test_a_response_ends_with_eos_if_and_only_if_finished(max_new_tokens):
    """Also where EOS is the last token allowed. An EOS that is cut off is never trained on, and one appended to a
    truncated response teaches the model to stop in the middle."""
    groups = some_responses(tiny_model(), some_prompts(), num_samples=40, max_new_tokens=max_new_tokens)
    responses = sum(groups, [])
    for response in responses:
        assert response.finished == (response.ids[-1] == EOS)
        assert EOS not in response.ids[:-1]
        assert 1 <= len(response.ids) <= max_new_tokens
        assert response.finished or len(response.ids) == max_new_tokens
    assert {response.finished for response in responses if len(response.ids) == max_new_tokens} == {True, False}
    either = some_responses(tiny_model(), some_prompts(), num_samples=40, max_new_tokens=max_new_tokens,
                            eos_ids=(EOS, 7))
    for response, sooner in zip(responses, sum(either, []), strict=True):
        end = min((response.ids + [EOS, 7]).index(token) for token in (EOS, 7)) + 1
        assert sooner == Response(response.ids[:end], {EOS, 7} & {*response.ids} != set())


@pytest.mark.parametrize("changes", [{}, dict(batch_rows=1), dict(batch_rows=10), dict(batch_rows=25),
                                     dict(cache_tokens=500)], ids=str)
def test_nothing_but_seed_prompt_and_sample_number_matters(alone, changes):
    """Whoever adds a question, drops one or reorders them, and whatever fits into a batch: a question's responses are
    those it gets alone. It takes over rows with old keys, values and lengths in them, next to rows halfway."""
    model, prompts, order = tiny_model(), some_prompts(), [3, 5, 0, 13, 4, 11, 1, 2, 8]
    torch.manual_seed(len(str(changes)))  # no say in it either
    assert some_responses(model, prompts, **changes) == alone
    assert some_responses(model, [prompts[i] for i in order], **changes) == [alone[i] for i in order]
    assert some_responses(model, prompts, num_samples=2, **changes) == [group[:2] for group in alone]
    assert some_responses(model, prompts, seed=4, **changes) != alone
    longer = some_responses(model, prompts[:4], eos_ids=(), **changes)  # EOS is a token like any other
    assert [[full.ids[:len(response.ids)] for full, response in zip(*groups)] for groups in zip(longer, alone)] == [
        [response.ids for response in group] for group in alone[:4]]


class Watched:
    """What `generate` passes through a model, and what it tells of its progress."""

    def __init__(self, model: Llama, **changes) -> None:
        self.shapes = []  # of the tokens in each forward pass
        self.columns = []  # of rows and prompts together in the cache, in each decoding step
        self.busy = []  # responses that are unfinished when others begin
        self.told = []
        model.model.register_forward_hook(self.seen)
        self.responses = some_responses(model, progress=lambda *numbers: self.told.append(numbers), **changes)

    def seen(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        tokens, cache = args
        if tokens.shape[1] > 1:
            begun = sum(rows for rows, length in self.shapes if length > 1)
            self.busy.append(begun * SAMPLES - sum(responses for responses, _ in self.told))
        else:
            self.columns.append(sum(c.keys[0].shape[0] * c.keys[0].shape[2] for c in (cache, cache.prompts)))
        self.shapes.append(tuple(tokens.shape))


@pytest.mark.parametrize("batch_rows, cache_tokens", [(12, None), (9, None), (1024, 500), (1024, 900)])
def test_finished_rows_make_room_within_the_budget(alone, batch_rows, cache_tokens):
    """Memory that grows with the number of questions runs out; rows that wait for the longest are wasted. The rate
    that is logged is of responses and their tokens, not of steps or padding, and it is told while work continues."""
    watched = Watched(tiny_model(), prompts=some_prompts(), batch_rows=batch_rows, cache_tokens=cache_tokens)
    assert watched.responses == alone
    assert sum(busy > 0 for busy in watched.busy) >= 3
    rows = [rows for rows, length in watched.shapes if length == 1]
    assert rows[-1] < max(rows) <= batch_rows  # once no question waits, rows that have finished are dropped
    if cache_tokens:
        assert cache_tokens / 2 < max(watched.columns) <= cache_tokens

    assert len(watched.told) >= 3
    tokens = sum(len(response.ids) for response in sum(alone, []))
    assert [sum(numbers) for numbers in zip(*watched.told)] == [len(alone) * SAMPLES, tokens]



def test_the_default_budget_is_1_gib():
    """Keys and values of all layers and key-value heads, in the dtype of the weights."""
    for model in (tiny_model(), tiny_model(num_key_value_heads=1, num_hidden_layers=3).bfloat16()):
        one = KVCache(model.config, 1, 1, "cpu", model.lm_head.weight.dtype)
        assert cache_budget(model) == 2**30 // sum(x.numel() * x.element_size() for x in one.keys + one.values)


def test_prompts_are_computed_in_parts_and_once_for_all_samples(monkeypatch):
    """32 samples of a prompt cost no more of it than one; and a short prompt among long ones must not let all of them
    be computed, padded and scored, at once."""
    watched = Watched(tiny_model(), prompts=random_prompts(60, [100]), eos_ids=(), num_samples=32, max_new_tokens=3)
    assert watched.shapes == [(1, 100), (32, 1), (32, 1)]
    prompts = random_prompts(80, [2, *[15] * 5, 60])
    together = some_responses(tiny_model(), prompts)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 40)
    watched = Watched(tiny_model(), prompts=prompts)
    assert watched.responses == together
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(2, 15), (2, 15), (2, 15), (1, 60)]


@torch.no_grad()
def test_bfloat16_samples_are_close_to_float32():
    """The float32 model's log-probabilities of what a bfloat16 copy drew must be what it expects of its own draws: the
    mean over 9,600 tokens within five standard errors plus 0.02 nats, which is what bfloat16 may cost."""
    model, prompts = tiny_model(sharpness=0.8), random_prompts(70, [6, 3, 11, 2])
    options = dict(num_samples=200, max_new_tokens=12, temperature=1.0, eos_ids=())
    exact = some_responses(model, prompts, **options)
    rounded = some_responses(copy.deepcopy(model).bfloat16(), prompts, **options)
    for groups in (exact, rounded):
        surprises = []
        for prompt, group in zip(prompts, groups):
            tokens = torch.tensor([prompt + response.ids for response in group])
            logps = model(tokens)[:, len(prompt) - 1:-1].log_softmax(-1)
            drawn = logps.gather(-1, tokens[:, len(prompt):, None])[..., 0]
            surprises.append((drawn - (logps.exp() * logps).sum(-1)).flatten())
        surprise = torch.cat(surprises)
        assert abs(float(surprise.mean())) < 5 * float(surprise.std()) / math.sqrt(len(surprise)) + 0.02
    same = [a.ids[0] == b.ids[0] for x, y in zip(exact, rounded) for a, b in zip(x, y)]
    assert sum(same) > 0.97 * len(same)  # the same uniforms: only draws near a boundary may differ


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers():
    """Past its last position the model talks nonsense, so nothing may be cut or sampled there."""
    model = tiny_model(max_position_embeddings=32)
    fits, long = random_prompts(9, [20, 21])
    assert generate(model, [], num_samples=2, max_new_tokens=12, eos_ids=(EOS,), seed=0) == []
    assert len(some_responses(model, [fits], max_new_tokens=12)[0]) == SAMPLES  # 20 + 12 is exactly the limit
    for prompts, message in (([fits, long], "prompt 1 has 21 tokens: 1 to 20 .*32 positions.*=12"),
                             ([[]], "prompt 0 has 0 tokens")):
        with pytest.raises(ValueError, match=message):
            some_responses(model, prompts, max_new_tokens=12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("drawing", [dict(temperature=0), dict(temperature=1), dict(top_k=3, top_p=0.9)], ids=str)
def test_logits_that_are_not_finite_are_named(value, broken, drawing):
    """Greedy, such a model was "accuracy 0.0 %" with exit status 0; sampled, an IndexError. With one row of the
    embedding broken, other responses go on beside those that have drawn it."""
    model, prompts = tiny_model(), [[token for token in prompt if token != 7] for prompt in some_prompts()]
    model.get_submodule(broken).weight.data[7] = value
    with pytest.raises(InputError, match="logits are not finite"):
        some_responses(model, prompts, **drawing)
    rows = torch.tensor([[0.0] * 149 + [value], [-math.inf] * 150, [0.0] * 150])
    drawing = dict(temperature=1, top_p=1, top_k=0) | drawing
    *bad, good = sample_next_token(rows, torch.full((3,), 0.5).double(), **drawing).tolist()
    assert bad == [-1, -1] and good >= 0


# --- what a GPU does, as far as a CPU can tell -------------------------------------------------------

class ClaimsToBeOnGPU(nn.Parameter):
    """A weight whose model is sampled from as on a GPU: large windows, a spare prompt slot, rare looks at the rows."""
    is_cuda = True


class Graph(TorchDispatchMode):
    """A CUDA graph on a CPU: undoes what it records, and replays the operations on the memory of that time."""
    records = replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.before += [(x, x.clone()) for x, argument in zip(args, function._schema.arguments)
                        if argument.alias_info and argument.alias_info.is_write]
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    @classmethod
    @contextlib.contextmanager
    def record(cls, graph: "Graph"):
        with graph:
            yield
        cls.records += 1
        for x, old in reversed(graph.before):
            x.copy_(old)

    def replay(self) -> None:
        Graph.replays += 1
        assert Graph.replays < 5000, "no row finishes"
        for function, args, kwargs, out in self.operations:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            news = tree_leaves(function(*args, **kwargs))
            for old, new in zip(tree_leaves(out), news, strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Let `generate` record and replay the decoding steps of a model_on_gpu."""
    decode, steps = Batch.decode, {}
    for name, fake in dict(CUDAGraph=Graph, graph=Graph.record, stream=lambda stream: contextlib.nullcontext(),
                           Stream=MagicMock, current_stream=MagicMock).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Graph, "records", 0)
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Batch, "decode", lambda self, step, share: decode(
        self, steps.setdefault(self, recorded(self)) if self.model.lm_head.weight.is_cuda else step, share))


def model_on_gpu(**overrides) -> Llama:
    model = tiny_model(**overrides)
    model.lm_head.weight = ClaimsToBeOnGPU(model.lm_head.weight.detach())
    return model


@pytest.mark.parametrize("changes", [{}, dict(batch_rows=12), dict(batch_rows=12, temperature=0),
                                     dict(batch_rows=12, top_p=0.9, top_k=12)], ids=str)
def test_replayed_steps_give_the_same_responses(graphs, changes):
    """A graph works on the memory that it was recorded with. So a step may move nothing, and whatever moves between
    two steps must have it recorded anew; which takes longer than a step, and must stay rarer."""
    expected = some_responses(tiny_model(), some_prompts(), **changes)
    assert some_responses(model_on_gpu(), some_prompts(), cache_tokens=10**5, **changes) == expected
    assert 1 <= Graph.records < Graph.replays


def test_replayed_steps_in_windows_that_grow(graphs):
    """Of the prompts and of the rows' own tokens, with rows taken over in between."""
    prompts, options = random_prompts(20, [5, 130, 3, 100, 9, 140]), dict(max_new_tokens=140, batch_rows=9)
    shape = dict(max_position_embeddings=512, vocab_size=200)  # EOS is rare
    expected = some_responses(tiny_model(**shape), prompts, **options)
    assert some_responses(model_on_gpu(**shape), prompts, cache_tokens=10**5, **options) == expected
    assert Graph.records >= 3


@pytest.mark.parametrize("drawing", [dict(temperature=0, top_p=1, top_k=0), dict(temperature=1, top_p=1, top_k=0),
                                     dict(temperature=1, top_p=0.9, top_k=5)], ids=str)
def test_a_decoding_step_reads_no_value(monkeypatch, drawing):
    """It would make the CPU wait for the GPU, and cannot be recorded. Tensors on the device "meta" have no values."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know this device
    batch = Batch(tiny_model().to("meta"), 10, 4, SAMPLES, 20, 12, 10**5, eos_ids=(EOS,), seed=0, **drawing)
    batch.cache.look_at(16)
    batch.cache.prompts.look_at(16)
    batch.step()


# --- drawing a token ---------------------------------------------------------------------------------

def slow_distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then the k best, then the smallest set of the best that holds top_p; renormalised."""
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


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 0, 1.0), (1.0, 4, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.6), (0.8, 5, 0.7),
    (2.0, 50, 0.95), (1.0, 90, 0.8)])
@pytest.mark.parametrize("vocabulary", [10, 150])
def test_draws_follow_the_distribution(vocabulary, temperature, top_k, top_p):
    """Chi-square against the definition: temperature multiplied instead of divided, top_p of the wrong end, or a
    block's share, the rest of the random number or the padding of the last block wrong give p far below 1e-6."""
    row = (1.5 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))).tolist()
    row[sample.BLOCK:2 * sample.BLOCK] = [-math.inf] * len(row[sample.BLOCK:2 * sample.BLOCK])  # no draw in this block
    n = 300 * vocabulary
    tokens = sample_next_token(torch.tensor(row).expand(n, -1), uniforms(11, [1], 1, n)[0], temperature, top_p, top_k)
    expected = slow_distribution(row, temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=vocabulary).tolist()
    assert len(counts) == vocabulary and not any(count for count, p in zip(counts, expected) if p == 0)
    if sum(p > 0 for p in expected) > 1:
        assert chi_square_p(counts, [n * p for p in expected]) > P_FALSE_ALARM


def test_generated_pairs_of_tokens_follow_the_model():
    """Chi-square of the first two tokens of 6,000 samples against the model's own joint probabilities: one random
    number used for both steps, or for two samples, keeps each token's frequencies and ruins those of pairs."""
    model, prompt, n = tiny_model(vocab_size=9, sharpness=0.9), [4, 7, 3], 6000
    [samples] = generate(model, [prompt], num_samples=n, max_new_tokens=2, eos_ids=(99,), seed=5)
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)
        second = model(torch.tensor([prompt + [a] for a in range(9)]))[:, -1].double().softmax(-1)
    pairs = torch.tensor([response.ids for response in samples]) @ torch.tensor([9, 1])
    counts = torch.bincount(pairs, minlength=81).tolist()
    assert chi_square_p(counts, (first[:, None] * second * n).flatten().tolist()) > P_FALSE_ALARM


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (0, 0.5)])
def test_a_token_of_probability_zero_is_never_drawn(top_k, top_p):
    """At u = 0 a search from the wrong side finds the first token even if it cannot occur; at the other end rounding
    of the sum finds an index past the vocabulary; and with weights of 1 and 1e-14 in two blocks, the rest of the random
    number in the second is below 0."""
    generator, rows = torch.Generator().manual_seed(0), []
    for size in [40, 200] * 30:
        logits = 5 * torch.randn(size, generator=generator)
        logits[:7], logits[20], logits[33:] = -math.inf, -math.inf, -math.inf
        logits[150:180] = 0.0
        rows.append(logits)
    rows.append(torch.tensor([0.0] * sample.BLOCK + [-math.inf] * 5 + [math.log(1e-14)] + [-math.inf] * 58))
    for logits, u in itertools.product(rows, (0.0, 1e-300, 0.5, 1 - 2**-53)):
        uniform = torch.tensor([u], dtype=torch.float64)
        token = int(sample_next_token(logits[None], uniform, 1.0, top_p, top_k))
        assert 0 <= token < len(logits) and logits[token] > -math.inf


# --- the random numbers ------------------------------------------------------------------------------

def test_a_number_is_a_function_of_seed_prompt_sample_and_step():
    """Of prompts as lists: the same tokens in another order, or digits that read alike, are other prompts. More samples
    or longer responses change no number."""
    prompts = [[5, 6], [6, 5], [5, 6, 6], [56], [1, 23], [12, 3], [1, 2, 3], [1], [1, 1]]
    assert len({float(uniforms(0, prompt, 1, 1)) for prompt in prompts}) == len(prompts)
    large = 2**56 - 1  # a seed as infra.run.derive_seed gives them
    many = uniforms(large, [5, 6], 8, 30)
    assert torch.equal(uniforms(large, [5, 6], 3, 10), many[:3, :10])
    assert torch.equal(uniforms(large, [5, 6], 8, 30), many)
    assert not torch.isin(uniforms(large - 1, [5, 6], 8, 30), many).any()


def test_uniforms_are_uniform_and_none_is_used_twice():
    """Among 2 * 72,000 numbers of 53 bits a true coincidence has a chance of 1e-6. Counters that are added up rather
    than mixed make (question 1, sample 0) draw what (0, 1) draws."""
    u = torch.stack([uniforms(seed, [1, question], 40, 30) for seed in (0, 1) for question in range(60)])
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert u.unique().numel() == u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())
    for bins in ((u * 64).long(), (u * 2**53).long() % 64):  # the highest bits and the lowest
        counts = torch.bincount(bins.flatten(), minlength=64).tolist()
        assert chi_square_p(counts, [u.numel() / 64] * 64) > P_FALSE_ALARM
