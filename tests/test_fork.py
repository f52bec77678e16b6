"""A user's own data, prompt and reward: what is read, what is refused, and what each method does with them."""
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import data
import irpo
import reft
import rft
from checkpoint import load_model, save_model
from commands import ROOT, named_blocks, shown_commands
from data import __main__ as show
from data.fresh import fresh_model
from data.own import judge_by, load_reward
from data.prompts import prompt_text, template_of
from data.task import TaskOptions
from data.tokenizer import load_tokenizer
from infra import InputError
from infra.parallel import device
from rewards import Grade, grade
from runs import PROCESS, SMALL, call, read_lines, refusal, settings
from tools import chat, evaluation, report, sft
from train import Example, TrainOptions, fit_sft

PAGE = (ROOT / "docs" / "models-and-data.md").read_text(encoding="utf-8").partition("## Your own data")[2]
RECORD = {"question": "What is 3 + 4?", "answer": 7}
CHOICES = RECORD | {"answer": "B", "choices": ["six", "seven", 8]}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(count: int, **more) -> list[dict]:
    return [{"question": f"What is {i} + 1?", "answer": i + 1, **more} for i in range(count)]


# --- code ------------------------------------------------------------------------------------------

def test_the_loss_in_the_readme_can_be_put_in_the_code(base, tmp_path):
    """Its diff applies, and the run that follows trains with it: IPO begins at (1 / 2 beta)^2, DPO at ln 2."""
    [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for path in [*ROOT.glob("*.py"), *(path for room in ("data", "grading", "infra", "tools")
                                       for path in (ROOT / room).glob("*.*"))]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / path.relative_to(ROOT))
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)
    done = subprocess.run([*PROCESS, "irpo.py", *SMALL, "--iterations", "1", "--beta", "0.5", "--model", base,
                           "--precision", "fp32", "--run_dir", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = read_lines(tmp_path / "run/iter1/train.jsonl")[0]
    assert first["dpo"] == pytest.approx(1.0, abs=1e-3) and first["loss"] == pytest.approx(1 + first["nll"], abs=0.1)


# --- data ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, row, kind, problem, response, wrong", [
    ("", RECORD, "number", ("f-1", "What is 3 + 4?", "7", ""), "#### 7.0", "#### 8"),
    ("", RECORD | {"answer": "1/3", "id": 0, "solution": "So."}, "number", ("0", "What is 3 + 4?", "1/3", "So."),
     "#### 1/3", "#### 1/2"),
    ("", CHOICES, "letter", ("f-1", "What is 3 + 4?\n(A) six\n(B) seven\n(C) 8", "B", ""), "Final answer: (b)",
     "Final answer: C"),
    ("text", RECORD | {"answer": "New York", "choices": None}, "text", ("f-1", "What is 3 + 4?", "New York", ""),
     'Final answer: "new  york".', "Final answer: York"),
    ("text", RECORD | {"answer": "None"}, "text", ("f-1", "What is 3 + 4?", "None", ""), "Final answer: none",
     "Final answer: one"),
    ("latex", RECORD | {"answer": "\\frac12"}, "latex", ("f-1", "What is 3 + 4?", "\\frac12", ""), "\\boxed{1/2}",
     "\\boxed{2}"),
    ("python", RECORD, "python", ("f-1", "What is 3 + 4?", "7", ""), "def solution():\n    return 3 + 4",
     "def solution():\n    return 3")])
def test_records_and_how_answers_are_compared(answer, row, kind, problem, response, wrong, tmp_path, monkeypatch):
    """One record format for all kinds of answers; before, {"question", "answer_value"} happened to work as gsm8k's."""
    monkeypatch.setattr("data.task.require_math_verify", lambda: None)
    options = TaskOptions(task=str(write(tmp_path / "f" / "test.jsonl", row).parent), answer=answer)
    [found] = options.problems("test")
    assert (options.kind, found) == (kind, data.Problem(problem[0].replace("f-", "test-"), *problem[1:]))
    assert grade(response, found.answer, options.kind, options.marks).verdict == "correct"
    assert grade(wrong, found.answer, options.kind, options.marks).verdict == "wrong"
    if kind != "latex":  # whose prompt of IRPO needs solved problems to show
        asked = "(insert letter here)" if kind == "letter" else "Final answer: ..."
        assert asked in replace(options, prompt="irpo").prompt_text(found)


