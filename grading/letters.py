"""Multiple choice: which option a phrase names.

Left out: recognizing an option by its text ("Days get shorter" for C), which would need the choices.
"""
import re

from grading.formats import plain

_LETTER = re.compile(  # at the start: "(C)", "C.", "a ) 38", "Option C", "B because"
    r"\W*(?:(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?):?\s*)?\(?"
    r"(?:([A-Ea-e1-5])(?=\s*(?:$|[).:,;<>\]}](?![0-9])|[\"'”](?!\w)|[-–]\s))|([B-E])(?=\s))")
_OTHER_LETTER = re.compile(r"\W*(?:\b(?:or|and)\b|[&/,])\W*(?:[A-E]\b|[a-e]\b(?!\s+\w))")
_LETTER_INSIDE = re.compile(  # in a sentence: "(c)" or a capital, but not the article A
    r"\(([A-Ea-e])\)|(?<![\w'’-])([B-E]|A(?!\s+(?!(?:or|and|is|because)\b)[a-z]))(?![\w'’-])")


def read_letter(phrase: str) -> str | None:
    """Read the option that a phrase names: "C", "(C)", "C. Days get shorter", "The answer is (C)."."""
    phrase = plain(phrase)
    match = _LETTER.match(phrase)
    if match:
        second = _OTHER_LETTER.match(phrase, match.end())
        return None if second else (match[1] or match[2]).upper()
    found = {(match[1] or match[2]).upper() for match in _LETTER_INSIDE.finditer(phrase)}
    return found.pop() if len(found) == 1 else None


def read_mathqa_letter(phrase: str) -> str | None:
    """Read an option of MathQA, which writes small letters and never digits."""
    letter = read_letter(phrase)
    return letter.lower() if letter and letter.isalpha() else None
