"""Rejection-sampling fine-tuning: which paths are kept, what is counted on them, and the run."""
import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
import rft
from checkpoint import load_model, model_hash, save_model
from data import load_problems, toy
from data.fresh import fresh_model
from data.prompts import encode_prompt, encode_solution
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample
from infra.run import derive_seed, write_records
from rft import diversity, levenshtein, path_key, pooled, right_paths, select_paths
from runs import call, read_lines, refusal, settings
from train import Example, TrainOptions, fit_sft

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
        key = "|".join(re.findall(r"<<(.*?)>>", samples[i]))
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


def test_the_order_of_equations_counts():
    """Two ways to the answer, though the same equations are in both."""
    assert path_key(path("2+3=5", "5*2=10")) != path_key(path("5*2=10", "2+3=5")) != path_key(path("2*5=10", "2+3=5"))
    assert select_paths([path("2+3=5", "5*2=10"), path("5*2=10", "2+3=5")], "10", "toy") == [0, 1]


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
         "--eval_questions", "6", "--eval_samples", "2", "--batch_size", "4", "--epochs", "2",
         "--warmup_share", "0.1", "--lr", "3e-4"]


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
    problems = load_problems("toy", "train", toy_world="paths")[:10]
    fresh_model([f"{p.question} {p.solution}" for p in problems], folder, vocab_size=288, hidden_size=48, num_layers=2,
                max_positions=192, seed=0)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    examples = [Example(p.id, encode_prompt(tokenizer, p.question + "\n"), encode_solution(tokenizer, p.solution))
                for p in problems]
    options = TrainOptions(epochs=60, lr=5e-3, batch_size=4, warmup_steps=5, lr_schedule="cosine", precision="fp32")
    fit_sft(model, examples, options, 0, folder, prompt_weight=0.1)
    save_model(model, folder, folder)
    return folder


