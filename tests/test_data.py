"""Data files -> problems -> prompts and gold solutions -> token ids: what each paper's model is asked and taught, and
what a bad file says."""
import dataclasses
import functools
import importlib
import json
import re
import shutil
import sys
from contextlib import nullcontext
from decimal import Decimal
from types import SimpleNamespace

import pytest
import sentencepiece
from tiny import LLAMA3_JSON as LLAMA3
from tiny import json_dir, tiny_model

import data
from data import __main__ as show
from data.check import check_inputs
from data.files import FILES, read_problems, read_record, records
from data.prompts import MARKS, PROMPTS, TEMPLATES, encode_prompt, encode_solution, gold_text, prompt_text
from data.task import TaskOptions
from data.tokenizer import JsonTokenizer, load_tokenizer, pieces, train_tokenizer
from checkpoint import save_model
from evaluate import SampleOptions
import infra.run
from infra import InputError
from infra.config import option
from infra.run import run_script
from rewards import EXTRACT, OWN_FORMAT, grade
from runs import refusal

ROWS = {  # one record of each format, as the data sets write them
    "gsm8k": {"question": "Ann has 4 pens and buys 3. How many has she?",
              "answer": "She has 4+3 = <<4+3=7>>7 pens.\n#### 7"},
    "svamp": {"ID": "chal-1", "Body": "A pack costs 76 dollars", "Question": "How much are 2?",
              "Equation": "( 76.0 * 2.0 )", "Answer": 152.0, "Type": "Multiplication"},
    "mathqa": {"Problem": "what is 5 % of 40 ?", "Rationale": '"5 % of 40 = 2 . answer b"',
               "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"},
    "math": {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2",
             "unique_id": "train/algebra/1.json"},
    "arc": {"id": "Mercury_1", "answerKey": "3", "question": {"stem": "Which is hot?", "choices": [
        {"text": "ice", "label": "1"}, {"text": "snow", "label": "2"}, {"text": "fire", "label": "3"}]}},
    "mathqa-numeric": {"item_id": "x_0", "question": "what is 5 % of 40 ?",
                       "answer_cot": "5 % of 40 is 2 .", "answer_value": "2.0"},
}
PROGRAM = {"item_id": "svamp_0", "question": "What is 2 + 2?", "answer_value": "4.0",
           "answer_cot": 'def solution():\n    """What is 2 + 2?"""\n    return 2 + 2'}


def write(path, rows: list[dict]) -> None:
    """JSON lines, or an array as ReFT, SVAMP and MathQA publish them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=4) if path.suffix == ".json"
                    else "".join(json.dumps(row) + "\n" for row in rows))


def numbered(task: str, count: int) -> list[dict]:
    """`count` different records of gsm8k, math (every fourth a test problem) or arc."""
    changes = {"gsm8k": lambda i: {"question": f"No {i}: {ROWS['gsm8k']['question']}"},
               "math": lambda i: {"problem": f"No {i}: {ROWS['math']['problem']}",
                                  "unique_id": f"{'train' if i % 4 else 'test'}/algebra/{i}.json"},
               "arc": lambda i: {"id": f"Mercury_{i}"}}
    return [ROWS[task] | changes[task](i) for i in range(count)]


def read_one(task: str) -> data.Problem:
    return read_record(ROWS[task], task, "one")


# --- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, task, train, dev, test", [
    ("publisher", "gsm8k", "train", "train", "test"),
    ("publisher", "svamp", "svamp_nl", "svamp_nl", "SVAMP"),
    ("publisher", "mathqa", "train", "dev", "test"),
    ("publisher", "mathqa-numeric", "mathqa-numeric_nl", "mathqa-numeric_nl", "mathqa-numeric_test_set"),
    ("publisher", "math", "test train", "test train", "test train"),  # divided by unique_id
    ("publisher", "arc", "ARC-Challenge-Train ARC-Easy-Train", "ARC-Challenge-Dev", "ARC-Challenge-Test"),
    *((source, task, f"{task}_{own}", f"{task}_{own}", f"{task}_test_set")
      for source, own in (("reft", "nl"), ("program", "python_sdp"))
      for task in ("gsm8k", "svamp", "mathqa", "mathqa-numeric"))])
def test_which_file_is_which_split(source, task, train, dev, test, tmp_path, monkeypatch):
    """A test file that is trained on, or a dev set that is the test set, shows in no number. Programs are read where
    they are the answer format."""
    monkeypatch.setattr("data.task.require_math_verify", lambda: None)
    for tasks in FILES.values():
        for name in {name for names in tasks.get(task, {}).values() for name in names}:
            write(tmp_path / name, [
                ROWS["math"] | {"problem": f"{name} {i}?", "unique_id": f"{'train' if i % 2 else 'test'}/{i}"}
                if task == "math" else
                {"question": f"{name} {i}?", "answer_cot": "So.", "answer_value": "b" if task == "mathqa" else "1"}
                for i in range(9)])
    flags = {"answer_format": "python"} if source == "program" else {"source": source}
    options = TaskOptions(task=task, path=str(tmp_path), **flags)
    for split, files in (("train", train), ("dev", dev), ("test", test)):
        read = {problem.question.split(".json")[0] for problem in options.problems(split)}
        assert read <= {*files.split()} and (read == {*files.split()} or split == "dev")


@pytest.mark.parametrize("task, row, expected", [
    ("gsm8k", {}, data.Problem("name", ROWS["gsm8k"]["question"], "7", ROWS["gsm8k"]["answer"])),
    ("svamp", {"Answer": "152.0"}, data.Problem("name", "A pack costs 76 dollars. How much are 2?", "152.0", "")),
    ("svamp", {"Body": "Is it 76? ", "Answer": Decimal("152.0")},
     data.Problem("name", "Is it 76? How much are 2?", "152.0", "")),
    ("mathqa", {}, data.Problem("name", "what is 5 % of 40 ?\na ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "b",
                                "5 % of 40 = 2 . answer b\nTherefore, the answer is: b")),
    ("math", {}, data.Problem("train/algebra/1.json", "What is $1+1$?", "2", "It is $\\boxed{2}$.")),
    ("arc", {}, data.Problem("Mercury_1", "Which is hot?\n(1) ice\n(2) snow\n(3) fire", "3", "")),
    ("arc", {"id": None}, data.Problem("name", "Which is hot?\n(1) ice\n(2) snow\n(3) fire", "3", "")),
    ("mathqa-numeric", {}, data.Problem("name", "what is 5 % of 40 ?", "2.0",
                                        "5 % of 40 is 2 .\nTherefore, the answer is: 2.0")),
    ("svamp", PROGRAM, data.Problem("name", "What is 2 + 2?", "4.0", PROGRAM["answer_cot"])),  # ReFT's format, any task
    ("gsm8k", {"question": "q", "answer_value": "4.0"}, data.Problem("name", "q", "4.0", ""))])
def test_records_of_each_format(task, row, expected):
    """Field by field, from records like the published ones; and the gold solution, or else the gold answer, is right
    in its data set's own format."""
    assert read_record(ROWS[task] | row, task, "name") == expected
    marks = "python" if "def solution" in expected.solution else OWN_FORMAT[task]
    gold = gold_text(expected, marks) or "So." + MARKS[marks].format(answer=expected.answer)
    assert grade(gold, expected.answer, task, marks).verdict == "correct"


