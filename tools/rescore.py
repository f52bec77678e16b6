"""Grade the texts of a file of samples again, by the task and answer format in its first line.

    python -m tools.rescore runs/evaluate-s0/eval_samples.jsonl    # or python evaluate.py --rescore FILE
"""
import argparse
from dataclasses import asdict, replace
from pathlib import Path

from evaluate import Answered, print_summary, summarize
from infra.run import read_records, run_script
from rewards import grade_all, require_math_verify


def rescore(path: Path) -> None:
    """Grade the texts of a file again, and show where a verdict has changed."""
    settings, before = read_records(path, Answered)
    task, marks = settings["task"], settings["marks"]
    if task == "math":
        require_math_verify()
    grades = grade_all([[s.text for s in q.samples] for q in before], [q.gold for q in before], task, marks)
    after = [replace(question, samples=[replace(sample, **asdict(verdict)) for sample, verdict in zip(
        question.samples, group)]) for question, group in zip(before, grades)]
    for old, new in zip(before, after):
        for a, b in zip(old.samples, new.samples):
            if a.verdict != b.verdict:
                print(f"{old.id}: {a.verdict} in the file, {b.verdict} now; answer {b.answer}, gold {old.gold}")
    print(f"{path}: {task}, answers marked as {marks}")
    print_summary(summarize(after, task))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="samples.jsonl, eval_samples.jsonl, ... of a run")
    rescore(parser.parse_args().file)


if __name__ == "__main__":
    run_script(main)
