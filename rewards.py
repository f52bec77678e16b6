"""stub until the real one lands"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    verdict: str
    answer: str | None
def grade(text, gold, dataset, answer_format=None):
    marker = "Final answer:" if answer_format=="final_answer" else "####"
    if marker not in text: return Grade("unparsed", None)
    a = text.split(marker)[-1].strip().replace(",","").replace("$","").rstrip(".")
    return Grade("correct" if a == gold.replace(",","") else "wrong", a) if a else Grade("unparsed", None)
