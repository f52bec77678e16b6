"""Data files -> problems -> prompts and gold solutions -> token ids: what each paper's model is asked
and taught, and what a bad file says."""
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

import data
from data import __main__ as show
from data.files import FILES, read_problems, records
from data.prompts import (ANSWER_FORMATS, CHATS, MARKS, PROMPT_FORMATS, PROMPTS, TEMPLATES,
                          encode_prompt, encode_solution, gold_text, prompt_text)
from data.tokenizer import JsonTokenizer, load_tokenizer, pieces, train_tokenizer
import evaluate
import irpo
import rft
from infra.experiment import run_script
from rewards import EXTRACT, OWN_FORMAT, grade
from sample import generate, print_stream, stream
from data.task import TaskOptions

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
    """`count` different records of a task."""
    rows = []
    for i in range(count):
        row = json.loads(json.dumps(ROWS[task]))
        target = row["question"] if task == "arc" else row
        for name in ("question", "Body", "Problem", "problem", "stem"):
            if isinstance(target.get(name), str):
                target[name] = f"No {i}: " + target[name]
        if "unique_id" in row:
            row["unique_id"] = f"{'test' if i % 4 == 0 else 'train'}/algebra/{i}.json"
        if "id" in row:
            row["id"] = f"Mercury_{i}"
        rows.append(row)
    return rows


# --- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ROWS)
def test_every_data_set_loads_and_grades_its_own_gold(task, tmp_path):
    """Folder with the published file names, all splits; the gold solution, where there is one, is
    graded right in the data set's own format."""
    names = {name for split in FILES["publisher"][task].values() for name in split}
    for name in names:
        write(tmp_path / name, numbered(task, 40))
    splits = {split: data.load_problems(task, split, tmp_path) for split in data.SPLITS}
    assert all(splits.values())
    for problem in (p for problems in splits.values() for p in problems[:10]):
        gold = problem.solution or "So." + MARKS[OWN_FORMAT[task]].format(answer=problem.answer)
        assert grade(gold, problem.answer, task).verdict == "correct"
    train, dev = ({p.id for p in splits[name]} for name in ("train", "dev"))
    assert len(train) == len(splits["train"])
    if "dev" not in FILES["publisher"][task]:
        assert not train & dev and len(dev) == len(train | dev) // 5


def test_records_of_each_format():
    """Field by field, from records like the published ones."""
    def read(row, task):
        from data.files import read_record
        return read_record(row, task, "name")

    assert read(ROWS["gsm8k"], "gsm8k").answer == "7"
    assert read(ROWS["svamp"] | {"Answer": "152.0"}, "svamp") == data.Problem(
        "name", "A pack costs 76 dollars. How much are 2?", "152.0", "")
    mathqa = read(ROWS["mathqa"], "mathqa")
    assert mathqa.question == "what is 5 % of 40 ?\na ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5"
    assert mathqa.solution == "5 % of 40 = 2 . answer b\nTherefore, the answer is: b"
    assert read(ROWS["math"], "math") == data.Problem(
        "train/algebra/1.json", "What is $1+1$?", "2", "It is $\\boxed{2}$.")
    arc = read(ROWS["arc"], "arc")
    assert (arc.id, arc.answer) == ("Mercury_1", "3")
    assert arc.question == "Which is hot?\n(1) ice\n(2) snow\n(3) fire"
    words = read(ROWS["mathqa-numeric"], "svamp")  # ReFT's format is read for every task
    assert words.solution == "5 % of 40 is 2 .\nTherefore, the answer is: 2.0"
    assert read(PROGRAM, "svamp").solution == PROGRAM["answer_cot"]
    assert read({k: v for k, v in PROGRAM.items() if k != "answer_cot"}, "svamp").solution == ""


def test_examples_are_never_test_problems(tmp_path):
    """--path with the test file alone: its solved problems were shown in the prompts of the others."""
    path = tmp_path / "test.jsonl"
    write(path, [row | {"unique_id": row["unique_id"].replace("train/", "test/")} for row in numbered("math", 40)])
    assert len(data.load_problems("math", "test", path)) == 40
    with pytest.raises(SystemExit, match="train/"):
        data.examples("math", str(path))