def test_the_right_numbers_of_rft_are_exact_for_own_data():
    """RFT's authors read 1 of "#### 1/2": by their rule every fraction with that top would be right."""
    assert [rft.is_right("#### 1/3", gold, "number", "hash") for gold in ("1/2", "1/3")] == [False, True]


@pytest.mark.parametrize("answer, row, said", [
    ("", RECORD | {"soluton": "x"}, "field 'soluton': did you mean 'solution'?"),
    ("", {"question": "q"}, "no field 'answer'"), ("", {"answer": 7}, "no field 'question'"),
    ("", RECORD | {"answer": "So.\n#### 7 or 8"}, "answer is 'So.\\n#### 7 or 8', not a number, as --answer number"),
    ("", RECORD | {"answer": "B"}, "answer is 'B', not a number"),
    ("", RECORD | {"answer": "Apollo 11"}, "answer is 'Apollo 11', not a number"),
    ("", CHOICES | {"answer": "B minor"}, "answer is 'B minor', not the letter of a choice"),
    ("", RECORD | {"answer": True}, "answer is True, not a number or text"),
    ("", RECORD | {"answer": ""}, "answer is '', not"), ("", RECORD | {"question": 5}, "question is 5, not text"),
    ("", RECORD | {"solution": "3 + 4 = 8\n#### 8"}, "solution ends in '8', and answer is '7'"),
    ("text", RECORD | {"solution": "So.\nFinal answer: eight."}, "solution ends in 'eight.', and answer is '7'"),
    ("", RECORD | {"solution": 5}, "solution is 5, not text"), ("", RECORD | {"id": [1]}, "id is [1], not a number or"),
    ("", CHOICES | {"answer": "D"}, "answer is 'D', not the letter of a choice, as --answer letter expects"),
    ("", CHOICES | {"answer": "seven"}, "answer is 'seven', not the letter of a choice"),
    ("", CHOICES | {"answer": 2}, "answer is '2', not the letter of a choice"),
    *(("letter", CHOICES | {"choices": choices}, "choices is ") for choices in (
        ["one"], list("abcdef"), ["a", "a", "b"], ["a", " "], "abc", {"text": ["a", "b"]}, ["a", ["b"]], [])),
    ("latex", RECORD | {"answer": "NaN"}, "answer is 'NaN', not a formula in LaTeX"),
    ("text", RECORD | {"answer": "."}, "answer is '.', not text"),
    ("python", RECORD | {"answer": "seven"}, "answer is 'seven', not the number that a program returns")])
def test_a_bad_record_names_file_line_and_field(answer, row, said, tmp_path, monkeypatch):
    """Before anything is computed, and with an example of a good record."""
    path = write(tmp_path / "my.jsonl", CHOICES if "choices" in row else RECORD, row)
    options = TaskOptions(task=str(path), answer=answer)
    monkeypatch.setattr("data.task.require_math_verify", lambda: None)
    with pytest.raises(InputError) as stop:
        options.problems("train")
    assert str(stop.value).startswith(f"{path}, line 2: {said}")
    assert ' like {"question": ..., "answer": ...}' in str(stop.value)


def test_one_file_is_divided_by_a_hash_of_the_question(tmp_path, capsys):
    """Dev and test are held out, the same in every order, and copies of a question stay together."""
    splits = []
    for order in (1, -1):
        path = write(tmp_path / f"{order}.jsonl", *[*asked(20), *asked(4)][::order])
        options = TaskOptions(task=str(path))
        splits.append([{p.question for p in options.problems(split)} for split in data.SPLITS])
        said = f"{path}: a hash of the question divides {path.name} into "
        assert re.fullmatch(re.escape(said) + r"\d+ problems for train, \d+ problems for dev, \d+ problems for test\n",
                            capsys.readouterr().out)
    train, dev, test = splits[0]
    assert splits[1] == splits[0] and [len(train), len(dev), len(test)] == [12, 4, 4]
    assert dev == {f"What is {i} + 1?" for i in (7, 8, 9, 15)} and len(train | dev | test) == 20
    few = write(tmp_path / "few.jsonl", *asked(4))
    with pytest.raises(InputError, match="few.jsonl has 4 problems: too few to hold dev and test out of train"):
        TaskOptions(task=str(few)).problems("test")


