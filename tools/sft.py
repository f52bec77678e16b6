"""Fine-tuning on gold solutions (SFT): of a model on a task, or of a fresh model on the toy world's corpus.

    python train.py --model DIR --task gsm8k --run_dir runs/sft    # the same as python -m tools.sft
    python train.py --preset base --run_dir runs/base-s0           # the toy world's base model
"""
from dataclasses import dataclass

import data
from checkpoint import model_hash
from data import toy
from data.fresh import HEADS, fresh_model
from data.check import check_tokens
from data.task import TaskOptions
from data.tokenizer import load_tokenizer
from infra import InputError
from infra.config import option, parse_config
from infra.run import hash_of, open_run, run_script
from model import Llama
from train import Example, TrainOptions, fit_sft, load_for_training, train_once


@dataclass(frozen=True)
class Config(TrainOptions, TaskOptions):
    model: str = option("", "model directory to start from; empty: fresh weights and a new tokenizer")
    run_dir: str = option("", "directory of this run; empty: runs/ and a name made of the flags")
    seed: int = option(0, "of fresh weights, batch order and the toy corpus", low=0, high=2**64 - 1)
    prompt_weight: float = option(0.0, "weight of a prompt token in the loss; a response token has 1", low=0)
    vocab_size: int = option(288, "tokens of a new tokenizer", low=1)
    hidden_size: int = option(128, f"width of a fresh model, for its {HEADS} heads", low=2 * HEADS)
    num_layers: int = option(3, "layers of a fresh model", low=1)
    max_positions: int = option(320, "longest sequence of a fresh model", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * HEADS):
            raise ValueError(f"--hidden_size {self.hidden_size}: must be a multiple of {2 * HEADS}, for {HEADS} "
                             "heads of even width")


BASE = dict(task="toy", lr=3e-3, lr_schedule="cosine", warmup_steps=200, batch_size=16, weight_decay=0.05,
            prompt_weight=0.1, nll_norm="token")


def main() -> None:
    config = parse_config(Config, {"base": BASE}, __doc__)
    if config.task == "toy" and not config.model:
        problems = [data.Problem(**row) for row in toy.corpus(config.seed, steps=config.toy_steps)]
    else:
        problems = config.problems("train")
    if not all(problem.solution for problem in problems):
        raise InputError(f"{config.task} has no gold solutions in these files to learn from")
    run = open_run(config, weights=model_hash(config.model) if config.model else "", problems=hash_of(*problems))

    def train() -> Llama:
        tokenizer, model = load_tokenizer(start), load_for_training(start, config)
        examples = [Example(p.id, config.prompt_ids(tokenizer, p), config.gold_ids(tokenizer, p)) for p in problems]
        check_tokens(start, model.config.vocab_size, (example.prompt + example.response for example in examples))
        fit_sft(model, examples, config, config.seed, run, config.prompt_weight)
        return model

    start = config.model or fresh_model(
        [f"{p.question} {p.solution}" for p in problems], run / "start", config.vocab_size, config.hidden_size,
        config.num_layers, config.max_positions, config.seed)
    print(f"{train_once(run, start, train)} is complete")


if __name__ == "__main__":
    run_script(main)