def test_drivers_refuse_one_file_for_all_splits(tmp_path):
    """Train, dev and test came from the same file, and accuracy was measured on what was trained on."""
    write(tmp_path / "my.jsonl", numbered("gsm8k", 50))
    flags = dict(model="m", task="gsm8k", path=str(tmp_path / "my.jsonl"))
    for Config in (irpo.Config, rft.Config):
        with pytest.raises(ValueError, match="folder"):
            Config(**flags)
    evaluate.Config(**flags)


def test_math_is_split_by_unique_id(tmp_path):
    """prm800k's two files mix the original 7,500 and 5,000: trained on by file, 4,500 test problems
    would be in train."""
    write(tmp_path / "train.jsonl", numbered("math", 40))
    write(tmp_path / "test.jsonl", [row | {"unique_id": row["unique_id"].replace("/algebra/", "/more/")}
                                    for row in numbered("math", 40)])
    ids = {split: {p.id for p in data.load_problems("math", split, tmp_path)} for split in data.SPLITS}
    assert len(ids["test"]) == 20 and all(id.startswith("test/") for id in ids["test"])
    assert len(ids["train"] | ids["dev"]) == 60
    assert all(id.startswith("train/") for id in ids["train"] | ids["dev"])


def test_dev_is_fixed_and_copies_of_a_question_stay_together(tmp_path):
    """ReFT's svamp_nl.json has 210 questions twice: drawn by row, half of their copies would be
    trained on. And the order of a file must not matter."""
    rows = numbered("gsm8k", 60)
    write(tmp_path / "a" / "train.jsonl", rows + rows[:30])
    write(tmp_path / "b" / "train.jsonl", (rows + rows[:30])[::-1])
    dev = [p.question for p in data.load_problems("gsm8k", "dev", tmp_path / "a")]
    train = [p.question for p in data.load_problems("gsm8k", "train", tmp_path / "a")]
    assert len(set(dev)) == 12 and not set(dev) & set(train) and len(dev) + len(train) == 90
    assert {p.question for p in data.load_problems("gsm8k", "dev", tmp_path / "b")} == set(dev)


def test_dev_takes_at_most_a_thousand(tmp_path):
    write(tmp_path / "train.jsonl", numbered("gsm8k", 7473))
    assert len(data.load_problems("gsm8k", "dev", tmp_path)) == 1000
    assert len(data.load_problems("gsm8k", "train", tmp_path)) == 6473


def test_one_file_stands_for_a_split(tmp_path):
    """--path FILE: all of it for test; for train without the dev part that belongs to it."""
    write(tmp_path / "my.jsonl", numbered("gsm8k", 50))
    counts = [len(data.load_problems("gsm8k", split, tmp_path / "my.jsonl")) for split in data.SPLITS]
    assert counts == [40, 10, 50]


def test_programs_and_words_come_from_their_files(tmp_path):
    write(tmp_path / "svamp_nl.json", [ROWS["mathqa-numeric"] | {"question": f"{i}?"} for i in range(10)])
    write(tmp_path / "svamp_python_sdp.json", [PROGRAM | {"question": f"{i}?"} for i in range(10)])
    words = TaskOptions(task="svamp", path=str(tmp_path), prompt="reft")
    assert words.marks == "trigger" and "Therefore" in words.problems("train")[0].solution
    programs = TaskOptions(task="svamp", path=str(tmp_path), prompt="reft", answer_format="python")
    problem = programs.problems("train")[0]
    assert problem.solution == PROGRAM["answer_cot"]
    assert grade(gold_text(problem, "python"), "4.0", "svamp", "python").verdict == "correct"