def test_a_folder_has_its_own_splits(tmp_path, capsys):
    """Ids that begin anew in each file stay apart: golds are found by id, and dev's would take the place of train's."""
    rows = asked(30)
    for split, part in (("train", rows[:10]), ("dev", rows[10:12]), ("test", rows[12:15])):
        write(tmp_path / "all" / f"{split}.jsonl", *({"id": i, **row} for i, row in enumerate(part)))
    options = TaskOptions(task=str(tmp_path / "all"))
    found = {split: options.problems(split) for split in data.SPLITS}
    assert [len(problems) for problems in found.values()] == [10, 2, 3] and not capsys.readouterr().out
    ids = [problem.id for problems in found.values() for problem in problems]
    assert len({*ids}) == 15 and ids[:11] == [*map(str, range(10)), "0#10"]

    write(tmp_path / "two" / "train.jsonl", *rows[:10])
    write(tmp_path / "two" / "test.jsonl", *rows[12:15])
    options = TaskOptions(task=str(tmp_path / "two"))
    assert [len(options.problems(split)) for split in data.SPLITS] == [8, 2, 3]
    assert "divides train.jsonl into 8 problems for train, 2 problems for dev\n" in capsys.readouterr().out

    write(tmp_path / "one" / "test.jsonl", *rows[12:15])
    options = TaskOptions(task=str(tmp_path / "one"))
    assert len(options.problems("test")) == 3
    with pytest.raises(InputError, match="one has no train problems"):
        options.problems("train")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none has no train.jsonl, no dev.jsonl and no test.jsonl"):
        TaskOptions(task=str(tmp_path / "none")).problems("train")


def test_copies_of_a_question_are_held_out_together(tmp_path):
    """Other case and spaces do not make another question, within a file either."""
    rows = asked(20)
    copies = [row | {"question": f" {row['question'].upper()} "} for row in rows]
    write(tmp_path / "x.jsonl", *rows, *copies)
    options = TaskOptions(task=str(tmp_path / "x.jsonl"))
    found = {split: {data.normalized(problem.question) for problem in options.problems(split)} for split in data.SPLITS}
    assert [len(questions) for questions in found.values()] == [12, 4, 4] and len(set().union(*found.values())) == 20


def test_a_question_in_two_splits_is_refused(tmp_path):
    """A test question that was trained on shows in no number; other case or spaces do not make it another one."""
    write(tmp_path / "train.jsonl", *asked(10))
    write(tmp_path / "test.jsonl", {"question": "what is  3 + 1?", "answer": 4})
    with pytest.raises(InputError, match=r"test.jsonl asks, in test-1, what .*train.jsonl asks in train-4: 'what is"):
        TaskOptions(task=str(tmp_path)).problems("train")


@pytest.mark.parametrize("module", [irpo, rft, reft, evaluation, sft, show])
@pytest.mark.parametrize("flags, said", [
    ("", "--task is missing"), ("--path .", "--path and --source need the --task"),
    ("--task toy --path .", "--path and --source need the --task"), ("--task toy --source reft", "--path and --source"),
    ("--task gsm8k --path {file}", "there is no such folder; your own data is named by --task"),
    ("--task {file} --path .", "--path and --source need the --task"),
    ("--task nowhere.jsonl", "--task nowhere.jsonl: choose from toy"),
    ("--task gsm8k --answer number", "--answer number is for a --task of your own"),
    ("--task {file} --answer python --answer_format hash", "--answer_format hash"),
    ("--task {file} --prompt nowhere.txt", "--prompt nowhere.txt: choose from plain, irpo")])
