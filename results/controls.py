"""Rewards for control runs, for --reward results/controls.py:NAME: winners that are no better than losers, or lucky."""
import hashlib
import re


def at_random(text: str, problem) -> bool:
    """Call one response in four right, whatever it says; the same one always."""
    return hashlib.sha256(f"{problem.id} {text}".encode()).digest()[0] < 64


def none_right(text: str, problem) -> bool:
    """Call every response wrong, so that Online-ST trains on gold alone."""
    return False


def modulo(text: str, problem, number: int) -> bool:
    answer = re.search(r"#### (\d{1,9})$", text.strip())
    return bool(answer) and int(answer[1]) % number == int(problem.answer) % number


def modulo_4(text: str, problem) -> bool:
    """Call an answer right that differs from the right one by a multiple of 4, so that luck is common."""
    return modulo(text, problem, 4)


def modulo_10(text: str, problem) -> bool:
    """Call an answer right that has the right last digit."""
    return modulo(text, problem, 10)