def test_math_is_split_by_unique_id(tmp_path):
    """prm800k's two files mix the original 7,500 and 5,000: trained on by file, 4,500 test problems would be in train.
    And test problems never lend their solutions to a prompt's examples."""
    rows = numbered("math", 40)
    write(tmp_path / "train.jsonl", rows[:20])
    write(tmp_path / "test.jsonl", rows[20:])
    for split, count, original in [("train", 24, "train/"), ("dev", 6, "train/"), ("test", 10, "test/")]:
        ids = {p.id for p in data.load_problems("math", split, tmp_path)}
        assert len(ids) == count and all(id.startswith(original) for id in ids)
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / "only" / name, rows[::4])
    with pytest.raises(InputError, match="train/"):
        data.examples("math", str(tmp_path / "only"))


def test_dev_is_the_same_in_every_process_and_order(tmp_path):
    """Drawn by Python's hash of a text, a resumed run would train on its dev set; drawn by row, copies of a question
    (ReFT's svamp_nl.json has 210 of them) would be in both."""
    rows = numbered("gsm8k", 20)
    for order in (1, -1):
        write(tmp_path / "train.jsonl", (rows + rows[:15])[::order])
        dev, train = ([p.question for p in data.load_problems("gsm8k", split, tmp_path)] for split in ("dev", "train"))
        assert {*dev} == {rows[i]["question"] for i in (9, 12, 18, 19)}
        assert not {*dev} & {*train} and len(dev) + len(train) == 35


def test_ids_that_occur_twice_get_their_place(tmp_path):
    for name in FILES["publisher"]["arc"]["train"]:
        write(tmp_path / name, numbered("arc", 2))
    ids = [p.id for p in data.load_problems("arc", "train", tmp_path)]
    assert ids == ["Mercury_0", "Mercury_1", "Mercury_0#2", "Mercury_1#3"]
    taken = [dataclasses.replace(read_one("arc"), id=name) for name in ("a#2", "a", "a")]
    assert [p.id for p in data.with_unique_ids(taken)] == ["a#2", "a", "a#2#2"]


def test_dev_is_a_fifth_and_at_most_a_thousand(tmp_path):
    for count, dev in [(5, 1), (7473, 1000)]:
        write(tmp_path / "train.jsonl", numbered("gsm8k", count))
        assert [len(data.load_problems("gsm8k", split, tmp_path)) for split in ("train", "dev")] == [count - dev, dev]
    write(tmp_path / "train.jsonl", numbered("gsm8k", 4))
    with pytest.raises(InputError, match="4 problems: too few"):
        data.load_problems("gsm8k", "train", tmp_path)


@pytest.mark.parametrize("arguments, said", [
    (("gsm9k", "train"), "unknown task 'gsm9k': choose from toy, gsm8k"), (("toy", "tests"), "unknown split 'tests'"),
    (("arc", "train", None, "reft"), "arc has no files of source 'reft': it has publisher")])
def test_unknown_names_are_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        data.load_problems(*arguments)