def test_no_other_data_is_used_than_what_was_asked_for(module, flags, said, tmp_path, base, capsys):
    """`irpo.py --path DIR --model DIR` trained on the toy world, without a word about DIR."""
    file = write(tmp_path / "my.jsonl", *asked(10))
    run = [] if module is show else ["--run_dir", tmp_path / "run"]
    said_instead = refusal(capsys, module, *flags.format(file=file).split(), "--model", base, *run)
    assert said in " ".join(said_instead.split())  # in one line
    assert not (tmp_path / "run").exists()


# --- prompts ---------------------------------------------------------------------------------------

def test_a_prompt_is_text_but_for_the_question(tmp_path):
    """Braces of JSON or LaTeX were fields of str.format, and a question's own {question} is text, too."""
    path = tmp_path / "my.txt"
    path.write_text("\ufeff{x} {} {{question}}\n{examples} {question!r}%s\nQ: {question}\r\n", newline="")
    text = prompt_text(str(path), "math", "Is {question} {0}?")
    assert text == "{x} {} {Is {question} {0}?}\n{examples} {question!r}%s\nQ: Is {question} {0}?\n"
    options = TaskOptions(task="math", prompt=str(path))
    assert options.prompt_text(data.Problem("i", "Is {question} {0}?", "1", "")) == text and options.marks == "boxed"


@pytest.mark.parametrize("text, marks", [
    ("Q: {question}\nEnd in \\boxed{}.", "boxed"), ("{question} #### N\n", "hash"), ("{question}\n", "trigger"),
    ("{question}\nFinal answer: N\n", "final_answer"), ("{question}\nFinal Answer: N\n", "final_answer"),
    ("{question}\nFinal Answer: The final answer is N. I hope it is correct.\n", "minerva"),
    ("{question} Final answer: or #### ?\n", "trigger")])
def test_a_prompt_of_ones_own_brings_the_format_it_mentions(text, marks, tmp_path):
    """Asked for "Final answer:" and graded by the data set's mark, every response is unparsed."""
    (tmp_path / "my.txt").write_text(text)
    assert TaskOptions(task="svamp", prompt=str(tmp_path / "my.txt")).marks == marks


@pytest.mark.parametrize("content, said", [
    (b"Q: {Question}\n", "it has no {question}"), (b"Q: {question} ", "it ends in a space"), (b"", "it has no"),
    (b"caf\xe9 {question}", "can't decode byte 0xe9")])
@pytest.mark.parametrize("module", [irpo, chat])
def test_bad_prompts_are_refused(content, said, module, tmp_path, capsys):
    (tmp_path / "my.txt").write_bytes(content)
    task = ["--task", "toy"] if module is irpo else []
    refused = refusal(capsys, module, "--model", "m", "--prompt", tmp_path / "my.txt", *task)
    assert said in " ".join(refused.split())


# --- rewards ---------------------------------------------------------------------------------------

PROBLEM = data.Problem("p-1", "What is 3 + 4?", "7", "3 + 4")


def reward_file(path: Path, body: str) -> str:
    path.write_text("import decimal, numpy, torch\nfrom rewards import grade\n\n"
                    f"def score(text, problem):\n    {body}\n")
    return f"{path}:score"


@pytest.mark.parametrize("body, expected", [
    ("return 1", ("correct", 1.0)), ("return 0.8", ("correct", 0.8)), ("return 0.79", ("wrong", 0.79)),
    ("return -3", ("wrong", -3.0)), ("return problem.answer in text", ("correct", 1.0)),
    ("return False", ("wrong", 0.0)), ("return 'correct'", ("correct", 1.0)), ("return 'unparsed'", ("unparsed", 0.0)),
    ("return grade('#### 7', problem.answer, 'number')", ("correct", 1.0)),
    *((f"return {value}", ("correct", 1.0)) for value in (
        "numpy.float32(1)", "numpy.bool_(True)", "torch.ones(())", "decimal.Decimal(1)"))])