def test_records_count_lines_in_both_kinds_of_file():
    assert list(records('[{"a": 1},\n\n {"a":\n 2.50}]\n')) == [(1, {"a": 1}), (3, {"a": "2.50"})]
    assert list(records('{"a": 1}\n\n{"a": 2}')) == [(1, {"a": 1}), (3, {"a": 2})]
    assert list(records("")) == [] == list(records("[]"))
    assert list(records('{"a": "x\u2028y\x85"}\n{"a": 0.1000}')) == [
        (1, {"a": "x\u2028y\x85"}), (2, {"a": "0.1000"})]


@pytest.mark.parametrize("text, line", [
    ('{"question": "q", "answer": "#### 1"}\nnot json\n', 2),
    ('[{"question": "q", "answer": "#### 1"},\n{"question": "q"}]', 2),
    ('{"question": "q", "answer": "72"}', 1), ("[1]", 1), ("\n\n7", 3),
    ('{"question": 3, "answer": "#### 1"}', 1), ('{"question": " ", "answer": "#### 1"}', 1),
    ('{"question": "q", "answer": "####"}', 1), ('[{"question": "q", "answer": "#### 1"}', 1),
    ('[{"question": "q", "answer": "#### 1"}]\n[]', 2),
    ('{"question": "q", "answer_value": null, "answer_cot": 5}', 1)])
def test_a_bad_record_is_named(text, line, tmp_path):
    """File, line, fault, and what was expected, before any work starts."""
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        read_problems(path, "gsm8k")
    assert f"{path}, line {line}: " in str(stop.value) and "question" in str(stop.value)


@pytest.mark.parametrize("task, change", [
    ("mathqa", {"correct": "f"}), ("arc", {"answerKey": "D"}), ("math", {"answer": ""}),
    ("arc", {"question": {"stem": "?", "choices": [{"text": "a", "label": "3"}]}}),
    ("math", {"unique_id": None}), ("math", {"unique_id": "algebra/1"}), ("svamp", {"Body": None})])
def test_bad_values_are_refused(task, change, tmp_path):
    write(tmp_path / "x.jsonl", [ROWS[task] | change])
    with pytest.raises(SystemExit, match="line 1"):
        read_problems(tmp_path / "x.jsonl", task)


def test_files_that_are_no_text_or_absent_or_empty(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}')
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, word in [("latin", "UTF-8"), ("empty", "no records"), ("absent", "make data TASK=gsm8k")]:
        with pytest.raises(SystemExit, match=word):
            read_problems(tmp_path / f"{name}.jsonl", "gsm8k")


# --- prompts --------------------------------------------------------------------------------------

def test_prompts_of_the_papers():
    """Their beginnings and ends: wording is the papers', and every one ends where an answer begins."""
    q = "How many?"
    assert prompt_text("irpo", "gsm8k", q).startswith("Your task is to answer the question below. Give "
                                                      "step by step reasoning")
    assert prompt_text("irpo", "gsm8k", q).endswith('"Final answer: ..."\nQuestion: How many?\nSolution:')
    assert prompt_text("irpo", "arc", q).endswith('"Final answer: (insert letter here)"\n\nQuestion: '
                                                  "How many?\nSolution:")
    assert prompt_text("rft", "gsm8k", q).endswith("\n\n### Instruction:\nHow many?\n\n### Response:")
    assert prompt_text("reft", "svamp", q) == "Question:\nHow many?\nAnswer reasoning:\n"
    assert prompt_text("plain", "toy", q, chat="llama2") == "[INST] How many? [/INST]"
    for template in TEMPLATES.values():
        assert not template.endswith(" ")
    for chat in CHATS.values():
        assert not chat.endswith(" ")


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_a_question_is_inserted_as_it_is(question):
    """Braces, percent signs and names of fields in a question are text."""
    for prompt in PROMPTS:
        assert question in prompt_text(prompt, "gsm8k", question)
        assert question.strip() in prompt_text(prompt, "gsm8k", question, chat="llama2")
    assert "{question}" in prompt_text("irpo", "gsm8k", "{question}")


