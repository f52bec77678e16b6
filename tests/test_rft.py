"""Rejection-sampling fine-tuning: which paths are kept, what is counted on them, and the run."""
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_drivers import call, read_lines, refusal

import evaluate
import rft
import train
from checkpoint import load_model, save_model
from data import load_problems, toy
from data.prompts import encode_prompt, encode_solution
from data.tokenizer import load_tokenizer
from rft import diversity, levenshtein, path_key, right_paths, select_paths

GOLD = "Ann has 2+3=<<2+3=5>>5. That makes 5*2=<<5*2=10>>10.\n#### 10"


def path(*equations: str, words: str = "", answer: str = "10") -> str:
    return " ".join([words, *(f"So <<{e}>>." for e in equations)]) + f"\n#### {answer}"


# --- distance -------------------------------------------------------------------------------------

def slow_levenshtein(a: str, b: str) -> int:
    """Wagner and Fischer's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[-1] + 1))
    return row[-1]


@given(st.text("abé\n", max_size=90), st.text("abé\n", max_size=90))
def test_levenshtein_is_the_table_in_bits(a, b):
    assert levenshtein(a, b) == slow_levenshtein(a, b) == levenshtein(b, a)


def test_levenshtein_of_long_paths():
    """More rows than a machine word has bits, with carries through all of them."""
    rng = random.Random(0)
    for n in (63, 64, 65, 128, 300):
        a, b = ("".join(rng.choice("12+= \n") for _ in range(n + rng.randrange(9))) for _ in range(2))
        assert levenshtein(a, b) == slow_levenshtein(a, b)
    assert levenshtein("a" * 200, "a" * 200) == 0 and levenshtein("a" * 200, "b" * 130) == 200


# --- selection ------------------------------------------------------------------------------------

def slow_select(samples: list[str], right: list[int]) -> list[int]:
    """Algorithm 1 of the paper with texts in a list, each loop as it is written there."""
    keys, kept = [], []
    for i in right:
        key = path_key(samples[i])
        if key not in keys:
            keys.append(key)
            kept.append(i)
            continue
        s = keys.index(key)
        old = new = 0
        for j in kept:
            if samples[j] != samples[kept[s]]:
                old += slow_levenshtein(samples[kept[s]], samples[j])
                new += slow_levenshtein(samples[i], samples[j])
        if new > old:
            kept[s] = i
    return kept


@given(st.lists(st.builds(
    lambda key, words, answer: path(*key, words=words, answer=answer),
    st.sampled_from([["2+3=5", "5*2=10"], ["3+2=5", "5*2=10"], ["5*2=10"], [], ["2+2=5"]]),
    st.sampled_from(["", "a", "ab c", "abcdef", "fedcba"]), st.sampled_from(["10", "10.0", "9"])),
    max_size=12))
def test_selection_is_algorithm_1(samples):
    right = right_paths(samples, GOLD, "toy", "hash", True)
    assert right == [i for i, text in enumerate(samples) if "#### 9" not in text and "2+2" not in text]
    assert select_paths(samples, GOLD, "toy") == slow_select(samples, right)


def test_a_replacement_is_in_place_and_strict():
    """A farther path takes the place of the one with its equations; an equally far one does not; with
    one kept path there is nothing to be far from."""
    short, long, other = path("2+3=5"), path("2+3=5", words="x" * 30), path("3+2=5")
    assert select_paths([short, long], "10", "toy") == [0]
    assert select_paths([short, other, long], "10", "toy") == [2, 1]
    assert select_paths([long, other, short], "10", "toy") == [0, 1]
    assert select_paths([short, other, short], "10", "toy") == [0, 1]
    assert select_paths([short, other, long], "10", "toy", select="first") == [0, 1]


def test_rows_of_the_paper_as_options():
    a, b, c = path("2+3=5"), path("2+3=5", words="y"), path("3+2=5")
    wrong = path("2+3=6")
    samples = [a, a, b, c, wrong, path("2+3=5", answer="9")]
    assert select_paths(samples, "10", "toy", dedup="none") == [0, 1, 2, 3]
    assert select_paths(samples, "10", "toy", dedup="string") == [0, 2, 3]
    assert select_paths(samples, "10", "toy") == [0, 3]
    assert select_paths(samples, "10", "toy", equation_filter=False) == [0, 3, 4]


@pytest.mark.parametrize("text, right", [
    ("#### 72", True), ("#### 72.0", True), ("#### 72.", True), ("#### 1,3\n#### 72", False),
    ("#### $72", False), ("####72", False), ("#### x\n#### 72", True), ("#### 72\0#### 3", True),
    ("\0#### 72", False), ("#### 1.2.3", False), ("#### 72 clips", True), ("#### 7,2", True), ("", False)])
def test_right_answers_by_the_authors_rule(text, right):
    """The first number behind `#### `, without its commas, as a float; nothing else is an answer."""
    assert rft.is_right(text, "72", "gsm8k", "hash") == right
    assert rft.is_right(text, "so\n#### 72", "gsm8k", "hash") == right


def test_other_formats_and_data_sets_go_by_their_grader():
    """With --prompt reft no path of GSM8K was ever right: step 3 looked for ####, whatever was asked."""
    final = ["So.\nFinal answer: 72", "So.\nFinal answer: 73"]
    assert select_paths(final, "72", "gsm8k", answer_format="final_answer") == [0]
    assert select_paths(["So.\n#### 8", "So.\n#### 9"], "8.0", "svamp", answer_format="hash") == [0]
    assert select_paths(["Therefore, the answer is: 4", "Therefore, the answer is: 5"], "4.0", "svamp") == [0]


