"""Write prompts as the papers do, write gold solutions in the format asked for, and encode both as token ids.

A prompt ends where the response begins, and never in a space, which tokenizers would join to what follows. Prompt and
response are encoded separately, so the boundary between them is exact.
"""
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.chat import chat_of
from data.files import Problem

# {question} is the question with its options, {examples} are solved questions. PROMPT-TASK is a template for one task.
TEMPLATES = {
    "plain": "{question}\n",
    # IRPO, appendix: zero-shot for GSM8K and ARC, four examples for MATH
    "irpo": "Your task is to answer the question below. Give step by step reasoning before you answer, "
            'and when you\'re ready to answer, please use the format "Final answer: ..."\n'
            "Question: {question}\nSolution:",
    "irpo-arc": "Your task is to answer the question below. Give step by step reasoning before you "
                "answer, and when you're ready to answer, conclude using the format "
                '"Final answer: (insert letter here)"\n\nQuestion: {question}\nSolution:',
    "irpo-math": "Your task is to answer the last question below. Give step by step reasoning before "
                 "you answer, and when you're ready to answer, wrap your answer in \\boxed, and "
                 'conclude using the format "Final answer: ..."\n\n{examples}'
                 "Question: {question}\nSolution:",
    # RFT's code: the Alpaca format
    "rft": "Below is an instruction that describes a task. Write a response that appropriately "
           "completes the request.\n\n### Instruction:\n{question}\n\n### Response:",
    # ReFT's code, for solutions in words and for programs (--answer_format python). Its sampler also puts the program's
    # first line into the prompt, to save time; here the model writes it.
    "reft": "Question:\n{question}\nAnswer reasoning:\n",
}
TEMPLATES |= {"irpo-letter": TEMPLATES["irpo-arc"], "irpo-latex": TEMPLATES["irpo-math"]}  # your own data
PROMPTS = tuple(name for name in TEMPLATES if "-" not in name)
# The answer format that a prompt asks for. MATH's answers may contain "<", which would end an answer after ####.
PROMPT_FORMATS = {"irpo": "final_answer", "rft": "hash", "rft-math": "boxed", "rft-latex": "boxed", "reft": "trigger"}
EXAMPLE = "Question: {question}\nSolution: {solution}\n\n"

MARKS = {  # how each answer format gives the answer, after the reasoning
    "hash": "\n#### {answer}",
    "final_answer": "\nFinal answer: {answer}",
    "trigger": "\nTherefore, the answer is: {answer}",
    "boxed": "\nThe answer is \\boxed{{{answer}}}.",
    "minerva": "\nFinal Answer: The final answer is ${answer}$. I hope it is correct.",
}
ANSWER_FORMATS = (*MARKS, "python")
MENTIONED = {"hash": "####", "final_answer": "Final answer:", "trigger": "Therefore, the answer is:",
             "boxed": "\\boxed", "minerva": "Final Answer: The final answer is", "python": "def solution"}


def prompt_text(prompt: str, task: str, question: str, examples: Sequence[Problem] = ()) -> str:
    """Write the prompt for a question; `examples` are needed where `needs_examples` says so."""
    template = template_of(prompt, task)
    solved = "".join(EXAMPLE.format(question=one.question, solution=gold_text(one, PROMPT_FORMATS[prompt]))
                     for one in examples)
    return template.format(question=question, examples=solved)


@functools.cache
def template_of(prompt: str, task: str = "") -> str:
    """Look up a template, or read one from a file, in which {question} is a field and all else is text.

    ValueError if there is none, if it has no {question}, or if it ends in a space.
    """
    if prompt in PROMPTS:
        return TEMPLATES.get(f"{prompt}-{task}", TEMPLATES[prompt])
    if not os.path.isfile(prompt):
        raise ValueError(f"--prompt {prompt}: choose from {', '.join(PROMPTS)}, or name a text file with {{question}}")
    try:
        text = Path(prompt).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt {prompt}: {error}") from None
    if "{question}" not in text:
        raise ValueError(f"--prompt {prompt}: it has no {{question}}, where the question goes")
    if text.endswith(" "):
        raise ValueError(f"--prompt {prompt}: it ends in a space, which tokenizers would join to the response")
    return text.replace("{", "{{").replace("}", "}}").replace("{{question}}", "{question}")


def prompt_format(prompt: str, task: str) -> str | None:
    """Return the answer format that a prompt asks for; None if it leaves that to the data set.

    A template of your own asks for the format that it mentions, if that is one only.
    """
    if prompt not in PROMPTS:
        template = template_of(prompt)
        final = "final answer:" in template.replace(MENTIONED["minerva"], "").lower()
        named = [name for name, words in MENTIONED.items() if words in template or name == "final_answer" and final]
        return named[0] if len(named) == 1 else None
    return PROMPT_FORMATS.get(f"{prompt}-{task}", PROMPT_FORMATS.get(prompt))


def needs_examples(prompt: str, task: str) -> bool:
    return "{examples}" in TEMPLATES.get(f"{prompt}-{task}", "")


def gold_text(problem: Problem, answer_format: str) -> str:
    """Write the gold solution in the answer format that the model is asked for; "" if there is none.

    A winner in another format than the prompt's would teach the model that format. Calculator annotations <<48/2=24>>
    stay only in the format they belong to, "hash".
    """
    solution = problem.solution
    if not solution or answer_format == "python" or answer_format == "boxed" and "\\boxed" in solution:
        return solution
    # the last line alone: "####" also begins a heading in Markdown
    reasoning = re.sub(r"(?:\s*####|\nTherefore, the answer is: |\nFinal answer: )[^\n]*\s*\Z", "", solution)
    answer = problem.answer
    if answer_format != "hash":
        reasoning = re.sub(r"<<[^>]*>>", "", reasoning)
    if answer_format != "trigger":  # ReFT's SVAMP has said the answer by then: "... Therefore, the answer is <203>."
        reasoning = re.sub(r"\s+(Therefore, t|T)he answer is <[^>]*>\.?$", "", reasoning)
        answer = re.sub(r"^([-+]?[0-9,]+)\.0$", r"\1", answer)
    return reasoning + MARKS[answer_format].format(answer=answer)


def encode_prompt(tokenizer, text: str, chat: str = "", system: str = "") -> list[int]:
    """Encode a prompt: one BOS if the model uses one, then the text. Every prompt is encoded here.

    In a chat the text is the user's message, and the model's own template (--chat own) says whether there is a BOS.
    """
    if chat:
        return chat_of(tokenizer, chat, system).prompt_ids(text.strip())
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(text)


def encode_solution(tokenizer, text: str, prompt: str = "\n", chat: str = "", system: str = "") -> list[int]:
    """Encode a written solution as the response to a prompt: its text, then EOS, or what ends a turn of the chat.

    After "Solution:" a response begins with a space, so a written one must, too. Sentencepiece begins every text with
    one; for byte-level tokenizers (Llama 3, Qwen2) it is added here.
    """
    if chat:
        return chat_of(tokenizer, chat, system).response_ids(text)
    if not tokenizer.begins_with_space and not prompt[-1:].isspace():
        text = " " + text
    return [*tokenizer.encode(text), tokenizer.eos_id]


def end_ids(tokenizer, chat: str = "", system: str = "") -> tuple[int, ...]:
    """List the ids that end a response: those that the model's files declare, and what ends a turn of the chat."""
    ids = (chat_of(tokenizer, chat, system).end_id,) if chat else ()
    return tuple(dict.fromkeys([*ids, *tokenizer.eos_ids]))