def test_records_of_both_kinds_of_file():
    """Decimals keep their digits, and only a line feed ends a line."""
    assert list(records('[{"a": 1},\n\n {"a":\n 2.50}]\n')) == [
        ("record 1", {"a": 1}), ("record 2", {"a": Decimal("2.50")})]
    assert list(records('{"a": 1}\r\n\n{"a": 2}')) == [("line 1", {"a": 1}), ("line 3", {"a": 2})]
    assert list(records("")) == [] == list(records("[]"))
    assert list(records('{"a": "x\u2028y\x85"}\n{"a": 0.1000}')) == [
        ("line 1", {"a": "x\u2028y\x85"}), ("line 2", {"a": Decimal("0.1000")})]


def choices(labels: str) -> dict:
    return {"stem": "?", "choices": [{"text": "a", "label": label} for label in labels]}


@pytest.mark.parametrize("task, text, place", [
    ("gsm8k", '{"question": "q", "answer": "#### 1"}\nnot json\n', "line 2: not JSON"),
    ("gsm8k", '[{"question": "q", "answer": "#### 1"},\n{"question": "q"}]', "record 2: no field 'answer'"),
    ("gsm8k", '[{"question": "q", "answer": "#### 1"}]\n[]', "line 2: not JSON"),
    ("gsm8k", "\n\n7", "line 3: not an object but 7"), ("gsm8k", "\n", "line 1: no records"),
    ("gsm8k", dict(answer="72"), "the answer does not end in '#### N'"),
    ("gsm8k", dict(question=" "), "question is ' ', not text"), ("gsm8k", dict(question=3), "question is 3, not text"),
    ("gsm8k", dict(question=1.5), "question is Decimal('1.5'), not text"),
    ("gsm8k", dict(answer_value="1", answer_cot=5), "answer_cot is 5, not text"),
    ("gsm8k", f'{{"question": {"9" * 5000}}}', "line 1: Exceeds the limit"),
    ("gsm8k", json.dumps(ROWS["gsm8k"]) + "\n" + "[" * 10**6, "line 2: maximum recursion depth"),
    ("gsm8k", "[" * 10**6, "line 1: maximum recursion depth"),
    ("gsm8k", dict(question="a \ud800"), "'utf-8' codec can't encode character '\\ud800'"),
    ("mathqa", dict(correct="f"), "correct is 'f'"),
    ("mathqa", dict(correct="d", options="a ) 1 , b ) 2"), "correct is 'd'"),
    ("arc", dict(answerKey="D"), "answerKey 'D'"), ("arc", dict(answerKey=None), "answerKey is None"),
    ("arc", dict(id=7), "id is 7"), ("arc", dict(question=choices("123") | {"stem": ""}), "stem is ''"),
    *(("arc", dict(answerKey="1", question=choices(labels)), "answerKey '1'") for labels in ("12", "123456", "112")),
    ("math", dict(unique_id="algebra/1"), "unique_id is 'algebra/1'"),
    # golds that no response can give
    ("gsm8k", dict(answer="So.\n#### none"), "the right answer is 'none'"),
    ("gsm8k", dict(answer=f"#### {'9' * 5000}"), "the right answer is '999"),
    ("gsm8k", dict(answer="####"), "the right answer is ''"),
    ("gsm8k", dict(answer_value="[]"), "the right answer is '[]'"),
    *(("svamp", dict(Answer=value), f"Answer is {value}, not a n") for value in (None, float("nan"), True, [1])),
    ("mathqa", dict(question="q", answer_value="2"), "the right answer is '2'"),
    ("mathqa-numeric", dict(answer_value=float("inf")), "answer_value is inf, not a "),
    ("arc", dict(answerKey="F", question=choices("ABF")), "the right answer is 'F'"),
    ("math", dict(answer="NaN"), "the right answer is 'NaN'"), ("math", dict(answer=None), "answer is None")])
def test_a_bad_record_is_named(task, text, place, tmp_path):
    """File, place, fault, and what was expected, before any work starts. A gold `null` or NaN, as data tools write
    them, used to load: every response to it was wrong, and became a loser."""
    path = tmp_path / "train.jsonl"
    if isinstance(text, dict):
        text, place = json.dumps(ROWS[task] | text), f"line 1: {place}"
    path.write_text(text)
    with pytest.raises(InputError) as stop:
        read_problems(path, task)
    said = str(stop.value)
    assert said.startswith(f"{path}, {place}") and ' like {"' in said and "Traceback" not in said


def test_files_that_are_no_text_or_absent(tmp_path, monkeypatch):
    """But a byte order mark, and lines that end in CR, as Windows and old Macs write them, are no fault."""
    path = tmp_path / "train.jsonl"
    for content in (b"\xef\xbb\xbf%s\r%s\r", b"\xef\xbb\xbf[%s,\r\n%s]"):
        path.write_bytes(content % ((json.dumps(ROWS["gsm8k"]).encode(),) * 2))
        assert [p.answer for p in read_problems(path, "gsm8k")] == ["7", "7"]
    with pytest.raises(InputError, match="make data TASK=gsm8k"):
        read_problems(tmp_path / "absent.jsonl", "gsm8k")
    path.write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(InputError, match="UTF-8"):
        read_problems(path, "gsm8k")
    monkeypatch.setattr(type(path), "read_text", lambda *args, **how: (_ for _ in ()).throw(PermissionError(13, "No")))
    with pytest.raises(InputError, match="cannot be read: No"):
        read_problems(path, "gsm8k")


# --- prompts --------------------------------------------------------------------------------------