# --- figures --------------------------------------------------------------------------------------

def test_diversity_of_a_hand_made_pool():
    """Two models, two questions. Model 0 finds A twice and B; model 1 finds B, and C alone for q 1."""
    A, B, C = path("2+3=5"), path("3+2=5"), path("9+1=10")
    found = [[[(0, A), (1, A), (4, B)], []], [[(0, B)], [(2, C)]]]
    row = diversity(found, [A, A], 5)
    assert row["correct_paths"] == 2.5 and row["distinct_paths"] == 1.5
    assert row["distinct_paths_and_gold"] == 2.0  # {A, B} and {C, A}
    assert row["exclusive"] == [1 / 3, 1 / 3]  # of A, B and C, A is model 0's and C model 1's
    assert row["solved"] == 1.0 and row["histogram"] == {"1": 1, "4": 1}
    first = diversity(found, [A, A], 1)
    assert first["correct_paths"] == 1.0 and first["solved"] == 0.5 and first["exclusive"] == [0.5, 0.5]
    nothing = diversity([[[], []]], [A, A], 5)
    assert nothing["distinct_paths"] == 0 and nothing["exclusive"] == [0.0]


# --- the run --------------------------------------------------------------------------------------

SMALL = ["--preset", "smoke", "--num_questions", "10", "--num_samples", "6", "--max_new_tokens", "64",
         "--eval_questions", "6", "--batch_size", "4", "--epochs", "2", "--warmup_share", "0.1", "--lr", "3e-4"]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Questions of the world "paths", few of them."""
    whole = toy.problems
    rows = {split: whole(split, world="paths")[:60] for split in toy.SIZES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "problems", lambda split, steps=(2, 3), world="paths": rows[split])
        yield


@pytest.fixture(scope="module")
def rho(tmp_path_factory) -> Path:
    """A base model that has seen enough of these very questions to get some samples right."""
    folder = tmp_path_factory.mktemp("rho") / "model"
    config = train.Config(hidden_size=48, num_layers=2, num_heads=2, num_kv_heads=1, max_positions=192,
                          epochs=60, lr=5e-3, batch_size=4, warmup_steps=5,
                          lr_schedule="cosine")
    problems = load_problems("toy", "train", toy_world="paths")[:10]
    train.new_model(config, [f"{p.question} {p.solution}" for p in problems], folder)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    examples = [train.Example(p.id, encode_prompt(tokenizer, p.question + "\n"),
                              encode_solution(tokenizer, p.solution)) for p in problems]
    train.fit(model, examples, lambda model, batch: train.sft_loss(model, batch, 0.1, 60.0),
              lambda example: example.tokens, config, seed=0)
    save_model(model, folder, folder)
    return folder


@pytest.fixture(scope="module")
def run(rho, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rft") / "run"
    call(rft, *SMALL, "--model", rho, "--run_dir", folder)
    return folder


def test_a_run_keeps_what_selection_keeps(run, rho):
    """The paths are those of select_paths on the sampled texts, with the sampled ids."""
    problems = {p.id: p for p in load_problems("toy", "train", toy_world="paths")}
    rows, samples = read_lines(run / "iter1" / "paths.jsonl"), read_lines(run / "iter1" / "samples.jsonl")
    expected = []
    for question in samples:
        problem = problems[question["id"]]
        texts = [s["text"] if s["finished"] else "" for s in question["samples"]]
        expected += [(problem.id, question["samples"][i]["ids"])
                     for i in select_paths(texts, problem.solution, "toy")]
    assert [(row["id"], row["response"]) for row in rows] == expected and len(rows) > 3
    tokenizer = load_tokenizer(rho)
    for row in rows:
        assert row["response"].count(tokenizer.eos_id) == 1 == row["prompt"].count(tokenizer.bos_id)
    results = json.loads((run / "results.json").read_text())
    assert [(r["name"], r["split"]) for r in results] == [
        ("SFT", "dev"), ("SFT", "test"), ("RFT", "train"), ("RFT", "dev"), ("RFT", "test")]
    assert results[2]["kept"] == len(rows) and [row["k"] for row in results[2]["over_k"]] == [1, 3, 6]
    steps = -(-(10 + len(rows)) // 4) * 2
    assert results[2]["steps"] == steps and len(read_lines(run / "iter1" / "train.jsonl")) == steps


def test_steps_matched_sees_gold_alone_for_as_many_steps(run, rho, tmp_path):
    call(rft, *SMALL, "--model", rho, "--pool", run, "--steps_matched", "--run_dir", tmp_path / "run")
    mine, theirs = (read_lines(r / "iter1" / "train.jsonl") for r in (tmp_path / "run", run))
    assert len(mine) == len(theirs) and mine[-1]["lr"] == theirs[-1]["lr"]
    [row] = [r for r in json.loads((tmp_path / "run" / "results.json").read_text()) if r["split"] == "train"]
    assert row["kept"] == 0 and row["distinct_paths"] > 0
    gold = {tokens for i in range(2) for tokens in [sum(row["tokens"] for row in mine[3 * i:3 * i + 3])]}
    assert len(gold) == 1  # each three steps of four are one pass over the ten gold solutions
    assert not (tmp_path / "run" / "iter0").exists()


def test_pool_of_one_run_with_fewer_samples_is_a_smaller_k(run, rho, tmp_path):
    """The paper's k = 1, 3, 6 ... all come from one file: its first k."""
    call(rft, *SMALL, "--model", rho, "--pool", run, "--num_samples", "3", "--run_dir", tmp_path / "k3")
    assert read_lines(tmp_path / "k3" / "iter1" / "paths.jsonl")
    few, all_ = (json.loads((r / "iter1" / "diversity.json").read_text()) for r in (tmp_path / "k3", run))
    assert few["over_k"] == all_["over_k"][:2]
    assert few["distinct_paths"] == all_["over_k"][1]["distinct_paths"]