def test_math_has_four_examples_and_never_its_own_answer(tmp_path):
    """Four solved training problems in the format asked for; where the question is one of them, a fifth
    takes its place."""
    write(tmp_path / "train.jsonl", numbered("math", 40))
    write(tmp_path / "test.jsonl", numbered("math", 4))
    options = TaskOptions(task="math", path=str(tmp_path), prompt="irpo")
    examples = data.examples("math", str(tmp_path))
    train_ids = {p.id for p in data.load_problems("math", "train", tmp_path)}
    assert len(examples) == 5 and {p.id for p in examples} <= train_ids
    [test] = [p for p in data.load_problems("math", "test", tmp_path) if p.id == "test/algebra/4.json"]
    for problem in [test, *examples]:
        text = options.prompt_text(problem)
        asked, solved = text.count("Question: "), text.count("Solution: ")
        assert (asked, solved) == (5, 4) and text.count(problem.question) == 1
        assert text.count("Final answer: 2\n\n") == 4 and text.endswith("\nSolution:")


@pytest.mark.parametrize("answer_format", [name for name in ANSWER_FORMATS if name != "python"])
def test_gold_is_written_in_every_format_and_read_back(answer_format):
    """A winner in another format than the prompt's would teach that format."""
    problem = read_one("gsm8k")
    text = gold_text(problem, answer_format)
    assert EXTRACT[answer_format](text).strip("$") == "7"
    assert ("<<4+3=7>>" in text) == (answer_format == "hash")
    assert text.startswith("She has 4+3 = ") and "####" not in text.replace("\n#### 7", "")


def read_one(task: str) -> data.Problem:
    from data.files import read_record
    return read_record(ROWS[task], task, "one")


def test_gold_in_its_own_format_is_the_data_sets_text():
    assert gold_text(read_one("gsm8k"), "hash") == ROWS["gsm8k"]["answer"]
    assert gold_text(read_one("math"), "boxed") == ROWS["math"]["solution"]
    assert gold_text(read_one("mathqa"), "trigger") == read_one("mathqa").solution
    assert gold_text(read_one("arc"), "final_answer") == ""
    assert gold_text(read_one("math"), "final_answer") == "It is $\\boxed{2}$.\nFinal answer: 2"


def test_a_prompt_brings_its_answer_format():
    """--prompt irpo with golds that end in #### taught two formats at once."""
    assert TaskOptions(task="gsm8k").marks == "hash"
    assert TaskOptions(task="gsm8k", prompt="irpo").marks == "final_answer"
    assert TaskOptions(task="svamp").marks == "trigger"
    assert TaskOptions(task="math", prompt="rft").marks == "boxed"
    assert TaskOptions(task="gsm8k", prompt="irpo", answer_format="boxed").marks == "boxed"
    assert set(PROMPT_FORMATS.values()) <= set(ANSWER_FORMATS)


def test_math_without_its_grader_is_refused_at_the_start(monkeypatch):
    """Not after a day of sampling, and not as zeros."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install 'math-verify"):
        run_script(lambda: TaskOptions(task="math").problems("test"))


# --- tokenizers -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    train_tokenizer([json.dumps(ROWS) + str(TEMPLATES) + " < / s >"], folder, 120, ["\n"])
    return folder


def json_dir(folder, bos: bool, config: dict):
    """A byte-level tokenizer.json as Llama 3 (with BOS) or Qwen2 (without) ship it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["a question about pens"] * 3, tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bos, eos", [(True, "<|end|>"), (False, {"content": "<|end|>"})])
def test_tokenizer_json(tmp_path, bos, eos):
    """BOS only where the model's own template puts one; EOS from tokenizer_config.json."""
    tokenizer = load_tokenizer(json_dir(tmp_path, bos, {"eos_token": eos}))
    assert isinstance(tokenizer, JsonTokenizer)
    text = "a question é数 with <|begin|> and <|end|>"
    ids = encode_prompt(tokenizer, text)
    assert ids.count(0) == bos and (ids[0] == 0) == bos and ids.count(1) == 0
    assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text))
    solution = encode_solution(tokenizer, text)
    assert solution[-1] == tokenizer.eos_id == 1 and solution.count(1) == 1 and solution.count(0) == 0
    assert max(solution) < tokenizer.vocab_size


