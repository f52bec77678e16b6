"""Multiple choice: which option a phrase names.

Left out: recognizing an option by its text ("Days get shorter" for C), which would need the choices.
"""
import re

from grading.formats import plain

_LETTER = re.compile(  # at the start: "(C)", "C.", "a ) 38", "Option C", "B because"
    r"\W*(?:(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?):? ?)?\(?"
    r"(?:([A-Ea-e1-5])(?= ?(?:$|[).:,;<>/|&\]}](?![0-9])|[\"'”](?!\w)|[-–] ))"
    r"|([B-E](?= )|A(?= (?:is|was|because|since)\b)))")
_SECOND = re.compile(  # behind it another option, but neither the article A nor E. coli
    r"\W*(?:(?:or|and|to|through|nor)\b\W*)?"
    r"([BCD](?![\w'’-])|A(?![\w'’-]| (?!(?:or|and|to|nor)\b)[a-z])|E(?![\w'’-]|\. [a-z])"
    r"|[a-e1-5](?= ?(?:$|[).:,;/|&])))")
_CHOICES = re.compile(r".*\bB ?[).:].*\bC ?[).:]", re.IGNORECASE)  # behind A: all the choices, with their texts
_DENIAL = re.compile(r"(?i)\b(?:not|nor|neither|never|cannot|except|wrong|incorrect|false|impossible|eliminated?|but"
                     r"|rule(?:s|d)? out)\b|n['’]t\b")
_DENIED = re.compile(r"\W*(?:is|was|are|can|could|may|must|does|did|seems|looks|would|will|has)(?:\b|n['’]t)"
                     r"|\W*(?:cannot|can['’]t)\b")
_CLAUSE_END = re.compile(r"[.,;:!?]|\b(?:because|since|as|so)\b")
_DECLARED = re.compile(r"(?i)\b(?:answer|choice|option) (?:is|must be|should be) (?=\W*[a-e]\b)")
_LETTER_INSIDE = re.compile(  # in a sentence: "(c)" or a capital, but not the article A
    r"\(([A-Ea-e])\)|(?<![\w'’-])([B-E]|A(?! (?!(?:or|and|is|was|because|to|through|nor|but|over)\b)[a-z]))(?![\w'’-])")


def read_letter(phrase: str) -> str | None:
    """Read the option that a phrase names: "C", "(C)", "C. Days get shorter", "B is wrong; the answer is C".

    Several options, all of them, or one that is only denied ("not B") are no answer.
    """
    phrase = plain(phrase)
    match = _LETTER.match(phrase)
    if match is None:
        if _DENIAL.search(phrase):
            return _declared(phrase)
        found = {(match[1] or match[2]).upper() for match in _LETTER_INSIDE.finditer(phrase)}
        return found.pop() if len(found) == 1 else None
    letter, rest = (match[1] or match[2]).upper(), phrase[match.end():]
    clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
    if _DENIED.match(clause) and _DENIAL.search(clause):
        return _declared(rest)
    second = _SECOND.match(rest)
    several = second and second[1].isdigit() == letter.isdigit() or letter == "A" and _CHOICES.match(rest)
    return None if several else letter


def _declared(phrase: str) -> str | None:
    """Where one option is denied, read the one that is said to be the answer."""
    said = _DECLARED.search(phrase)
    return read_letter(phrase[said.end():]) if said else None


def read_mathqa_letter(phrase: str) -> str | None:
    """Read an option of MathQA, which writes small letters and never digits."""
    letter = read_letter(phrase)
    return letter.lower() if letter and letter.isalpha() else None