@pytest.fixture(scope="module")
def run(rho, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rft") / "run"
    call(rft, *SMALL, "--model", rho, "--run_dir", folder)
    return folder


def test_a_run_is_made_of_what_it_says(run, rho):
    """Which model samples, which is evaluated, at which temperature; paths with the sampled ids; steps; names."""
    hashes = {name: model_hash(run / f"{name}/model") for name in ("iter0", "iter1")}
    for folder, file, expected in [
            ("iter1", "samples", ("iter0", "train", 6, 0.7)), ("iter0", "eval_dev", ("iter0", "dev", 1, 0.0)),
            ("iter0", "eval_samples", ("iter0", "test", 1, 0.0)), ("iter0", "eval_sampled", ("iter0", "test", 2, 0.7)),
            ("iter1", "eval_dev", ("iter1", "dev", 1, 0.0)), ("iter1", "eval_samples", ("iter1", "test", 1, 0.0)),
            ("iter1", "eval_sampled", ("iter1", "test", 2, 0.7))]:
        found = settings(run / folder / f"{file}.jsonl")
        assert found["weights"] == hashes[expected[0]], (folder, file)
        assert (found["split"], found["num_samples"], found["temperature"]) == expected[1:], (folder, file)

    rows, samples = read_lines(run / "iter1" / "paths.jsonl"), read_lines(run / "iter1" / "samples.jsonl")
    of = {question["id"]: question for question in samples}
    for row in rows:
        assert row["response"] in [sample["ids"] for sample in of[row["id"]]["samples"] if sample["finished"]]
        assert row["prompt"] == of[row["id"]]["prompt_ids"] and row["model"] == 0
    results = json.loads((run / "results.json").read_text())
    assert [(r["name"], r["iteration"], r["split"]) for r in results] == [
        ("SFT", 0, "dev"), ("SFT", 0, "test"), ("RFT", 1, "train"), ("RFT", 1, "dev"), ("RFT", 1, "test")]
    steps = -(-(10 + len(rows)) // 4) * 2
    assert results[2]["kept"] == len(rows) and [row["k"] for row in results[2]["over_k"]] == [1, 3, 6]
    assert results[2]["steps"] == steps == len(read_lines(run / "iter1" / "train.jsonl"))


def test_both_fine_tunings_start_from_rho_with_seeds_of_their_own(rho, made, tmp_path, monkeypatch):
    """RFT trains the base, not the SFT model; --restart_from sft trains that one."""
    calls = []
    monkeypatch.setattr(rft, "fit_sft", lambda model, examples, config, seed, folder: calls.append(
        (model.model.norm.weight.sum().item(), len(examples), seed)) or [{"step": 0, "loss": 1.0, "tokens": 1}])
    monkeypatch.setattr(rft, "load_trained", lambda start, config: load_model(start))
    call(rft, *SMALL, "--model", rho, "--num_samples", "1", "--run_dir", tmp_path / "a", "--seed", "4")
    assert [seed for _, _, seed in calls] == [derive_seed(4, "SFT"), derive_seed(4, "RFT")]
    assert calls[0][0] == calls[1][0] == load_model(rho).model.norm.weight.sum().item()
    assert calls[0][1] == 10
    monkeypatch.setattr(rft, "load_trained", lambda start, config: calls.append(Path(start)) or load_model(start))
    call(rft, *SMALL, "--model", rho, "--pool", made, "--restart_from", "sft", "--run_dir", tmp_path / "b")
    assert [c for c in calls if isinstance(c, Path)] == [rho, tmp_path / "b" / "iter0" / "model"]


# --- selection in a run, on samples made by hand ----------------------------------------------------

def texts_for(problem) -> list[str]:
    """Six samples: gold, an equation that does not hold, another path, gold in more words, a wrong answer, and a right
    one that was truncated."""
    mark = f"\n#### {problem.answer}"
    return [problem.solution, "So <<2+2=5>>." + mark, "As <<1+1=2>> is." + mark, "Well, now. " + problem.solution,
            "So <<1+1=2>>.\n#### -7", "But <<7-1=6>>." + mark]


def write_samples(folder: Path, rho: Path, gold: str | None = None, order=range(6)) -> Path:
    tokenizer, questions = load_tokenizer(rho), []
    config = rft.Config(model="m", **rft.TOY)
    for problem in load_problems("toy", "train", toy_world="paths")[:10]:
        samples = [Sample([*tokenizer.encode(text), tokenizer.eos_id], i != 5, text, "correct", None)
                   for i, text in enumerate(texts_for(problem))]
        questions.append(Answered(problem.id, config.prompt_text(problem), config.prompt_ids(tokenizer, problem),
                                  gold or problem.answer, [samples[i] for i in order]))
    asked = dict(task="toy", prompt="plain", chat="", marks="hash")
    write_records(folder / "iter1" / "samples.jsonl", questions, asked)
    return folder


@pytest.fixture(scope="module")
def made(rho, tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("made"), rho)


def kept_by(run: Path) -> dict[str, list[str]]:
    kept = {}
    for row in read_lines(run / "iter1" / "paths.jsonl"):
        kept.setdefault(row["id"], []).append(row["text"])
    return kept


@pytest.mark.parametrize("flags, options", [
    ([], {}), (["--no-equation_filter"], dict(equation_filter=False)), (["--dedup", "string"], dict(dedup="string")),
    (["--dedup", "none"], dict(dedup="none")), (["--select", "first"], dict(select="first"))])
def test_flags_of_selection_reach_it(rho, made, tmp_path, flags, options):
    """An ablation whose flag is lost on the way is the same run twice. Truncated paths are never kept."""
    call(rft, *SMALL, "--epochs", "1", "--model", rho, "--pool", made, *flags, "--run_dir", tmp_path / "run")
    problems, kept = load_problems("toy", "train", toy_world="paths")[:10], kept_by(tmp_path / "run")
    default = {}
    for problem in problems:
        texts = texts_for(problem)[:5] + [""]
        assert kept[problem.id] == [texts[i] for i in select_paths(texts, problem.answer, "toy", **options)]
        default[problem.id] = [texts[i] for i in select_paths(texts, problem.answer, "toy")]
        assert not any("7-1" in text or "-7" in text for text in kept[problem.id])
    assert (kept != default) == bool(flags)
    [row] = [r for r in json.loads((tmp_path / "run" / "results.json").read_text()) if r["split"] == "train"]
    assert row["kept"] == sum(map(len, kept.values())) and row["steps"] == -(-(10 + row["kept"]) // 4)


def test_a_pool_of_two_keeps_their_order_and_knows_its_models(rho, made, tmp_path):
    """And one run with fewer samples is a smaller k: the paper's k = 1, 3, 6 all come from one file, its first k."""
    second = write_samples(tmp_path / "second", rho, order=[3, 2, 1, 0, 4, 5])
    call(rft, *SMALL, "--epochs", "1", "--model", rho, "--pool", made, second, "--num_samples", "2",
         "--run_dir", tmp_path / "pool")
    kept = []
    for problem in load_problems("toy", "train", toy_world="paths")[:10]:
        texts = [texts_for(problem)[i] for i in (0, 1, 3, 2)]
        kept += [(texts[i], i // 2) for i in select_paths(texts, problem.answer, "toy")]
    rows = read_lines(tmp_path / "pool" / "iter1" / "paths.jsonl")
    assert [(row["text"], row["model"]) for row in rows] == kept and {row["model"] for row in rows} == {0, 1}
    [row] = [r for r in json.loads((tmp_path / "pool" / "results.json").read_text()) if r["split"] == "train"]
    assert row["exclusive"] == [0.0, 0.5] and [r["k"] for r in row["over_k"]] == [1]


def test_steps_matched_sees_gold_alone_for_as_many_steps(rho, made, tmp_path):
    for name, flags in (("with", []), ("control", ["--steps_matched"])):
        call(rft, *SMALL, "--model", rho, "--pool", made, *flags, "--run_dir", tmp_path / name)
    mine, theirs = (read_lines(tmp_path / name / "iter1" / "train.jsonl") for name in ("control", "with"))
    assert len(mine) == len(theirs) and mine[-1]["lr"] == theirs[-1]["lr"]
    [row] = [r for r in json.loads((tmp_path / "control" / "results.json").read_text()) if r["split"] == "train"]
    assert row["kept"] == 0 and row["distinct_paths"] > 0
    passes = {sum(row["tokens"] for row in mine[3 * i:3 * i + 3]) for i in range(2)}
    assert len(passes) == 1  # each three steps of four are one pass over the ten gold solutions
    assert not (tmp_path / "with" / "iter0").exists()


def test_truncated_samples_have_no_text_to_select():
    samples = [Sample([5], True, "a", "correct", "4"), Sample([6], False, "b", "correct", "4")]
    question = Answered("q", "p", [1], "4", samples)
    assert [sample.text for sample in pooled([[question], [question]])[0]] == ["a", "", "a", ""]


def test_a_killed_run_resumes(run, rho, tmp_path, monkeypatch):
    """Stopped at each step; the same command ends with the same bytes."""
    folder = tmp_path / "run"
    for step in ("answer_once", "kept_paths", "training_row"):
        with monkeypatch.context() as patch:
            patch.setattr(rft, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                call(rft, *SMALL, "--model", rho, "--run_dir", folder)
        assert not (folder / "results.json").exists()
    call(rft, *SMALL, "--model", rho, "--run_dir", folder)
    for name in ("results.json", "iter1/paths.jsonl", "iter1/model/model.safetensors", "iter0/model/model.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_pools_that_do_not_fit_are_refused(rho, made, tmp_path, capsys):
    """Ids are row numbers, which every file of that name has: the right answers must agree, too."""
    other = write_samples(tmp_path / "other", rho, gold="-3")
    for flags, word in [(["--pool", tmp_path], "samples.jsonl does not exist"),
                        (["--pool", made, "--num_samples", "7"], "--num_samples 7"),
                        (["--pool", made, "--num_questions", "12"], "--num_questions"),
                        (["--pool", made, "--chat", "llama2"], "was sampled with chat"),
                        (["--pool", other], "another right answer"), (["--dedup", "all"], "--dedup"),
                        (["--temperature", "0"], "--temperature"), (["--train_fraction", "0"], "--train_fraction")]:
        assert word in refusal(capsys, rft, *SMALL, "--model", rho, *flags, "--run_dir", tmp_path / "run")


def test_examples_longer_than_the_model_are_left_out(rho, made, tmp_path, capsys):
    """They ended in a traceback in the middle of training."""
    config = json.loads((rho / "config.json").read_text())
    model = tmp_path / "short"
    shutil.copytree(rho, model)
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 110}))
    call(rft, *SMALL, "--model", model, "--pool", made, "--max_new_tokens", "20", "--run_dir", tmp_path / "run")
    assert "are left out" in capsys.readouterr().out


def test_train_fraction_takes_a_share_in_its_order():
    config = dataclasses.replace(rft.Config(model="m", **{**rft.TOY, "num_questions": 40}), train_fraction=0.25)
    assert len(rft.training_problems(config)) == 10
    halves = rft.training_problems(dataclasses.replace(config, train_fraction=0.5))
    assert [p.id for p in halves] == sorted((p.id for p in halves), key=lambda id: int(id.split("-")[1]))
    other = rft.training_problems(dataclasses.replace(config, train_fraction=0.5, seed=1))
    assert len(halves) == len(other) == 20 and halves != other