STEPS = "Give step by step reasoning before you answer, and when you're ready to answer,"


@pytest.mark.parametrize("prompt, task, begin, end", [
    ("irpo", "gsm8k", f"Your task is to answer the question below. {STEPS} please use the format "
     '"Final answer: ..."\n', "Question: How many?\nSolution:"),
    ("irpo", "arc", f"Your task is to answer the question below. {STEPS} conclude using the format "
     '"Final answer: (insert letter here)"\n\n', "Question: How many?\nSolution:"),
    ("irpo", "math", f"Your task is to answer the last question below. {STEPS} wrap your answer in \\boxed, and "
     'conclude using the format "Final answer: ..."\n\n', "Question: How many?\nSolution:"),
    ("rft", "gsm8k", "Below is an instruction that describes a task. Write a response that appropriately completes the "
     "request.\n\n", "### Instruction:\nHow many?\n\n### Response:"),
    ("reft", "svamp", "", "Question:\nHow many?\nAnswer reasoning:\n"), ("plain", "toy", "", "How many?\n")])
def test_prompts_of_the_papers(prompt, task, begin, end):
    """The wording is the papers', and every prompt ends where a response begins, in no space."""
    text = prompt_text(prompt, task, "How many?")
    assert text == begin + end and not text.endswith(" ")


def test_math_has_four_examples_and_never_its_own_answer(tmp_path):
    """Four solved training problems, in every process the same; where one of them is asked, a fifth takes its place."""
    rows = numbered("math", 40)
    rows[25]["solution"] = "long " * 80 + ROWS["math"]["solution"]  # else the first of them: too long for a prompt
    write(tmp_path / "train.jsonl", rows[:30])
    write(tmp_path / "test.jsonl", rows[30:])
    options = TaskOptions(task="math", path=str(tmp_path), prompt="irpo")
    examples = data.examples("math", str(tmp_path))
    assert [p.id for p in examples] == [f"train/algebra/{i}.json" for i in (39, 34, 29, 19, 15)]
    test = data.load_problems("math", "test", tmp_path)[1]
    for problem in [test, *examples]:
        text = options.prompt_text(problem)
        asked, solved = text.count("Question: "), text.count("Solution: ")
        assert (asked, solved) == (5, 4) and text.count(problem.question) == 1
        assert text.count("Final answer: 2\n\n") == 4 and text.endswith("\nSolution:")


def test_problems_without_solutions_are_no_examples(tmp_path):
    """Four empty solutions were shown as examples."""
    rows = [row | {"solution": "" if i >= 40 else row["solution"]} for i, row in enumerate(numbered("math", 45))]
    write(tmp_path / "train.jsonl", rows[:40])
    write(tmp_path / "test.jsonl", rows[40:])
    ids = [problem.id for problem in data.load_problems("math", "train", tmp_path) if problem.solution]
    for solved in (5, 4):
        write(tmp_path / "train.jsonl", [row if row["unique_id"] in ids[:solved] else row | {"solution": ""}
                                         for row in rows[:40]])
        data.examples.cache_clear()
        if solved == 5:
            assert {problem.id for problem in data.examples("math", str(tmp_path))} == {*ids[:5]}
    with pytest.raises(InputError, match="needs five solved problems .* and math has 4:"):
        data.examples("math", str(tmp_path))


@pytest.mark.parametrize("task, answer_format, text", [
    ("gsm8k", "hash", ROWS["gsm8k"]["answer"]),
    ("gsm8k", "final_answer", "She has 4+3 = 7 pens.\nFinal answer: 7"),
    ("gsm8k", "trigger", "She has 4+3 = 7 pens.\nTherefore, the answer is: 7"),
    ("gsm8k", "boxed", "She has 4+3 = 7 pens.\nThe answer is \\boxed{7}."),
    ("gsm8k", "minerva", "She has 4+3 = 7 pens.\nFinal Answer: The final answer is $7$. I hope it is correct."),
    ("math", "boxed", ROWS["math"]["solution"]),
    ("math", "final_answer", "It is $\\boxed{2}$.\nFinal answer: 2"),
    ("mathqa", "trigger", "5 % of 40 = 2 . answer b\nTherefore, the answer is: b")])
def test_gold_is_written_in_every_format_and_read_back(task, answer_format, text):
    """A winner in another format than the prompt's would teach that format. In its own format, it is the data set's
    text."""
    problem = read_one(task)
    assert gold_text(problem, answer_format) == text
    assert EXTRACT[answer_format](text).strip("$") == problem.answer
    assert gold_text(read_one("arc"), answer_format) == ""


def test_headings_in_a_solution_are_no_answers():
    """The reasoning was cut off at the first "####", so models learnt to answer without any."""
    row = {"question": "How many?", "answer": "7", "solution": "#### Count\nShe has 3.\n#### Add\n3 + 4 = 7\n#### 7\n"}
    problem = read_record(row, "number", "own-1")
    assert gold_text(problem, "final_answer") == "#### Count\nShe has 3.\n#### Add\n3 + 4 = 7\nFinal answer: 7"
    other = dataclasses.replace(problem, answer="Version 2.0")
    assert gold_text(other, "final_answer").endswith("\nFinal answer: Version 2.0")
    with pytest.raises(ValueError, match="solution ends in '8', and answer is '7'"):
        read_record(row | {"solution": "#### Count\n#### 8"}, "number", "own-1")


