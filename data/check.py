"""What must hold before a run spends hours: the model, its tokenizer, the prompt and the graders fit together."""
from collections.abc import Iterable
from pathlib import Path

import data
from checkpoint import load_config
from data.own import reward_all
from data.tokenizer import load_tokenizer
from infra import InputError
from infra.progress import printable
from infra.run import is_run, read_json
from rewards import grade_all


def check_inputs(config, tokenizer, problems: list[data.Problem], others: list[data.Problem] = ()) -> None:
    """Check before spending hours: prompts fit and have exactly one BOS, and gold solutions are graded correct.

    others: problems of other splits, which will only be asked.
    """
    shape, prompts = load_config(config.model), [config.prompt_ids(tokenizer, p) for p in [*problems, *others]]
    golds = [(ids, p.answer) for p in problems if (ids := config.gold_ids(tokenizer, p))]
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > shape.max_length:
        raise InputError(f"the longest prompt has {longest} tokens, and with --max_new_tokens {config.max_new_tokens} "
                         f"it exceeds the model's {shape.max_length} positions")
    check_tokens(config.model, shape.vocab_size, [[tokenizer.eos_id], *prompts, *(ids for ids, _ in golds)])
    if start := getattr(config, "start_from", ""):
        other = load_tokenizer(start)
        if [config.prompt_ids(other, p) for p in problems] != prompts[:len(problems)]:
            raise InputError(f"--start_from {start} has another tokenizer than --model {config.model}: it cannot learn "
                             "from the samples of that model")
    if tokenizer.eos_note:
        print(f"check: a response ends with any of the tokens {', '.join(map(str, tokenizer.eos_ids))}, since files "
              f"disagree: {tokenizer.eos_note}")
    note_unused_chat(config, tokenizer)
    one_bos = sum(tokenizer.bos_id is None or prompt.count(tokenizer.bos_id) == 1 for prompt in prompts)
    if one_bos < len(prompts) and config.chat != "own":  # whose template says what there is
        raise InputError(f"only {one_bos} of {len(prompts)} prompts have exactly one BOS: the others have it in their "
                         "text, or the tokenizer adds another")
    texts = [tokenizer.decode(ids) for ids, _ in golds]
    grades = [group[0] for group in grade_all([[text] for text in texts], [gold for _, gold in golds], config.kind,
                                              config.marks)]
    right = sum(verdict.verdict == "correct" for verdict in grades)
    print(f"check: {len(prompts)} prompts fit, and {right} of {len(golds)} gold solutions are graded correct")
    if right < len(golds):
        i = next(i for i, verdict in enumerate(grades) if verdict.verdict != "correct")
        raise InputError("the tokenizer, the prompt or the answer format does not fit this task. The first gold "
                         f"solution that fails, as the tokenizer decodes it:\n{texts[i]}\nverdict {grades[i].verdict}, "
                         f"answer {grades[i].answer}, gold answer {golds[i][1]}")
    if config.reward:
        first = next((problem for problem in problems if problem.solution), problems[0])
        [[verdict]] = reward_all([[*texts[:1], first.answer][:1]], [first], config.reward, config.right_at)
        said = (f"--reward gives the first gold {'solution' if texts else 'answer'} {verdict.score:g}, so with "
                f"--right_at {config.right_at:g} it is {verdict.verdict}")
        if texts and verdict.verdict != "correct" and getattr(config, "gold", False):
            raise InputError(f"{said}, and gold solutions would be winners all the same: give a smaller --right_at, or "
                             "--no-gold")
        print(f"check: {said}")
    warn_if_trained_otherwise(config)


def check_tokens(model: str, vocab_size: int, sequences: Iterable[list[int]]) -> None:
    """Refuse token ids for which a model, named by its directory, has no embedding."""
    if (last := max(map(max, sequences))) >= vocab_size:
        raise InputError(f"the tokenizer gives token {last}, and the model in {model} knows {vocab_size}: they do not "
                         "belong together")


def note_unused_chat(config, tokenizer) -> None:
    if tokenizer.chat_template and not config.chat:
        print(f"note: {config.model} has a chat template, which --chat own would use")


def warn_if_trained_otherwise(config) -> None:
    """Warn if a run of this project trained the model to be asked in another way."""
    folder = Path(config.model).resolve().parent  # the run's, or that of one of its iterations
    run = next((f for f in (folder, folder.parent) if is_run(f)), None)
    before = read_json(run / "config.json") if run else {}
    other = [f"--{name} {before[name] or repr('')}" for name in ("prompt", "chat", "system", "answer_format")
             if name in before and before[name] != getattr(config, name)]
    if other:
        print(printable(f"warning: {config.model} was trained with {' '.join(other)}, and is asked otherwise here"))