def test_what_a_reward_may_return(body, expected, tmp_path):
    assert judge_by(reward_file(tmp_path / "my.py", body), "7", PROBLEM, 0.8) == Grade(expected[0], None, expected[1])


@pytest.mark.parametrize("body, said", [
    ("return float('nan')", "returns nan"), ("return float('-inf')", "returns -inf"), ("return None", "returns None"),
    ("return 10**400", "returns 1000"),
    ("return 'good'", "returns 'good'"), ("return [1.0]", r"returns \[1.0\]"),
    ("return torch.ones(2)", r"returns tensor"),
    ("return 1 / (len(text) - 5)", r"fails: ZeroDivisionError\('division by zero'\) in .*my.py, line 5")])
def test_what_a_reward_may_not_return(body, said, tmp_path):
    """A NaN would be a wrong answer to IRPO and the end of every weight to PPO."""
    with pytest.raises(InputError, match=said + r".*, for the problem p-1 and the text 'so 7\.'. It must .* --run_dir"):
        judge_by(reward_file(tmp_path / "my.py", body), "so 7.", PROBLEM, 1.0)


def test_a_reward_of_another_shape_is_refused(tmp_path):
    (tmp_path / "my.py").write_text("def score(text):\n    return 1\n")
    with pytest.raises(InputError, match="fails: TypeError.*2 were given"):
        judge_by(f"{tmp_path}/my.py:score", "7", PROBLEM, 1.0)
    for name, content in (("absent", "x = 1\n"), ("broken", "def score(:\n"), ("leaves", "raise SystemExit(3)\n")):
        (tmp_path / f"{name}.py").write_text(content)
        with pytest.raises(InputError, match=f"{name}.py:score cannot be imported: "):
            judge_by(f"{tmp_path}/{name}.py:score", "7", PROBLEM, 1.0)


@pytest.mark.parametrize("flags, said", [
    ("--reward my.py", "--reward my.py: name a file that exists"), ("--reward nowhere.py:score", "name a file"),
    ("--reward my.py:", "name a file"), ("--right_at 0.5", "--right_at 0.5 is for a --reward"),
    ("--reward my.py:score --num_choices 2", "without --reward")])