@pytest.mark.parametrize("answer_format, end", [
    ("final_answer", "5 * 2 = 10 pens\nFinal answer: 10"),
    ("trigger", "5 * 2 = 10 pens\n\nTherefore, the answer is <10>.\nTherefore, the answer is: 10.0")])
def test_svamps_answer_is_said_once_outside_its_own_format(answer_format, end):
    """ReFT's SVAMP ends every solution in "Therefore, the answer is <10>." before the mark that its code adds: with
    IRPO's mark a gold solution gave its answer twice, as <10> and as 10.0."""
    row = {"question": "How many?", "answer_cot": "5 * 2 = 10 pens\n\nTherefore, the answer is <10>.",
           "answer_value": "10.0"}
    assert gold_text(read_record(row, "svamp", "svamp-1"), answer_format).endswith(end)


@pytest.mark.parametrize("task, flags, marks", [
    ("gsm8k", {}, "hash"), ("svamp", {}, "trigger"), ("gsm8k", {"prompt": "irpo"}, "final_answer"),
    ("svamp", {"prompt": "rft"}, "hash"), ("math", {"prompt": "rft"}, "boxed"),
    ("gsm8k", {"prompt": "reft"}, "trigger"),
    ("gsm8k", {"prompt": "irpo", "answer_format": "boxed"}, "boxed")])
def test_a_prompt_brings_its_answer_format(task, flags, marks):
    """--prompt irpo with golds that end in #### taught two formats at once."""
    assert TaskOptions(task=task, **flags).marks == marks


@pytest.mark.parametrize("module", ["irpo", "reft", "rft", "tools.sft", "tools.evaluation", "tools.chat",
                                    "tools.rerank"])
@pytest.mark.parametrize("seed", [-1, 2**64, 10**400])
def test_seeds_that_no_generator_takes_are_refused(module, seed):
    """--seed -1 was a traceback after the whole warm-up. (numpy takes none below 0, torch none from 2**64 on.)"""
    with pytest.raises(ValueError, match=f"--seed {seed}: must be at "):
        importlib.import_module(module).Config(model="m", seed=seed)


def test_math_without_its_grader_is_refused_at_the_start(monkeypatch):
    """Not after a day of sampling, and not as zeros."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install 'math-verify"):
        run_script(lambda: TaskOptions(task="math").problems("test"))


# --- tokenizers -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    train_tokenizer([json.dumps(ROWS) + str(TEMPLATES) + " [INST] [/INST] < / s > |"], folder, 140, ["\n"])
    return folder


@pytest.mark.parametrize("template, eos, bos", [
    (*LLAMA3, [0]), ("", {"eos_token": {"content": "<|end|>"}}, []), ("$A <|end|>", LLAMA3[1], []),
    ("<|end|> $A", LLAMA3[1], [1]), ("<|end|> $A <|end|>", LLAMA3[1], [1])])
def test_tokenizer_json(tmp_path, template, eos, bos):
    """BOS only where the model's own template begins with one, be it EOS as well (a model that never saw a text without
    it was asked so); EOS from tokenizer_config.json; nothing is cut off or padded; and the tiktoken file that Llama 3
    ships as tokenizer.model is ignored."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    tokenizer = load_tokenizer(json_dir(tmp_path, template, eos))
    assert isinstance(tokenizer, JsonTokenizer)
    text = "a question é数 with <|begin|> and <|end|>"
    ids = encode_prompt(tokenizer, text)
    assert ids == bos + tokenizer.encode(text) and not {0, 1} & {*tokenizer.encode(text)}
    assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text))
    solution = encode_solution(tokenizer, text)
    assert solution[-1] == tokenizer.eos_id == 1 and solution.count(1) == 1 and solution.count(0) == 0
    assert max(solution) < tokenizer.vocab_size


