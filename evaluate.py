"""Questions in, graded responses out, for training and for testing; and the measures computed from them.

Nothing here chooses anything: a method that picks a checkpoint or a setting does so on dev, and says so.

    python evaluate.py --preset toy --model runs/base-s0/model    # see tools/evaluation.py
"""
import os
import runpy
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import data
from checkpoint import load_sampler, model_hash
from data.own import reward_all
from data.task import TaskOptions
from data.tokenizer import load_tokenizer
from grading.counts import majority, pass_at_k, wilson, wilson_of_mean
from infra import InputError
from infra.config import option
from infra.hardware import ComputeOptions, cache_budget
from infra.parallel import by_first, collected, dealt, gather, rank, world
from infra.progress import REMEDIES, Progress, print_summary
from infra.run import Pieces, hash_of, once, read_records, write_json
from model import Llama
from rewards import grade_all
from sample import Response, generate

PIECE = 2 * 10**10  # responses times parameters that a CPU samples together: 148 responses of a model with 135 M


@dataclass(frozen=True)
class Sample:
    """A response with its text, its verdict (see rewards.grade) and the answer it gave, if any."""
    ids: list[int]
    finished: bool
    text: str
    verdict: str
    answer: str | None
    score: float | None = None  # by a reward of your own

    @property
    def right(self) -> bool:
        return self.verdict == "correct"


@dataclass(frozen=True)
class Answered:
    """A question's prompt, its right answer and its graded samples."""
    id: str
    prompt: str
    prompt_ids: list[int]
    gold: str
    samples: list[Sample]
    question: str = ""  # as in the data set, for readers of the file: a prompt may also hold examples

    def __post_init__(self) -> None:  # a record read from a file has dictionaries for samples
        samples = [Sample(**sample) if isinstance(sample, dict) else sample for sample in self.samples]
        object.__setattr__(self, "samples", samples)


@dataclass(frozen=True)
class SampleOptions(TaskOptions, ComputeOptions):
    """How responses are sampled; methods inherit these fields."""
    max_new_tokens: int = option(512, "longest response; a truncated one is graded as it stands", low=1,
                                 group="sampling")
    batch_rows: int = option(1024, "responses that one sampler generates at a time; affects only speed and memory",
                             low=1, free=True, group="engine")
    tensor_parallel: int = option(1, "ranks that hold one sampling model together, where it is too large for one "
                                  "device", low=1, free=True)
    reward: str = option("", "FILE.py:function of your own, (text, problem) -> number or verdict: it judges responses "
                         "to train on, in place of the task's grader, which still measures dev and test")
    right_at: float = option(1.0, "a response with this reward or more is right")

    def __post_init__(self) -> None:
        super().__post_init__()
        file, colon, name = self.reward.rpartition(":")
        if self.reward and not (colon and file.endswith(".py") and os.path.isfile(file) and name.isidentifier()):
            raise ValueError(f"--reward {self.reward}: name a file that exists and a function in it, FILE.py:function")
        if self.right_at != 1 and not self.reward:
            raise ValueError(f"--right_at {self.right_at} is for a --reward of your own")

    def own_files(self) -> dict[str, Path]:
        return super().own_files() | ({"reward": Path(self.reward.rpartition(":")[0])} if self.reward else {})

    @property
    def reward_hash(self) -> str:
        """All that a reward's verdicts depend on; "" without one."""
        file, _, name = self.reward.rpartition(":")
        return hash_of(Path(file), name, self.right_at) if file else ""


# --- sampling and grading --------------------------------------------------------------------------

def answer(model: Llama, tokenizer, problems: list[data.Problem], options: SampleOptions, *, num_samples: int = 1,
           temperature: float = 0.0, seed: int = 0, label: str = "", reward: bool = False,
           pieces: Pieces | None = None) -> list[Answered]:
    """Sample num_samples responses to each problem and grade them; every rank returns all answers.

    An empty label hides the progress bar. reward: grade with --reward, if one is given. pieces: keeps what is
    finished if sampling is cut short.
    """
    prompts = [options.prompt_ids(tokenizer, problem) for problem in problems]
    asked = [options.prompt_text(problem) for problem in problems]
    responses = sample_all(model, prompts, options, options.end_ids(tokenizer), num_samples, temperature, seed, label,
                           pieces or Pieces())
    texts = [[tokenizer.decode(response.ids) for response in group] for group in responses]
    grades = grade_all(texts, [problem.answer for problem in problems], options.kind, options.marks, asked)
    if reward and options.reward:  # the answers stay those that the graders read
        judged = reward_all(texts, problems, options.reward, options.right_at)
        grades = [[replace(new, answer=old.answer) for new, old in zip(*groups)] for groups in zip(judged, grades)]
    samples = [[Sample(response.ids, response.finished, text, *astuple(verdict))
                for response, text, verdict in zip(*groups)] for groups in zip(responses, texts, grades)]
    return [Answered(problem.id, text, prompt, problem.answer, group, problem.question)
            for problem, text, prompt, group in zip(problems, asked, prompts, samples)]


