"""Reranking: a reward model picks one of k responses (ReFT, arXiv 2401.08967, section 4.3 and App. B).

    1. label samples of the warm-up model on training questions by their verdicts; equal ones count once
    2. put a 2-way head in the place of a model's LM head and train it, from the last token of a response,
       to tell right from wrong
    3. of the k responses that a policy gives to a test question, take the one with the highest P(right)
       among those that give an answer at all

Both inputs are files of samples that evaluate.py writes. Voting over the same k responses and the
accuracy of a single one stand beside the result. Left out: choosing the reward model's epoch (the
authors choose it on test).

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

from checkpoint import drop, file_hash, weights_hash
from evaluate import Answered, read_answered, summarize_samples, wilson
from infra.experiment import derive_seed, open_run, option, parse_config, run_script, write_json, write_jsonl
from model import Llama, pad
from infra.parallel import computed, device, missing
from train import Example, TrainOptions, autocast, fit, load_trained, micro_batches


@dataclass(frozen=True)
class Config(TrainOptions):
    """Defaults are the paper's values."""
    model: str = option("", "directory of the model that the reward model starts from")
    labelled: str = option("", "file of samples of training questions, the warm-up model's")
    candidates: str = option("", "file of k samples of each test question, the policy's")
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of batch order")
    lr: float = option(1e-6, "peak learning rate of AdamW")
    batch_size: int = option(48, "responses of one optimizer step (24 in the authors' code)")
    epochs: int = option(3, "passes over the labelled responses")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "labelled", "candidates"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: give one; rerank.py --help says what it is")


PRESETS = {"toy": dict(lr=1e-4, lr_schedule="linear", warmup_steps=10, batch_size=32)}


@dataclass(frozen=True)
class Labelled(Example):
    """A response and whether it is right."""
    right: bool


def label(answered: list[Answered]) -> list[Labelled]:
    """Step 1. A question's equal responses count once."""
    return [Labelled(question.id, question.prompt_ids, list(ids), right) for question in answered
            for ids, right in {tuple(s.ids): s.right for s in question.samples}.items()]


class RewardModel(nn.Module):
    """Step 2: a Llama that says (wrong, right) where it said which token comes next; its head begins at zero."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model.model
        self.head = nn.Linear(model.config.hidden_size, 2, bias=False, device=model.lm_head.weight.device)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T) -> (B, 2) float32 logits of wrong and right, from the last token of each response."""
        last = self.model(tokens, None)[torch.arange(len(tokens)), lengths - 1]  # (B, D)
        with torch.autocast(tokens.device.type, enabled=False):  # in bfloat16 close scores would be ties
            return self.head(last.float())


def judgements(model: RewardModel, responses: list[Example]) -> Tensor:
    return model(*pad([r.prompt + r.response for r in responses], device()))


def classification_loss(model: RewardModel, responses: list[Labelled]) -> dict[str, Tensor]:
    logits = judgements(model, responses)
    labels = torch.tensor([int(r.right) for r in responses], device=logits.device)
    return {"loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(-1) == labels).float()}


@torch.no_grad()
def scores(model: RewardModel, responses: list[Example], config: Config) -> list[float]:
    """P(right) of each response."""
    def score(batch: list[int]) -> list[tuple[int, float]]:
        with autocast(config.precision):
            right = judgements(model, [responses[i] for i in batch]).softmax(-1)[:, 1]
        return list(zip(batch, right.tolist()))

    batches = micro_batches(range(len(responses)), lambda i: responses[i].tokens, config.micro_batch_tokens)
    return [right for _, right in sorted(row for batch in computed(batches, score) for row in batch)]


def best(question: Answered, score: list[float]) -> int:
    """Step 3: the sample with the highest score among those that give an answer; the first of equals."""
    answers = [i for i, sample in enumerate(question.samples) if sample.answer is not None]
    return max(answers or range(len(score)), key=lambda i: (score[i], -i))


def main() -> None:
    config = parse_config(Config, PRESETS, __doc__)
    train, answered = read_answered(Path(config.labelled))
    test, candidates = read_answered(Path(config.candidates))
    labelled = label(answered)
    if train.get("split") != "train" or any(train[name] != test[name] for name in ("task", "marks")):
        raise SystemExit(f"{config.labelled} has samples of {train['task']} {train.get('split')} questions and "
                         f"{config.candidates} of {test['task']}: the first must be train, of the same task")
    if not labelled or not candidates:
        raise SystemExit(f"{config.labelled} or {config.candidates} has no samples")
    shares = fmean(response.right for response in labelled)
    if shares in (0.0, 1.0):
        raise SystemExit(f"{config.labelled}: all responses are {'right' if shares else 'wrong'}, and there "
                         "is nothing to tell apart")
    model = load_trained(config.model, config, RewardModel)
    run = open_run(config, config.run_dir, weights=weights_hash(model), labelled_hash=file_hash(config.labelled),
                   candidates_hash=file_hash(config.candidates))
    if not missing(run / "results.json"):
        print(f"all of it is in {run}, from an earlier call")
        return
    print(f"{len(labelled):,} labelled responses, {shares:.0%} of them right")
    records = fit(model, labelled, classification_loss, lambda response: response.tokens, config,
                  derive_seed(config.seed, "rerank"), "reward model", run)
    write_jsonl(run / "train.jsonl", records)

    flat = iter(scores(model, [Example(q.id, q.prompt_ids, s.ids) for q in candidates for s in q.samples],
                       config))
    by_question = [[next(flat) for _ in question.samples] for question in candidates]
    picked = [best(question, score) for question, score in zip(candidates, by_question)]
    write_jsonl(run / "picked.jsonl", [{"id": q.id, "picked": i, "scores": score}
                                       for q, i, score in zip(candidates, picked, by_question)])
    right = sum(question.samples[i].right for question, i in zip(candidates, picked))
    k, n = len(candidates[0].samples), len(candidates)
    row = {"name": f"best of {k} by reward", "split": test.get("split"), "n": n, "accuracy": right / n,
           "ci95": wilson(right, n), **summarize_samples(candidates, "")}
    write_json(run / "results.json", [row])
    drop(run / "state")
    print(f"one sample {row['pass@1']:.1%}, vote of {k} {row[f'maj@{k}']:.1%}, best of {k} by reward "
          f"{row['accuracy']:.1%}, of {n} questions; all of it in {run}")


if __name__ == "__main__":
    run_script(main)