def test_bad_flags_about_rewards_are_refused(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reward_file(tmp_path / "my.py", "return 1")
    assert said in " ".join(refusal(capsys, reft, "--task", "toy", "--model", "m", *flags.split()).split())


# --- the methods -----------------------------------------------------------------------------------

SMOKE = {"irpo": "--iterations 1 --num_samples 4 --temperature 2 --select_every 0 --max_steps 2 --lr 1e-4",
         "rft": "--num_samples 4 --epochs 1 --batch_size 4", "reft": "--max_steps 2 --batch_size 3 --warmup_epochs 1"}


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A model directory that has learned the page's solutions, so that its responses end."""
    folder = tmp_path_factory.mktemp("writer")
    files, rows = named_blocks(PAGE), [json.loads(line) for line in named_blocks(PAGE)["my.jsonl"].splitlines()]
    (folder / "my_prompt.txt").write_text(files["my_prompt.txt"])
    options = TaskOptions(task=str(write(folder / "train" / "test.jsonl", *rows).parent),
                          prompt=str(folder / "my_prompt.txt"))
    fresh_model([*files.values(), "Final answer: 1 2 3 4 5 6 7 8 9 0"] * 3, folder / "model", 220, hidden_size=32,
                num_layers=1, max_positions=256, seed=0)
    model, tokenizer = load_model(folder / "model", device()), load_tokenizer(folder / "model")
    examples = [Example(p.id, options.prompt_ids(tokenizer, p), options.gold_ids(tokenizer, p))
                for p in options.problems("test")]
    fit_sft(model, examples, TrainOptions(epochs=60, lr=1e-2, batch_size=5, precision="fp32"), 0, folder / "run")
    save_model(model, folder / "model", source=folder / "model")
    return folder / "model"


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the page shows, to work in; no process has seen others by these names."""
    monkeypatch.chdir(tmp_path)
    for cached in (data.own_problems, load_reward, template_of):
        cached.cache_clear()
    for name, content in named_blocks(PAGE).items():
        (tmp_path / name).write_text(content)
    return tmp_path


def flags_of(command: str, writer: Path) -> list[str]:
    """The flags of a command of the page, with a model, on a smoke size."""
    script, *flags = shlex.split(command)[1:]
    return [str(writer) if flag == "DIR" else flag for flag in flags] + SMOKE[Path(script).stem].split() + [
        "--max_new_tokens", "60", "--precision", "fp32"]


def test_the_page_shows_its_data_as_a_model_sees_it(page, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    [command] = [command for command in shown_commands(PAGE) if "-m data" in command]
    call(show, *shlex.split(command)[3:])
    shown = capsys.readouterr().out
    assert "into 3 problems for train, 1 problems for dev, 1 problems for test\n" in shown
    assert 'with "Final answer: N".\nProblem: ' in shown
    assert re.search(r"\[\[.* pens\.\nFinal answer: \d<EOS>\]\]", shown)


@pytest.mark.parametrize("module", [irpo, rft, reft], ids=lambda module: module.__name__)
def test_the_page_is_true_for_every_method(module, page, writer, capsys):
    """Its commands run as they stand; the reward judges what is trained on, and answers what is measured; a run keeps
    both files and is not resumed with others."""
    [command] = [command for command in shown_commands(PAGE) if f"{module.__name__}.py" in command]
    flags = flags_of(command, writer)
    run = Path(flags[flags.index("--run_dir") + 1])
    call(module, *flags)
    said = capsys.readouterr().out
    assert "check: --reward gives the first gold solution 1, so with --right_at 1 it is correct\n" in said
    assert {row["split"] for row in json.loads((run / "results.json").read_text())} == {"train", "dev", "test"}
    for name in ("my_prompt.txt", "my_reward.py"):
        assert (run / "source" / "own" / name).read_text() == (page / name).read_text()
    [measured] = [s for row in read_lines(run / "iter1" / "eval_samples.jsonl") for s in row["samples"]]
    assert measured["score"] is None and settings(run / "iter1" / "eval_samples.jsonl")["reward_hash"] == ""
    if module is not reft:
        trained_on = [s for row in read_lines(run / "iter1" / "samples.jsonl") for s in row["samples"]]
        assert len(trained_on) == 12 and {s["verdict"] for s in trained_on} <= {"correct", "wrong"}
        assert all((s["verdict"] == "correct") == (s["score"] >= 1) for s in trained_on)

    call(module, *flags)  # resumes
    for name, field in (("my_prompt.txt", "prompt_file"), ("my_reward.py", "reward_file")):
        before = (page / name).read_text()
        (page / name).write_text(before + "\n")
        assert f"other inputs:\n  {field}: " in refusal(capsys, module, *flags)
        (page / name).write_text(before)


def test_a_reward_takes_the_place_of_the_grader_in_training(page, writer, capsys):
    """IRPO's and RFT's right ones are those that it says, whatever the answer; ReFT learns from the score itself."""
    reward_file(page / "my_reward.py", "return 0.25 + 0.5 * ('pens' in text)")
    commands = {name: flags_of(command, writer) for command in shown_commands(PAGE) for name in SMOKE
                if f" {name}.py" in command}
    for module, name in ((irpo, "irpo"), (rft, "rft")):
        call(module, *commands[name], "--right_at", "0.75", "--no-equation_filter" if module is rft else "--no-gold",
             *(["--dedup", "none"] if module is rft else []))
        samples = [s for row in read_lines(Path(f"runs/my-{name}/iter1/samples.jsonl")) for s in row["samples"]]
        assert {s["score"] for s in samples} <= {0.25, 0.75}
        assert all((s["verdict"] == "correct") == ("pens" in s["text"]) for s in samples)
        assert any(s["verdict"] == "correct" for s in samples)
    paths = read_lines(Path("runs/my-rft/iter1/paths.jsonl"))
    assert len(paths) == sum(s["verdict"] == "correct" and s["finished"] for s in samples)
    call(reft, *commands["reft"], "--eval_every", "1")
    records = read_lines(Path("runs/my-reft/iter1/train.jsonl"))
    assert len(records) == 2 and all(0.25 <= record["reward"] <= 0.75 for record in records)
    assert {record["accuracy"] for record in records} == {0.0}  # 1 or more is right
    [measured] = [sample for row in read_lines(Path("runs/my-reft/iter1/eval_dev.jsonl")) for sample in row["samples"]]
    assert records[-1]["dev"]["verdicts"] == {measured["verdict"]: 1.0}


def test_a_reward_that_fails_does_so_before_sampling(page, writer, capsys):
    reward_file(page / "my_reward.py", "return None")
    for command in shown_commands(PAGE)[1:]:
        module = {"irpo": irpo, "rft": rft, "reft": reft}[command.split()[1][:-3]]
        assert "returns None, for the problem my-" in refusal(capsys, module, *flags_of(command, writer))
    assert not Path("runs").exists()


def test_evaluation_measures_by_a_reward_and_does_not_grade_it_again(page, writer, capsys):
    reward_file(page / "my_reward.py", "return True")
    flags = ["--task", "my.jsonl", "--prompt", "my_prompt.txt", "--model", writer, "--max_new_tokens", "40"]
    call(evaluation, *flags, "--reward", "my_reward.py:score", "--run_dir", "a", "--num_samples", "2")
    [found] = json.loads(Path("a/results.json").read_text())
    assert found["accuracy"] == found["maj@2"] == 1  # votes are counted on answers, as ever
    assert "was judged by --reward my_reward.py:score" in refusal(capsys, evaluation, "--rescore",
                                                                   "a/eval_samples.jsonl")
    call(evaluation, *flags, "--run_dir", "b")
    call(report, "a", "b", "--out", "c")
    [row] = json.loads(Path("c/report.json").read_text())["compared"]
    assert row["questions"] == found["n"] > 0
    capsys.readouterr()
    shutil.move("my.jsonl", "moved.jsonl")  # --rescore needs its file and nothing else
    call(evaluation, "--rescore", "b/eval_samples.jsonl")
    assert "answers marked as final_answer" in capsys.readouterr().out


def test_pooled_runs_must_have_been_judged_alike(page, writer, capsys):
    [command] = [command for command in shown_commands(PAGE) if " rft.py" in command]
    flags = flags_of(command, writer)
    call(rft, *flags)
    other = [*flags, "--run_dir", "runs/pooled", "--pool", "runs/my-rft"]
    assert "was sampled with reward_hash " in refusal(capsys, rft, *other, "--right_at", "0.5")
    call(rft, *other)


def test_a_reward_that_calls_gold_wrong_is_refused_where_gold_wins(base, tmp_path, capsys):
    """A reward below 1 called every sample wrong under the default --right_at, and IRPO trained on gold against all of
    them, whatever the reward says. ReFT takes the score itself."""
    (tmp_path / "short.py").write_text("def score(text, problem):\n"
                                       "    return 0.5 if problem.solution in text or len(text) % 2 else 0.4\n")
    flags = [*SMALL, "--model", base, "--reward", f"{tmp_path}/short.py:score", "--run_dir", tmp_path / "run"]
    said = refusal(capsys, irpo, *flags)
    assert "0.5, so with --right_at 1 it is wrong" in said and "a smaller --right_at, or --no-gold" in said
    assert not (tmp_path / "run").exists()
    call(irpo, *flags, "--right_at", "0.5", "--iterations", "1")


def test_a_question_with_two_answers_in_a_file_is_refused(tmp_path):
    """It was learnt with both; only a copy in another split was noticed."""
    rows = asked(30)
    path = write(tmp_path / "my.jsonl", *rows, rows[3] | {"answer": 99})
    with pytest.raises(InputError, match="asks twice, in my-4 and my-31, with the answers '4' and '99': 'What is 3"):
        data.load_problems(str(path), "train", answer="number")
