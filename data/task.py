"""What is asked, in which form, and what counts as the gold response: the flags about data, and what follows."""
import os
from dataclasses import dataclass
from pathlib import Path

import data
from data import toy
from data.chat import CHATS
from data.prompts import (ANSWER_FORMATS, PROMPTS, encode_prompt, encode_solution, end_ids, gold_text, needs_examples,
                          prompt_format, prompt_text, template_of)
from infra import InputError
from infra.config import Options, option
from rewards import OWN_FORMAT, require_math_verify


def prompt_option(default: str):
    return option(default, f"prompt template: {', '.join(PROMPTS)}; or your own: a text file with {{question}}")


def check_system(chat: str, system: str) -> None:
    if system and not chat:
        raise ValueError(f"--system {system}: only a chat has a system message; give --chat")


@dataclass(frozen=True)
class TaskOptions(Options):
    task: str = option("", f"data set: {', '.join(data.TASKS)}; or your own: a file of records, or a folder with "
                       "train.jsonl, dev.jsonl and test.jsonl (see docs/models-and-data.md)", group="data")
    answer: str = option("", f"kind of your own data's answers: {', '.join(data.ANSWERS)}; empty: letter where there "
                         "are choices, else number", ("", *data.ANSWERS))
    path: str = option("", "folder with the data set's files; empty: downloads/TASK, where `make data` puts them")
    source: str = option("publisher", "whose files: publisher or reft", data.SOURCES)
    toy_steps: tuple[int, ...] = option(toy.DEPTHS, "steps that a question of the toy world takes, drawn from these",
                                         low=1, high=toy.MAX_STEPS)
    toy_gold: float = option(0.0, "share of the toy world's gold steps that are written inside the next one", low=0,
                             high=1)
    prompt: str = prompt_option("plain")
    chat: str = option("", f"template of a chat model, {', '.join(filter(None, CHATS))}; the prompt is the user's "
                       "message", CHATS)
    system: str = option("", "system message of the chat; empty: none, or the template's own")
    answer_format: str = option("", f"how an answer is marked: {', '.join(ANSWER_FORMATS)}; empty: as the prompt asks, "
                                "or else in the data set's own way", ("", *ANSWER_FORMATS))

    def __post_init__(self) -> None:
        super().__post_init__()
        template_of(self.prompt)
        check_system(self.chat, self.system)
        own = self.task not in ("", *data.TASKS)
        if own and not os.path.exists(self.task):
            raise ValueError(f"--task {self.task}: choose from {', '.join(data.TASKS)}, or name a file or a folder of "
                             "your own that exists")
        if self.answer and not own:
            raise ValueError(f"--answer {self.answer} is for a --task of your own, a file or a folder")
        if (self.path or self.source != "publisher") and self.task not in data.TASKS[1:]:
            raise ValueError(f"--path and --source need the --task whose files they name, one of "
                             f"{', '.join(data.TASKS[1:])}; your own data is named by --task FILE or FOLDER")
        if self.path and not os.path.isdir(self.path):
            raise ValueError(f"--path {self.path}: there is no such folder; your own data is named by --task")
        if own and not self.answer:
            object.__setattr__(self, "answer", "letter" if data.has_choices(self.task) else "number")
        if self.answer == "python" and self.answer_format not in ("", "python"):
            raise ValueError(f"--answer_format {self.answer_format}: with --answer python, a response is a program")

    def own_files(self) -> dict[str, Path]:
        return super().own_files() | ({} if self.prompt in PROMPTS else {"prompt": Path(self.prompt)})

    @property
    def kind(self) -> str:
        """What the grader and the prompts go by: the data set or, for your own data, the kind of its answers."""
        return self.answer or self.task

    @property
    def marks(self) -> str:
        """The answer format in which gold solutions are written and responses are graded."""
        if self.answer == "python":
            return "python"
        return self.answer_format or prompt_format(self.prompt, self.kind) or OWN_FORMAT[self.kind]

    def problems(self, split: str, limit: int = 0) -> list[data.Problem]:
        """Load the first `limit` problems of a split (0: all). An empty split is an error."""
        if self.kind in ("math", "latex"):
            require_math_verify()
        source = "program" if self.kind in data.TASKS[1:] and self.marks == "python" else self.source
        problems = data.load_problems(self.task, split, self.path or None, source, self.toy_steps, self.toy_gold,
                                      self.answer)
        if not problems:
            raise InputError(f"{self.task} has no {split} problems")
        return problems[:limit or None]

    def held_out(self) -> list[data.Problem]:
        """Load the dev and test questions that a method is measured on."""
        return [problem for split in ("dev", "test") for problem in self.problems(split, self.eval_questions)]

    def prompt_text(self, problem: data.Problem) -> str:
        solved = []
        if needs_examples(self.prompt, self.kind):
            solved = [example for example in data.examples(self.task, self.path or None, self.answer)
                      if example.id != problem.id][:4]
        return prompt_text(self.prompt, self.kind, problem.question, solved)

    def prompt_ids(self, tokenizer, problem: data.Problem) -> list[int]:
        return encode_prompt(tokenizer, self.prompt_text(problem), self.chat, self.system)

    def end_ids(self, tokenizer) -> tuple[int, ...]:
        return end_ids(tokenizer, self.chat, self.system)

    def solution_ids(self, tokenizer, problem: data.Problem, text: str) -> list[int]:
        """Encode a written solution as a response of the model's own, up to what ends it."""
        return encode_solution(tokenizer, text, self.prompt_text(problem), self.chat, self.system)

    def gold_ids(self, tokenizer, problem: data.Problem) -> list[int] | None:
        """Encode the gold solution in the model's answer format; None if there is none."""
        text = gold_text(problem, self.marks)
        return self.solution_ids(tokenizer, problem, text) if text else None