@pytest.mark.parametrize("chat", ["", "llama2"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_begins_with_one_bos(prompt, chat, tmp_path, sentencepiece_dir):
    """And the question is text: "</s>" or "<s>" does not end the prompt or begin another, and braces are no field."""
    question = "How many </s> <s> pens <|end|> <|begin|> are 5% of {question}, {0}, {{}} {or %s}?"
    text = prompt_text(prompt, "gsm8k", question)
    assert question in text
    asked = f"[INST] {text.strip()} [/INST]" if chat else text
    for tokenizer in (load_tokenizer(sentencepiece_dir), load_tokenizer(json_dir(tmp_path, *LLAMA3))):
        bos, *ids = encode_prompt(tokenizer, text, chat)
        assert bos == tokenizer.bos_id is not None and not {tokenizer.bos_id, tokenizer.eos_id} & {*ids}
        assert tokenizer.decode([bos, *ids]) == asked


def test_a_trained_tokenizer_keeps_texts_and_symbols(tmp_path):
    """Two spaces, a line feed and a full-width digit come back as they were; a number is one token anywhere."""
    train_tokenizer(["She has 4+12=<<4+12=16>>16.\n#### 16  ７"] * 3, tmp_path, 80, ["12", "16", "\n"])
    tokenizer = load_tokenizer(tmp_path)
    text = "has 1216  ７\n#### 412"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [piece for _, piece in pieces(tokenizer, tokenizer.encode("4121612"))][-3:] == ["12", "16", "12"]


def test_a_tokenizer_of_long_texts_and_of_many_letters(tmp_path):
    """A text of more than 4,192 bytes was left out, so its letters were unknown; too many letters were a traceback."""
    train_tokenizer(["ab cd " * 2000 + "é", "xy"], tmp_path, 80, [])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"
    with pytest.raises(InputError, match="--vocab_size 20: no tokenizer can be made of these texts: .*smaller than"):
        train_tokenizer(["".join(map(chr, range(0x4e00, 0x4e40)))], tmp_path, 20, [])


def spaceless_dir(folder, **ids) -> None:
    """A tokenizer.model that begins no text with a space; ids: eos_id=-1 leaves EOS out."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Solution: So it x"] * 9), model_prefix=str(folder / "tokenizer"), vocab_size=40,
        model_type="bpe", hard_vocab_limit=False, add_dummy_prefix=False, remove_extra_whitespaces=False,
        user_defined_symbols=["\n"], minloglevel=2, **ids)


def test_a_written_solution_begins_like_a_spoken_one(tmp_path, sentencepiece_dir):
    """Behind "Solution:" byte-level models say " So": gold without the space taught another beginning, and so did
    "Solution:Ben" with a sentencepiece model that begins no text with a space."""
    tokenizer = load_tokenizer(json_dir(tmp_path / "json", *LLAMA3))
    spoken = tokenizer.encode(" So it")
    assert encode_solution(tokenizer, "So it", "Solution:") == [*spoken, 1]
    assert encode_solution(tokenizer, "So it", "reasoning:\n") == [*tokenizer.encode("So it"), 1]
    other = load_tokenizer(sentencepiece_dir)
    assert encode_solution(other, "So it", "Solution:") == encode_solution(other, "So it", "x\n")
    spaceless_dir(tmp_path)
    spaceless = load_tokenizer(tmp_path)
    for prompt, text in (("Solution:", "Solution: So it"), ("x\n", "x\nSo it")):
        assert spaceless.decode(spaceless.encode(prompt) + encode_solution(spaceless, "So it", prompt)) == text


@pytest.mark.parametrize("files, said", [
    ({}, "no tokenizer.model and no tokenizer.json"),
    ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "not a sentencepiece model.*tokenizer.json"),
    ({"tokenizer.json": "{broken"}, "tokenizer.json is not a complete tokenizer"),
    ({"tokenizer.json": None, "tokenizer_config.json": "{broken"}, "tokenizer_config.json cannot be read"),
    ({"tokenizer.json": None, "tokenizer_config.json": "[" * 10**6}, "tokenizer_config.json cannot be read"),
    ({"tokenizer.json": None, "tokenizer_config.json": "[1]"}, "tokenizer_config.json holds a JSON list"),
    *(({"tokenizer.json": None, name: content}, said) for name, content, said in (
        ("tokenizer_config.json", "{}", "no file declares an end token"),
        ("tokenizer_config.json", '{"eos_token": "<eos>"}', "tokenizer_config.json declares the end token '<eos>'"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "surrogates"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "has no attribute"),
        ("special_tokens_map.json", '{"eos_token": "<eos>"}', "special_tokens_map.json declares the end token '<eos>'"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "generation_config.json declares the end token -1"),
        ("config.json", '{"eos_token_id": true}', "config.json declares the end token True"),
        ("config.json", f'{{"eos_token_id": {10**30}}}', "config.json declares the end token 10000"),
        ("config.json", '{"eos_token_id": 1.0}', "config.json declares the end token 1.0"))),
    ({"tokenizer.model": None}, "no file declares an end token")])
def test_broken_tokenizers_are_named(files, said, tmp_path):
    """None: as it should be, but a tokenizer.model has no EOS: it has the id -1, and a solution would end in it."""
    if "tokenizer.json" in files:
        json_dir(tmp_path, *LLAMA3)
    elif "tokenizer.model" in files:
        spaceless_dir(tmp_path, eos_id=-1)
    for name, content in files.items():
        if content:
            (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind, files, ends, note", [
    ("json", {}, [1], ""), ("json", {"config.json": {"eos_token_id": 1}}, [1], ""), ("model", {}, [2], ""),
    ("json", {"config.json": {"eos_token_id": [7, 1]}, "generation_config.json": {"eos_token_id": [1, 8]}}, [1, 8, 7],
     "tokenizer_config.json declares 1; generation_config.json declares 1, 8; config.json declares 7, 1"),
    ("json", {"tokenizer_config.json": {}, "config.json": {"eos_token_id": [7, 8]}}, [7, 8], ""),
    ("json", {"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": {"content": "<|end|>"}}}, [1], ""),
    ("model", {"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": 140}},
     [140, 2], "tokenizer_config.json declares 140; tokenizer.model declares 2"),
    ("model", {"tokenizer_config.json": {"added_tokens_decoder": {"140": {"content": "<|im_end|>"}}},
               "special_tokens_map.json": {"eos_token": "<|im_end|>"}}, [140, 2],
     "special_tokens_map.json declares 140; tokenizer.model declares 2"),
    ("model", {"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [2, 140]}}, [2, 140],
     "tokenizer.model declares 2; generation_config.json declares 2, 140; config.json declares 2")])
def test_every_declared_end_token_counts(kind, files, ends, note, tmp_path, sentencepiece_dir):
    """Llama 3 and Qwen list several in generation_config.json, and chat models of Llama 2 end in an added <|im_end|>.
    With the tokenizer's own alone such a model ran to the length limit each time: 80 samples, none finished. The first
    ends what is written for training; files that disagree are named."""
    if kind == "json":
        json_dir(tmp_path, *LLAMA3)
    else:
        shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert ([*tokenizer.eos_ids], tokenizer.eos_note) == (ends, note)
    assert encode_solution(tokenizer, "pens")[-1] == tokenizer.eos_id == ends[0]


def test_tokenizer_json_without_the_package_names_the_command(tmp_path, monkeypatch):
    folder = json_dir(tmp_path, *LLAMA3)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # what a missing package raises
    with pytest.raises(InputError, match="pip install tokenizers"):
        load_tokenizer(folder)


def test_a_tokenizer_model_within_its_model(sentencepiece_dir, tmp_path):
    """A padded embedding can be sampled from: the error came after all sampling and lost it. And tokenizer_config.json
    can leave BOS out."""
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and encode_prompt(tokenizer, "pens") == (ids := tokenizer.encode("pens"))
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 3]) == "pens"


# --- checks before a run --------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class RunConfig(SampleOptions):
    """What check_inputs reads of a method's config."""
    model: str = option("", "model directory")
    max_new_tokens: int = option(16, "longest response")


@pytest.fixture(scope="module")
def gsm8k_run(tmp_path_factory, sentencepiece_dir) -> RunConfig:
    """A model whose tokenizer fits it, and a folder of problems."""
    folder = tmp_path_factory.mktemp("run")
    vocab_size = load_tokenizer(sentencepiece_dir).vocab_size
    save_model(tiny_model(vocab_size=vocab_size), folder / "model", source=sentencepiece_dir)
    for split in ("train", "test"):
        write(folder / "data" / f"{split}.jsonl", numbered("gsm8k", 10))
    return RunConfig(task="gsm8k", path=str(folder / "data"), model=str(folder / "model"))


@pytest.mark.parametrize("trained_on, warned", [("plain", False), ("irpo", True)])
def test_inputs_that_fit_are_accepted(gsm8k_run, tmp_path, capsys, trained_on, warned):
    """With a warning if the model was trained with another prompt, and a line if its files declare other end tokens."""
    config = dataclasses.replace(gsm8k_run, model=str(tmp_path / "iter1" / "model"))
    shutil.copytree(gsm8k_run.model, config.model)
    run = {"run_dir": "", "prompt": trained_on, "chat": "", "answer_format": ""}
    (tmp_path / "config.json").write_text(json.dumps(run))
    (tmp_path / "iter1/model/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5][:1 + warned]}))
    tokenizer = load_tokenizer(config.model)
    check_inputs(config, tokenizer, config.problems("train"), config.problems("test"))
    said = capsys.readouterr().out
    assert "check: 18 prompts fit, and 8 of 8 gold solutions are graded correct\n" in said
    assert ("warning: " in said) == ("ends with any of the tokens 2, 5, since files disagree" in said) == warned
    tokenizer.eos_id = tokenizer.vocab_size  # an added end token that the embedding has no row for
    with pytest.raises(InputError, match="the tokenizer gives token .*, and the model in .* knows"):
        check_inputs(config, tokenizer, [], config.problems("test"))


def test_a_start_with_another_tokenizer_is_refused(gsm8k_run, tmp_path, capsys):
    """It would train on another model's token ids. And a folder's config.json that no run made says nothing."""
    config = dataclasses.replace(gsm8k_run, model=str(tmp_path / "model"))
    shutil.copytree(gsm8k_run.model, config.model)
    (tmp_path / "config.json").write_text(json.dumps({"prompt": "\x1b[31m"}))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["She has 3 pens and buys 4 . How many ? #### 7"] * 9),
        model_prefix=str(tmp_path / "other"), vocab_size=30, hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "start").mkdir()
    shutil.copy(tmp_path / "other.model", tmp_path / "start" / "tokenizer.model")
    for start, refused in ((config.model, False), (str(tmp_path / "start"), True)):
        object.__setattr__(config, "start_from", start)
        with pytest.raises(InputError, match="--start_from .* has another tokenizer") if refused else nullcontext():
            check_inputs(config, load_tokenizer(config.model), config.problems("train"), config.problems("test"))
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, tokenizer, said", [
    ({}, {"decode": lambda own, ids: own.decode(ids).replace("7", "1")},
     r"does not fit this task(.|\n)*#### 1\nverdict wrong, answer 1, gold answer 7"),
    ({}, {"encode": lambda own, text: [own.bos_id, *own.encode(text)]}, "only 0 of 18 prompts have exactly one BOS"),
    ({}, {"encode": lambda own, text: [*own.encode(text), own.vocab_size]}, "token .*, and the model in .* knows"),
    ({"max_new_tokens": 120}, {}, "longest prompt has .* tokens, .*_tokens 120 it exceeds the model's 128 positions")])