class Sampler:
    """A model directory, hashed and loaded when first needed, and only once for several files of answers."""

    def __init__(self, directory: str, options: SampleOptions) -> None:
        self.directory, self.options = directory, options

    @cached_property
    def weights(self) -> str:
        return model_hash(self.directory)

    @cached_property
    def loaded(self) -> tuple:
        model = load_sampler(self.directory, self.options.precision, self.options.tensor_parallel)
        return model, load_tokenizer(self.directory)


def answer_once(path: Path, sampler: Sampler, problems: list[data.Problem], *, split: str, num_samples: int,
                temperature: float, seed: int, label: str, reward: bool = False) -> list[Answered]:
    """Answer problems, unless the file `path` already holds the result.

    The file begins with its settings and a SHA-256 of these and the samples. If sampling is cut short, what
    was finished is kept in pieces, and the same call samples the rest. InputError if no response to train on has
    finished.
    """
    options = sampler.options

    def make() -> list[Answered]:
        return answer(*sampler.loaded, problems, options, num_samples=num_samples, temperature=temperature, seed=seed,
                      label=label, reward=reward, pieces=pieces)

    defaults = {field.name: field.default for field in fields(SampleOptions) if not field.metadata["free"]}
    settings = {name: getattr(options, name) for name in defaults}
    settings |= dict(marks=options.marks, split=split, weights=sampler.weights, num_samples=num_samples,
                     temperature=temperature, seed=seed, reward_hash=options.reward_hash if reward else "")
    pieces = Pieces(path, settings, problems)
    answered = once(path, make, Answered, settings, defaults)
    if split == "train" and not any(sample.finished for question in answered for sample in question.samples):
        raise InputError(f"{path}: none of {len(answered) * num_samples} responses ended within --max_new_tokens "
                         f"{options.max_new_tokens}: {REMEDIES['unfinished']}")
    return answered


