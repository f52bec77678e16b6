"""A reward of your own, FILE.py:function, in place of the graders: (text, problem) -> number or verdict.

The file is its user's code, not a model's: it is imported, and runs in this process.
"""
import contextlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from functools import cache

from data.files import Problem
from infra import InputError
from infra.parallel import computed
from rewards import Grade

VERDICTS = ("correct", "wrong", "unparsed", "copied", "timeout")


@cache
def load_reward(reward: str) -> Callable[[str, Problem], object]:
    """Import FILE.py:function. InputError says where the file fails."""
    file, _, name = reward.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_reward", file)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except (Exception, SystemExit) as error:
        raise InputError(f"--reward {reward} cannot be imported: {told(error)}") from None


def reward_all(texts: list[list[str]], problems: list[Problem], reward: str, right_at: float) -> list[list[Grade]]:
    """Judge all texts of each problem by a reward of your own, on all ranks."""
    return computed(range(len(texts)), lambda i: [judge_by(reward, text, problems[i], right_at) for text in texts[i]])


def judge_by(reward: str, text: str, problem: Problem, right_at: float) -> Grade:
    """A number is right from right_at on, and wrong below it. A verdict, by name or in a Grade, scores 1 if right.

    InputError, with problem and text, for a reward that raises or returns anything else.
    """
    function = load_reward(reward)
    try:
        found = function(text, problem)
    except Exception as error:
        fault = f"fails: {told(error)}"
    else:
        found = found.verdict if isinstance(found, Grade) else found
        if isinstance(found, str) and found in VERDICTS:
            return Grade(found, None, float(found == "correct"))
        if math.isfinite(number := number_of(found)):
            return Grade("correct" if number >= right_at else "wrong", None, number)
        fault = f"returns {found!r:.60}"
    raise InputError(f"--reward {reward} {fault}, for the problem {problem.id} and the text {text[:100]!r}. It must "
                     f"take any text and a problem, and return a finite number, True, False or a verdict "
                     f"({', '.join(VERDICTS)}). Fix it and give another --run_dir: a run has one reward.")


def number_of(found: object) -> float:
    """Read any library's number, or its True or False; NaN for anything else."""
    with contextlib.suppress(Exception):
        return math.nan if isinstance(found, str) else float(found)
    return math.nan


def told(error: BaseException) -> str:
    """Say what was raised, and in which line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} in {frame.filename}, line {frame.lineno}"