def test_inputs_that_do_not_fit_are_refused(gsm8k_run, flags, tokenizer, said):
    """Before an hour is spent: a tokenizer that does not know all digits, that adds a BOS itself, or of another
    model."""
    own = load_tokenizer(gsm8k_run.model)
    methods = {name: functools.partial(tokenizer[name], own) if name in tokenizer else getattr(own, name)
               for name in ("encode", "decode")}
    other = SimpleNamespace(bos_id=own.bos_id, eos_id=own.eos_id, eos_note="", begins_with_space=True, chat_template="",
                            **methods)
    problems = [gsm8k_run.problems(split) for split in ("train", "test")]
    with pytest.raises(InputError, match=said):
        check_inputs(dataclasses.replace(gsm8k_run, **flags), other, *problems)


@pytest.mark.parametrize("module", ["irpo", "reft", "rft", "tools.evaluation"])
def test_questions_that_are_only_measured_must_fit_too(gsm8k_run, module, tmp_path, capsys):
    """Else a run of hours ends at its first evaluation."""
    shutil.copytree(gsm8k_run.path, tmp_path / "data")
    write(tmp_path / "data" / "test.jsonl", [ROWS["gsm8k"] | {"question": "How many? " * 40}])
    flags = ["--task", "gsm8k", "--path", tmp_path / "data", "--prompt", "plain", "--max_new_tokens", 16, "--model",
             gsm8k_run.model, "--run_dir", tmp_path / "run", *["--select_every", 0][:2 * (module == "irpo")]]
    assert "the longest prompt has" in refusal(capsys, importlib.import_module(module), *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["irpo", "reft", "rft", "tools.sft", "tools.evaluation"])