def sample_all(model: Llama, prompts: list[list[int]], options: SampleOptions, eos_ids: Collection[int],
               num_samples: int, temperature: float, seed: int, label: str, pieces: Pieces) -> list[list[Response]]:
    """Sample responses to each prompt; groups of prompts of similar length are distributed over the samplers.

    A finished group is a piece. How prompts are grouped does not depend on what is finished, nor on the number of
    ranks: rounding depends on a batch's other rows, so other groups could give other responses.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # about 64 groups, whatever the number of ranks; in one that is larger than a batch, new responses take over the
    # rows of finished ones
    size = max(options.batch_rows // num_samples, len(order) // 64)
    if model.lm_head.weight.device.type == "cpu":  # bounds a piece to minutes; small groups cost little
        size = min(size, max(32, PIECE // sum(p.numel() for p in model.parameters())) // num_samples)
    size = max(1, size)
    groups, samplers = [order[i:i + size] for i in range(0, len(order), size)], world() // options.tensor_parallel
    if len(groups) < samplers and rank() == 0:
        warnings.warn(f"{len(prompts) * num_samples} responses make {len(groups)} groups of --batch_rows "
                      f"{options.batch_rows}, so {samplers - len(groups)} of {samplers} samplers are idle: lower "
                      "--batch_rows", stacklevel=2)
    before = {i: [Response(*one) for one in responses] for piece in pieces.read() for i, responses in piece}
    groups = [left for group in groups if (left := [i for i in group if i not in before])]
    mine, found = [group for group, _ in dealt(groups, samplers)], []
    cache_tokens = min(gather(cache_budget(model)))  # ranks that hold one model together must agree
    with Progress(label, (len(before) + sum(map(len, mine))) * num_samples, "sample", len(before) * num_samples) as bar:
        for group in mine:
            responses = generate(model, [prompts[i] for i in group], num_samples=num_samples,
                                 max_new_tokens=options.max_new_tokens, temperature=temperature, eos_ids=eos_ids,
                                 seed=seed, batch_rows=options.batch_rows, cache_tokens=cache_tokens,
                                 progress=bar.advance)
            found.append(list(zip(group, responses)))
            if rank() % options.tensor_parallel == 0:
                pieces.add([(i, [astuple(one) for one in of_prompt]) for i, of_prompt in found[-1]])
    by_prompt = before | dict(pair for group in collected(found, samplers) for pair in group)
    return [by_prompt[i] for i in range(len(prompts))]


# --- counting --------------------------------------------------------------------------------------

def summarize(answered: list[Answered], task: str) -> dict:
    """Count over each question's first sample (accuracy, verdicts, lengths), and over all of several (pass@k, maj@k).

    Samples of one question are not independent, so the interval of pass@1 is that of a mean over questions.
    InputError without questions.
    """
    if not answered or not all(q.samples for q in answered):
        raise InputError("nothing to measure: there is no question, or one without a sample")
    first, n, k = [q.samples[0] for q in answered], len(answered), min(len(q.samples) for q in answered)
    right, verdicts = sum(sample.right for sample in first), Counter(sample.verdict for sample in first)
    found = {"n": n, "accuracy": right / n, "ci95": wilson(right, n),
             "verdicts": {name: verdicts[name] / n for name in sorted(verdicts)},
             "finished": fmean(sample.finished for sample in first), "length": fmean(len(s.ids) for s in first),
             "empty": fmean(not sample.text.strip() for sample in first),
             "tags": by_tags([(q, q.samples[0]) for q in answered], task)}
    if k == 1:
        return found
    rights = [[sample.right for sample in q.samples] for q in answered]
    found |= {f"pass@{2 ** i}": fmean(pass_at_k(len(right), sum(right), 2 ** i) for right in rights)
              for i in range(k.bit_length())}
    return found | {"pass@1_ci95": wilson_of_mean([fmean(right) for right in rights]),
                    f"maj@{k}": fmean(majority([(s.answer, s.right) for s in q.samples]) for q in answered),
                    "num_samples": k, "sampled_tags": by_tags([(q, s) for q in answered for s in q.samples], task)}


def by_tags(samples: list[tuple[Answered, Sample]], task: str) -> dict:
    """(question, sample) -> {"depth": {"3": {"share": 0.2, "accuracy": 0.47}, ...}, ...}."""
    found: dict[str, dict[str, list[bool]]] = {}
    for question, sample in samples:
        for name, value in data.tags(task, question.question, sample.text).items():
            found.setdefault(name, {}).setdefault(value, []).append(sample.right)
    return {name: {value: {"share": len(right) / len(samples), "accuracy": fmean(right)}
                   for value, right in sorted(values.items())} for name, values in sorted(found.items())}


# --- a model's record ------------------------------------------------------------------------------

def evaluate_model(name: str, iteration: int, directory: str, config, folder: Path,
                   temperature: float = 1.0, **notes) -> list[dict]:
    """Measure a model: a row for dev and one for test, both greedy; test also with eval_samples at a temperature.

    notes are added to both rows.
    """
    sampler = Sampler(directory, config)

    def measured(file: str, split: str, num_samples: int, temperature: float) -> dict:
        answered = answer_once(folder / file, sampler, config.problems(split, config.eval_questions), split=split,
                               num_samples=num_samples, temperature=temperature, seed=config.seed,
                               label=f"{name} {split}")
        found = summarize(answered, config.task)
        how = f", the first of {num_samples} samples at temperature {temperature:g}" if num_samples > 1 else ""
        print_summary(f"{name} {split}{how}", found)
        return found

    rows = [{"name": name, "iteration": iteration, "split": split, **measured(file, split, 1, 0.0), **notes}
            for split, file in (("dev", "eval_dev.jsonl"), ("test", "eval_samples.jsonl"))]
    before = folder / "eval_sampled.jsonl"  # what was sampled stays in the record
    k = config.eval_samples or by_first(before.exists) and read_records(before, Answered)[0]["num_samples"]
    if k:  # pass@k and maj@k are added; accuracy stays the greedy one
        rows[-1] = measured(before.name, "test", k, temperature) | rows[-1]
    write_json(folder / "eval.json", rows)
    return rows


if __name__ == "__main__":
    runpy.run_module("tools.evaluation", run_name="__main__")
