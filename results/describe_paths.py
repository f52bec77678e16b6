"""What RFT adds to gold solutions: a row for each cell, means over seeds.

    python -m results.describe_paths runs/rft

Swapped: of the paths beyond the first of their question, those with the equations of another one, but for the order of
the two numbers in a sum or a product.
"""
import re
import sys
from collections import Counter
from pathlib import Path

from infra.run import read_records
from results.describe_pairs import print_means
from rewards import equations
from rft import KeptPath

FORMATS = {"paths": ",.0f", "beyond the first of a question": ",.0f", "swapped": ".1%"}


def unordered(text: str) -> tuple[str, ...]:
    """List a path's equations with the smaller number of a sum or a product first."""
    def ordered(match: re.Match) -> str:
        return match[2].join(sorted((match[1], match[3]), key=int))

    return tuple(re.sub(r"^(\d+)([+*])(\d+)(?==)", ordered, equation) for equation in equations(text))


def describe(folder: Path) -> dict[str, float]:
    """Describe the paths of a run that step 5 trained on."""
    paths = read_records(folder / "paths.jsonl", KeptPath)[1]
    kinds = {(path.id, unordered(path.text)) for path in paths}
    extra = len(paths) - len(Counter(path.id for path in paths))
    return {"paths": len(paths), "beyond the first of a question": extra,
            "swapped": (len(paths) - len(kinds)) / max(1, extra)}


if __name__ == "__main__":
    print_means(Path(sys.argv[1]), "paths.jsonl", describe, FORMATS)
