"""What is asked, in which form, and what counts as the gold response: the flags about data, and what follows."""
from dataclasses import dataclass
from pathlib import Path

import data
from data import toy
from data.prompts import (ANSWER_FORMATS, CHATS, PROMPTS, encode_prompt, encode_solution, gold_text, needs_examples,
                          prompt_format, prompt_text)
from infra.experiment import one_of, option, read_json
from rewards import OWN_FORMAT, require_math_verify

ASKED_BY = ("prompt", "chat", "answer_format")


@dataclass(frozen=True)
class TaskOptions:
    """What is asked and in which form; drivers inherit these fields."""
    task: str = option("toy", f"data set: {', '.join(data.TASKS)}")
    path: str = option("", "folder with the data set's files, or one file; empty: downloads/TASK, "
                       "where `make data` puts them")
    source: str = option("publisher", "whose files: publisher or reft")
    toy_steps: tuple[int, ...] = option((2, 3), "relations per story of the toy world")
    toy_world: str = option("ways", f"which toy world: {', '.join(toy.WORLDS)} (see data/toy.py)")
    prompt: str = option("plain", f"prompt template: {', '.join(PROMPTS)}")
    chat: str = option("", "wrap the prompt as this chat model expects it: llama2; empty: do not")
    answer_format: str = option("", f"how an answer is marked: {', '.join(ANSWER_FORMATS)}; empty: as "
                                "the prompt asks, or else the data set's own way")

    def __post_init__(self) -> None:
        one_of(self, task=data.TASKS, source=data.SOURCES, toy_world=toy.WORLDS, prompt=PROMPTS, chat=CHATS,
               answer_format=("", *ANSWER_FORMATS))

    @property
    def marks(self) -> str:
        """The answer format that responses are graded by and gold solutions are written in."""
        return self.answer_format or prompt_format(self.prompt, self.task) or OWN_FORMAT[self.task]

    def refuse_one_file(self) -> None:
        """For drivers that use several splits: one file for all would test on what was trained on."""
        if Path(self.path).is_file():
            raise ValueError(f"--path {self.path}: give the folder with the data set's files, since train, "
                             "dev and test are different files")

    def problems(self, split: str, limit: int = 0) -> list[data.Problem]:
        """The first `limit` problems of a split; 0: all. An empty split is an error."""
        if self.task == "math":
            require_math_verify()
        source = "program" if self.marks == "python" and self.task != "toy" else self.source
        problems = data.load_problems(self.task, split, self.path or None, source, self.toy_steps,
                                      self.toy_world)
        if not problems:
            raise SystemExit(f"{self.task} has no {split} problems")
        return problems[:limit or None]

    def prompt_text(self, problem: data.Problem) -> str:
        solved = []
        if needs_examples(self.prompt, self.task):
            solved = [example for example in data.examples(self.task, self.path or None)
                      if example.id != problem.id][:4]
        return prompt_text(self.prompt, self.task, problem.question, solved, self.chat)

    def prompt_ids(self, tokenizer, problem: data.Problem) -> list[int]:
        return encode_prompt(tokenizer, self.prompt_text(problem))

    def gold_ids(self, tokenizer, problem: data.Problem) -> list[int] | None:
        """The gold solution as a response of the model's own: in its answer format, ending in EOS."""
        text = gold_text(problem, self.marks)
        return encode_solution(tokenizer, text, self.prompt_text(problem)) if text else None

    @property
    def asked(self) -> dict:
        """How a model is asked, for asked.json in its directory."""
        return {name: getattr(self, name) for name in ASKED_BY}

    def compare(self, directory: str | Path) -> None:
        """Warn if a model was trained to be asked in another way."""
        path = Path(directory) / "asked.json"
        before = read_json(path) if path.is_file() else {}
        other = [f"--{name} {before[name] or repr('')}" for name in ASKED_BY
                 if name in before and before[name] != getattr(self, name)]
        if other:
            print(f"warning: {directory} was trained with {' '.join(other)}, and is asked otherwise here")