def test_pooling_concatenates_in_the_order_given(run, rho, tmp_path):
    """Two sample files: the same selection as on the concatenated texts, and each path knows its
    model."""
    call(rft, *SMALL, "--model", rho, "--seed", "1", "--run_dir", tmp_path / "second")
    call(rft, *SMALL, "--model", rho, "--pool", run, tmp_path / "second", "--run_dir", tmp_path / "pool")
    files = [read_lines(r / "iter1" / "samples.jsonl") for r in (run, tmp_path / "second")]
    rows = read_lines(tmp_path / "pool" / "iter1" / "paths.jsonl")
    kept = []
    for questions in zip(*files):
        texts = [s["text"] if s["finished"] else "" for q in questions for s in q["samples"]]
        kept += [(texts[i], i // 6) for i in select_paths(texts, questions[0]["gold"], "toy")]
    assert [(row["text"], row["model"]) for row in rows] == kept
    assert {row["model"] for row in rows} == {0, 1}
    figures = json.loads((tmp_path / "pool" / "iter1" / "diversity.json").read_text())
    assert len(figures["exclusive"]) == 2 and sum(figures["exclusive"]) <= 1


def interrupted(*args):
    raise KeyboardInterrupt


def test_a_killed_run_goes_on(run, rho, tmp_path, monkeypatch):
    """Stopped at each step; the same command ends with the same bytes."""
    folder = tmp_path / "run"
    for step in ("sample_step", "select_step", "training_row"):
        with monkeypatch.context() as patch:
            patch.setattr(rft, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                call(rft, *SMALL, "--model", rho, "--run_dir", folder)
        assert not (folder / "results.json").exists()
    call(rft, *SMALL, "--model", rho, "--run_dir", folder)
    for name in ("results.json", "iter1/paths.jsonl", "iter1/model/model.safetensors",
                 "iter0/model/model.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_pools_that_do_not_fit_are_refused(run, rho, tmp_path, capsys):
    for flags, word in [(["--pool", tmp_path], "samples.jsonl does not exist"),
                        (["--pool", run, "--num_samples", "7"], "--num_samples 7"),
                        (["--pool", run, "--num_questions", "12"], "--num_questions"),
                        (["--pool", run, "--chat", "llama2"], "was sampled with chat"),
                        (["--dedup", "all"], "--dedup"), (["--temperature", "0"], "--temperature"),
                        (["--train_fraction", "0"], "--train_fraction")]:
        assert word in refusal(capsys, rft, *SMALL, "--model", rho, *flags, "--run_dir", tmp_path / "run")


def test_a_pool_of_other_data_is_refused(run, rho, tmp_path, capsys):
    """Ids are row numbers, which every file of that name has: the right answers must agree, too."""
    other = tmp_path / "other"
    settings, answered = rft.read_answered(run / "iter1" / "samples.jsonl")
    evaluate.save_answered(other / "iter1" / "samples.jsonl", [dataclasses.replace(q, gold="-3") for q in answered],
                           rft.Config(model="m", **rft.TOY))
    message = refusal(capsys, rft, *SMALL, "--model", rho, "--pool", other, "--run_dir", tmp_path / "run")
    assert "another right answer" in message


def test_examples_longer_than_the_model_are_left_out(run, rho, tmp_path, capsys):
    """They ended in a traceback in the middle of training."""
    config = json.loads((rho / "config.json").read_text())
    model = tmp_path / "short"
    shutil.copytree(rho, model)
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 110}))
    call(rft, *SMALL, "--model", model, "--pool", run, "--max_new_tokens", "20", "--run_dir", tmp_path / "run")
    assert "are left out" in capsys.readouterr().out


def test_train_fraction_takes_a_share_and_sft_restarts_from_step_1(run, rho, tmp_path):
    config = dataclasses.replace(rft.Config(model="m", **{**rft.TOY, "num_questions": 40}),
                                 train_fraction=0.25)
    assert len(rft.training_problems(config)) == 10
    halves = rft.training_problems(dataclasses.replace(config, train_fraction=0.5))
    assert [p.id for p in halves] == sorted((p.id for p in halves), key=lambda id: int(id.split("-")[1]))
    call(rft, *SMALL, "--model", rho, "--restart_from", "sft", "--run_dir", tmp_path / "run")
    first = [read_lines(r / "iter1" / "train.jsonl")[0]["nll"] for r in (tmp_path / "run", run)]
    assert first[0] < first[1]
    assert (tmp_path / "run/iter0/model/model.safetensors").read_bytes() == (
        run / "iter0/model/model.safetensors").read_bytes()