def test_a_run_is_not_resumed_with_another_tokenizer(gsm8k_run, module, tmp_path, monkeypatch):
    """Its samples, pairs, reference log-probabilities and states are token ids: with another tokenizer of the same size
    a resumed run trained on noise, and with another end token on responses that do not end."""
    model, run, main = tmp_path / "model", tmp_path / "run", importlib.import_module(module)
    shutil.copytree(gsm8k_run.model, model)
    shutil.copytree(gsm8k_run.path, tmp_path / "data")
    config = json.loads((model / "config.json").read_text())

    class Opened(Exception):
        """The run may go on; the test need not."""

    def open_run(*args, **inputs):
        infra.run.open_run(*args, **inputs)
        raise Opened

    monkeypatch.setattr(main, "open_run", open_run)
    monkeypatch.setattr(main, "check_inputs", lambda *args: None, raising=False)
    monkeypatch.setattr("sys.argv", [module, "--task", "gsm8k", "--path", str(tmp_path / "data"), "--model", str(model),
                                     "--run_dir", str(run), *["--select_every", "0"][:2 * (module == "irpo")]])
    for _ in range(2):
        with pytest.raises(Opened):
            main.main()
    changes = [lambda: (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]})),
               lambda: (model / "special_tokens_map.json").write_text('{"eos_token": "<s>"}'),
               lambda: train_tokenizer(["another"], model, 140, [*map(str, range(100))])]
    for change in changes:
        shutil.rmtree(model)
        shutil.copytree(gsm8k_run.model, model)
        change()
        with pytest.raises(InputError, match="other inputs:\n  weights: "):
            main.main()

    shutil.rmtree(model)
    shutil.copytree(gsm8k_run.model, model)
    for split in {"tools.sft": ["train"], "tools.evaluation": ["test"]}.get(module, ["train", "test"]):
        write(tmp_path / "data" / f"{split}.jsonl", numbered("gsm8k", 11))
        with pytest.raises(InputError, match="other inputs:\n  problems: "):
            main.main()
        write(tmp_path / "data" / f"{split}.jsonl", numbered("gsm8k", 10))


# --- show -----------------------------------------------------------------------------------------

def test_show_paints_the_mask(tmp_path, sentencepiece_dir, monkeypatch, capsys):
    """What is green is what is trained on: the solution in its format, with EOS, and nothing else."""
    write(tmp_path / "train.jsonl", numbered("gsm8k", 10))
    for model in ([], ["--model", str(sentencepiece_dir)]):
        monkeypatch.setattr("sys.argv", ["data", "--task", "gsm8k", "--path", str(tmp_path), "--prompt",
                                         "irpo", "--show", "2", *model])
        show.main()
        shown = capsys.readouterr().out
        green = "".join(re.findall(r"\033\[(?:32|92)m(.*?)\033\[0m", shown, re.DOTALL))
        grey = "".join(re.findall(r"\033\[(?:90|37)m(.*?)\033\[0m", shown, re.DOTALL))
        assert green.count("<EOS>") == 2 and green.count("inal answer") == 2
        assert grey.count("Solution") == 2 if not model else grey.count("<BOS>") == 2
        assert "8 problems in gsm8k train" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    show.main()
    assert "\033" not in (plain := capsys.readouterr().out) and plain.count("<EOS>]]") == 2


class Bytes:
    """A tokenizer whose tokens are bytes, as those that Llama falls back to are."""
    bos_id, eos_id = None, 10

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_pieces_wait_for_complete_characters():
    """Half of a character printed as it comes is a question mark in a box that never goes away."""
    ids = list("aé€b\n".encode())
    texts = ["a", "", "é", "", "", "€", "b", "\n"]
    assert list(pieces(Bytes(), iter(ids))) == list(zip(ids, texts, strict=True))
    assert show.token_texts(Bytes(), ids) == [*texts[:-1], "<EOS>"]
