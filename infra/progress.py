"""What is shown and recorded of long work: progress bars with rates, figures over the steps of a run, safe text."""
import time
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from statistics import fmean

from tqdm import tqdm

from infra.parallel import rank

MANY = 0.1  # of the responses: more that cannot be judged deserve a warning
REMEDIES = {  # kind of response that makes an accuracy say little about a model -> what to do
    "unparsed": "ask as the model was trained (--chat own for a chat model; its --prompt or --answer_format), and see "
                "that responses are not cut off",
    "unfinished": "raise --max_new_tokens, or declare the token that ends this model's responses as eos_token_id in "
                  "its generation_config.json",
    "empty": "ask as the model was trained: --chat own for a chat model, and its --prompt"}


class Progress(tqdm):
    """A bar on rank 0 that shows the time left and tokens per second; without a label it is hidden."""

    stage = ""  # in front of every label

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        super().__init__(desc=self.stage + label, total=total, initial=done, unit=unit, dynamic_ncols=True,
                         disable=not label or rank() > 0, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, "
                         "{remaining} left, {rate_fmt}{postfix}]")
        self.tokens, self.began = 0, time.perf_counter()

    def display(self, *args, **options):
        """Hide the bar once nobody reads it: Ctrl-C also ends the other side of `| tee log`, and the state is saved
        only after that."""
        try:
            return super().display(*args, **options)
        except BrokenPipeError:
            self.disable = True

    def advance(self, count: int, tokens: int, **figures: float) -> None:
        """Move on by `count` units, which took this many tokens; show figures, too."""
        self.tokens += tokens
        shown = [f"{name} {value:.3f}" for name, value in figures.items()]
        speed = self.tokens / (time.perf_counter() - self.began)
        self.set_postfix_str(", ".join([*shown, f"{speed:,.0f} tok/s"]), refresh=False)
        self.update(count)


def print_above(line: str) -> None:
    """Print a line above the bars, unless nobody reads it any more: then the step goes on, and is saved."""
    with suppress(BrokenPipeError):
        tqdm.write(line)


def iterations(total: int) -> Iterator[int]:
    """Count from 1 to total; meanwhile bars say "iteration 2 of 4"."""
    try:
        for t in range(1, total + 1):
            Progress.stage = f"iteration {t} of {total}, "
            yield t
    finally:
        Progress.stage = ""


def printable(text: str) -> str:
    """Escape what a terminal obeys or cannot encode: a text of a model must not move its cursor or set its title.

    Those are control characters other than newline and tab, overrides of the reading direction, and lone surrogates.
    """
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs"
                   else c.encode("unicode_escape").decode() for c in text)


def print_summary(name: str, found: dict) -> None:
    """Print a model's accuracy and the shares of responses that could not be judged; warn where these are high."""
    shares = {"unparsed": found["verdicts"].get("unparsed", 0.0), "unfinished": 1 - found["finished"],
              "empty": found["empty"]}
    print("{}: accuracy {:.1%}, 95 % interval {:.1%} to {:.1%}, {} questions; {}".format(
        name, found["accuracy"], *found["ci95"], found["n"],
        ", ".join(f"{share:.1%} {kind}" for kind, share in shares.items())))
    for kind, share in shares.items():
        if share > MANY:
            print(f"warning: {share:.0%} of the responses are {kind}: {REMEDIES[kind]}")


def summary(records: list[dict]) -> dict:
    """Count steps and tokens, and reduce every measured value over the last quarter of the steps."""
    counted = [record for record in records if not record.get("skipped")] or records
    last_quarter = counted[-max(1, len(counted) // 4):]
    names = {name for record in last_quarter for name, value in record.items() if isinstance(value, float)}
    return {**{name: mean_or_max(name, [record[name] for record in last_quarter if name in record])
               for name in sorted(names)},
            "steps": len(records), "skipped": sum(record.get("skipped", 0) for record in records),
            "tokens_trained": sum(record["tokens"] for record in records)}


def mean_or_max(name: str, values: list[float]) -> float:
    """Reduce a measured value to its mean, or to its maximum where its name begins with ratio."""
    return max(values) if name.startswith("ratio") else fmean(values)
