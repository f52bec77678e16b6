"""What is asked, in which form, and what counts as the gold response: the flags about data, and what follows."""
from dataclasses import dataclass

import data
from data import toy
from data.prompts import (ANSWER_FORMATS, CHATS, PROMPTS, encode_prompt, encode_solution, gold_text, needs_examples,
                          prompt_format, prompt_text)
from infra.config import Options, option
from rewards import OWN_FORMAT, require_math_verify


@dataclass(frozen=True)
class TaskOptions(Options):
    task: str = option("toy", f"data set: {', '.join(data.TASKS)}", data.TASKS)
    path: str = option("", "folder with the data set's files, or one file; empty: downloads/TASK, where `make data` "
                       "puts them")
    source: str = option("publisher", "whose files: publisher or reft", data.SOURCES)
    toy_steps: tuple[int, ...] = option((2, 3), "relations per story of the toy world", low=1,
                                         high=len(toy.NAMES) - 1)
    toy_world: str = option("ways", f"which toy world: {', '.join(toy.WORLDS)} (see data/toy.py and "
                           "data/ledger.py)", toy.WORLDS)
    toy_gold: float = option(0.0, "in the world ledger, share of gold's steps that are written inside the next one",
                             low=0, high=1)
    prompt: str = option("plain", f"prompt template: {', '.join(PROMPTS)}", PROMPTS)
    chat: str = option("", f"wrap the prompt for a chat model: {', '.join(filter(None, CHATS))}", CHATS)
    answer_format: str = option("", f"how an answer is marked: {', '.join(ANSWER_FORMATS)}; empty: as the prompt asks, "
                                "or else in the data set's own way", ("", *ANSWER_FORMATS))

    @property
    def marks(self) -> str:
        """The answer format in which gold solutions are written and responses are graded."""
        return self.answer_format or prompt_format(self.prompt, self.task) or OWN_FORMAT[self.task]

    def problems(self, split: str, limit: int = 0) -> list[data.Problem]:
        """Load the first `limit` problems of a split (0: all). An empty split is an error."""
        if self.task == "math":
            require_math_verify()
        source = "program" if self.marks == "python" and self.task != "toy" else self.source
        problems = data.load_problems(self.task, split, self.path or None, source, self.toy_steps, self.toy_world,
                                      self.toy_gold)
        if not problems:
            raise SystemExit(f"{self.task} has no {split} problems")
        return problems[:limit or None]

    def held_out(self) -> list[data.Problem]:
        """Load the dev and test questions that a method is measured on."""
        return [problem for split in ("dev", "test") for problem in self.problems(split, self.eval_questions)]

    def prompt_text(self, problem: data.Problem) -> str:
        solved = []
        if needs_examples(self.prompt, self.task):
            solved = [example for example in data.examples(self.task, self.path or None)
                      if example.id != problem.id][:4]
        return prompt_text(self.prompt, self.task, problem.question, solved, self.chat)

    def prompt_ids(self, tokenizer, problem: data.Problem) -> list[int]:
        return encode_prompt(tokenizer, self.prompt_text(problem))

    def gold_ids(self, tokenizer, problem: data.Problem) -> list[int] | None:
        """Encode the gold solution as a response of the model's own: in its answer format, ending in EOS."""
        text = gold_text(problem, self.marks)
        return encode_solution(tokenizer, text, self.prompt_text(problem)) if text else None
