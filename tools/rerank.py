"""Rerank: a reward model picks one of k responses (ReFT, arXiv 2401.08967, section 4.3 and App. B).

    1. label samples of the warm-up model on training questions by their verdicts; equal ones count once
    2. replace a model's LM head by a 2-way head, and train it to tell right from wrong at a response's last token
    3. of the k responses that a policy gives to a test question, take the one with the highest P(right) among those
       that give an answer at all

Both inputs are files of samples that evaluate.py writes. The result also has the vote over the same k responses and the
accuracy of a single one. Left out: choosing the reward model's epoch (the authors choose it on test).

    python evaluate.py --preset toy --model WARMUP --split train --num_samples 20 --temperature 1 --run_dir A
    python evaluate.py --preset toy --model POLICY --num_samples 20 --temperature 1 --run_dir B
    python -m tools.rerank --model POLICY --labelled A/eval_samples.jsonl --candidates B/eval_samples.jsonl
"""
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_config, model_hash
from data.check import check_tokens
from evaluate import Answered, summarize, wilson
from infra import InputError
from infra.config import option, parse_config
from infra.parallel import computed, device
from infra.run import derive_seed, hash_of, once, open_run, read_records, run_script, write_jsonl
from infra.state import drop_states
from model import Llama, pad
from train import Example, TrainOptions, autocast, fit, load_for_training, micro_batches


@dataclass(frozen=True)
class Config(TrainOptions):
    """Defaults are the paper's values."""
    model: str = option("", "directory of the model that the reward model starts from", required=True)
    labelled: str = option("", "file of samples of training questions, the warm-up model's", required=True)
    candidates: str = option("", "file of k samples of each test question, the policy's", required=True)
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of batch order", low=0, high=2**64 - 1)
    lr: float = option(1e-6, "peak learning rate of AdamW", above=0)
    batch_size: int = option(48, "responses of one optimizer step (24 in the authors' code)", low=1)
    epochs: int = option(3, "passes over the labelled responses", low=1)


PRESETS = {"toy": dict(lr=1e-4, lr_schedule="linear", warmup_steps=10, batch_size=32)}


@dataclass(frozen=True)
class Labelled(Example):
    """A response and whether it is right."""
    right: bool


def label(answered: list[Answered]) -> list[Labelled]:
    """Step 1. A question's equal responses count once, and those that are neither right nor wrong do not count."""
    return [Labelled(question.id, question.prompt_ids, list(ids), right) for question in answered
            for ids, right in {tuple(s.ids): s.right for s in question.samples
                                if s.verdict in ("correct", "wrong", "unparsed")}.items()]


class RewardModel(nn.Module):
    """Step 2: a Llama with two logits (wrong, right) in place of those of the next token; its head begins at zero."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model.model
        self.head = nn.Linear(model.config.hidden_size, 2, bias=False, device=model.lm_head.weight.device)
        nn.init.zeros_(self.head.weight)

    def forward(self, responses: list[Example]) -> Tensor:
        """B responses -> (B, 2) float32 logits of wrong and right, from the last token of each."""
        tokens, lengths = pad([r.prompt + r.response for r in responses], device())
        last = self.model(tokens)[torch.arange(len(tokens)), lengths - 1]  # (B, D)
        with torch.autocast(tokens.device.type, enabled=False):  # in bfloat16 close scores would be ties
            return self.head(last.float())


def classification_loss(model: RewardModel, responses: list[Labelled]) -> dict[str, Tensor]:
    logits = model(responses)
    labels = torch.tensor([int(r.right) for r in responses], device=logits.device)
    return {"loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(-1) == labels).float()}


@torch.no_grad()
def scores(model: RewardModel, responses: list[Example], config: Config) -> list[float]:
    """P(right) of each response."""
    def score(part: list[Example]) -> list[float]:
        with autocast(config.precision):
            return model(part).softmax(-1)[:, 1].tolist()

    parts = micro_batches(responses, config.micro_batch_tokens)
    found = {id(response): right for part, rights in zip(parts, computed(parts, score))
             for response, right in zip(part, rights)}
    return [found[id(response)] for response in responses]


def best(question: Answered, score: list[float]) -> int:
    """Step 3: the sample with the highest score among those that give an answer; the first of equals."""
    answers = [i for i, sample in enumerate(question.samples) if sample.answer is not None]
    return max(answers or range(len(score)), key=lambda i: score[i])


def read_inputs(config: Config) -> tuple[list[Labelled], list[Answered], str]:
    """Read what is learned from, the candidates and their split; refuse files that do not belong together."""
    train, answered = read_records(Path(config.labelled), Answered)
    test, candidates = read_records(Path(config.candidates), Answered)
    labelled = label(answered)
    if ((train.get("split"), test.get("split")) not in (("train", "dev"), ("train", "test"))
            or any(train.get(name) != test.get(name) for name in ("task", "marks"))):
        raise InputError(f"{config.labelled} has samples of {train.get('task')} {train.get('split')} questions and "
                         f"{config.candidates} of {test.get('task')} {test.get('split')}: the first must be train, the "
                         "second dev or test of the same task")
    if not candidates or len({response.right for response in labelled}) < 2:
        raise InputError(f"{config.candidates} has {len(candidates)} questions and {config.labelled} {len(labelled)} "
                         "responses: there must be right and wrong ones, or there is nothing to tell apart")
    return labelled, candidates, test["split"]


def rerank(labelled: list[Labelled], candidates: list[Answered], config: Config, run: Path) -> dict:
    """Steps 2 and 3: the figures of results.json."""
    model = load_for_training(config.model, config, RewardModel)
    fit(model, labelled, classification_loss, config, derive_seed(config.seed, "rerank"), run)
    flat = iter(scores(model, [Example(q.id, q.prompt_ids, s.ids) for q in candidates for s in q.samples], config))
    by_question = [[next(flat) for _ in question.samples] for question in candidates]
    picked = [best(question, score) for question, score in zip(candidates, by_question)]
    write_jsonl(run / "picked.jsonl", [{"id": question.id, "picked": i, "scores": score}
                                       for question, i, score in zip(candidates, picked, by_question)])
    right, n = sum(question.samples[i].right for question, i in zip(candidates, picked)), len(candidates)
    return {"n": n, "accuracy": right / n, "ci95": wilson(right, n)}


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    labelled, candidates, split = read_inputs(config)
    check_tokens(config.model, load_config(config.model).vocab_size, [
        *(response.prompt + response.response for response in labelled),
        *(q.prompt_ids + s.ids for q in candidates for s in q.samples)])
    print(f"{len(labelled):,} labelled responses, {fmean(response.right for response in labelled):.0%} of them right")
    run = open_run(config, weights=model_hash(config.model), labelled_hash=hash_of(Path(config.labelled)),
                   candidates_hash=hash_of(Path(config.candidates)))
    k = len(candidates[0].samples)
    of_samples = {name: value for name, value in summarize(candidates, "").items()
                  if name.startswith(("pass@", "maj@", "num_samples", "sampled_tags"))}
    [row] = once(run / "results.json", lambda: [{"name": f"best of {k} by reward", "split": split, **of_samples,
                                                 **rerank(labelled, candidates, config, run)}])
    drop_states(run)
    others = ", ".join(f"{name} {value:.1%}" for name, value in row.items() if name in ("pass@1", f"maj@{k}"))
    print(f"best of {k} by reward {row['accuracy']:.1%}, {others}, of {row['n']} questions; everything is in {run}")


if __name__ == "__main__":
    run_script(main)