def test_a_written_solution_begins_like_a_spoken_one(tmp_path, sentencepiece_dir):
    """Behind "Solution:" byte-level models say " So": gold without the space taught another beginning."""
    tokenizer = load_tokenizer(json_dir(tmp_path, True, {"eos_token": "<|end|>"}))
    spoken = tokenizer.encode(" So it")
    assert encode_solution(tokenizer, "So it", "Solution:") == [*spoken, 1]
    assert encode_solution(tokenizer, "So it", "reasoning:\n") == [*tokenizer.encode("So it"), 1]
    other = load_tokenizer(sentencepiece_dir)
    assert encode_solution(other, "So it", "Solution:") == encode_solution(other, "So it", "x\n")


def test_a_tiktoken_file_beside_a_tokenizer_json_is_passed_over(tmp_path):
    folder = json_dir(tmp_path, True, {"eos_token": "<|end|>"})
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert isinstance(load_tokenizer(folder), JsonTokenizer)
    (folder / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(SystemExit, match="tokenizer_config.json"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(SystemExit, match="tokenizer.json"):
        load_tokenizer(folder)


def test_ids_beyond_the_tokenizer_are_dropped(sentencepiece_dir):
    """A padded embedding can be sampled from; the error came after all sampling and lost it."""
    tokenizer = load_tokenizer(sentencepiece_dir)
    ids = tokenizer.encode("pens")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 3]) == "pens"


def test_tokenizer_json_without_an_eos_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="tokenizer_config.json"):
        load_tokenizer(json_dir(tmp_path, True, {"eos_token": None}))


def test_tokenizer_json_without_the_package_names_the_command(tmp_path, monkeypatch):
    folder = json_dir(tmp_path, True, {"eos_token": "<|end|>"})
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)  # what a missing package raises
    with pytest.raises(SystemExit, match="pip install tokenizers"):
        load_tokenizer(folder)


def test_specials_in_a_text_are_text(sentencepiece_dir):
    """A question that holds "</s>" would otherwise end the prompt, or begin another."""
    tokenizer = load_tokenizer(sentencepiece_dir)
    ids = encode_prompt(tokenizer, "pens </s> <s> more")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "pens </s> <s> more"


def test_a_tokenizer_config_can_leave_bos_out(sentencepiece_dir, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and encode_prompt(tokenizer, "a") == tokenizer.encode("a")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    """Llama 3 ships a tiktoken file as tokenizer.model."""
    with pytest.raises(SystemExit, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(SystemExit, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)


# --- show, stream ---------------------------------------------------------------------------------

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


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.8, 5)])
def test_a_stream_is_what_generate_draws(temperature, top_p, top_k):
    """Token by token, the same responses."""
    model, prompt = tiny_model(), [1, 5, 9, 4]
    options = dict(max_new_tokens=20, temperature=temperature, top_p=top_p, top_k=top_k, eos_id=2,
                   seed=7)
    [responses] = generate(model, [prompt], num_samples=3, **options)
    streams = [list(stream(model, prompt, sample=n, **options)) for n in range(3)]
    assert streams == [response.ids for response in responses]
    assert torch.is_grad_enabled()


class Bytes:
    """A tokenizer whose tokens are bytes, as those that Llama falls back to are."""
    bos_id, eos_id = None, 10

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_pieces_wait_for_whole_characters(capsys):
    """Half of a character printed as it comes is a question mark in a box that never goes away."""
    ids = list("aé€b\n".encode())
    texts = ["a", "", "é", "", "", "€", "b", "\n"]
    assert list(pieces(Bytes(), iter(ids))) == list(zip(ids, texts, strict=True))
    assert print_stream(Bytes(), iter(ids)) == ids
    assert capsys.readouterr().out == "aé€b\n"
    assert show.token_texts(Bytes(), ids) == [*texts[:-1], "<EOS>"]
