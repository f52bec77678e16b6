"""Rejection-sampling fine-tuning: which paths are kept, what is counted on them, and the run."""
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import LLAMA3_JSON, json_dir

import rft
from checkpoint import load_model, model_hash, num_parameters
from data import Problem, load_problems, toy
from data.prompts import encode_solution
from data.tokenizer import load_tokenizer
from evaluate import Answered, Sample
from infra import InputError
from infra.run import derive_seed, read_json, read_records, write_jsonl, write_records
from rft import diversity, levenshtein, right_paths, select_paths
from runs import call, narrower, read_lines, refusal, settings
from train import Example, num_steps

GOLD = "Ann has 2+3=<<2+3=5>>5. That makes 5*2=<<5*2=10>>10.\n#### 10"


def path(*equations: str, words: str = "", answer: str = "10") -> str:
    return " ".join([words, *(f"So <<{e}>>." for e in equations)]) + f"\n#### {answer}"


# --- distance --------------------------------------------------------------------------------------

def slow_levenshtein(a: str, b: str) -> int:
    """Wagner and Fischer's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[-1] + 1))
    return row[-1]


TEXTS = st.text("ab2é\n", max_size=20) | st.text("ab2é\n", min_size=60, max_size=140)


@given(TEXTS, TEXTS)
def test_levenshtein_is_the_table_in_bits(a, b):
    """Also for more rows than a machine word has bits, with carries through all of them."""
    assert levenshtein(a, b) == slow_levenshtein(a, b) == levenshtein(b, a)


# --- selection -------------------------------------------------------------------------------------

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
    st.sampled_from([["2+3=5", "5*2=10"], ["5*2=10", "2+3=5"], ["3+2=5", "5*2=10"], ["5*2=10"], [], ["2+2=5"]]),
    st.sampled_from(["", "a", "ab c", "abcdef", "fedcba"]), st.sampled_from(["10", "10.0", "9"])),
    max_size=12))
@hypothesis.settings(max_examples=300)
@example([path("2+3=5", "5*2=10"), path("5*2=10", "2+3=5")])
def test_selection_is_algorithm_1(samples):
    right = right_paths(samples, GOLD, "toy", "hash", True)
    assert right == [i for i, text in enumerate(samples) if "#### 9" not in text and "2+2" not in text]
    assert select_paths(samples, GOLD, "toy") == slow_select(samples, right)


@pytest.mark.parametrize("dedup, kept", [
    ("equations", [0]), ("plain_equations", [0, 2, 3]), ("string", [0, 1, 2, 3]), ("none", [0, 1, 2, 3, 4])])
def test_paths_whose_equations_have_no_marks(dedup, kept):
    """Of SVAMP's solutions, which have none, one path per question was kept: 77 of 145 right ones, of which 141 were
    different. A text without any equation is told apart by itself, up to white space."""
    texts = ["3 pens + 4 pens = $7", "Now 3 + 4 = 7.", "4 + 3 = 7", "Seven.", "Seven. "]
    assert select_paths([f"{text}\n#### 7" for text in texts], "7", "svamp", answer_format="hash", dedup=dedup,
                        select="first") == kept


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


# --- figures ---------------------------------------------------------------------------------------

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


def test_figures_go_by_the_key_of_selection():
    """A report showed 1.00 distinct paths beside the paper's 1.17."""
    found, golds = [[[(0, "3 + 4 = 7"), (1, "so 3 + 4 = 7"), (1, "4 + 3 = 7")]]], ["2 + 5 = 7"]
    for key, count in (("equations", 1), ("plain_equations", 2), ("string", 3)):
        row = diversity(found, golds, 5, key)
        assert (row["distinct_paths"], row["distinct_paths_and_gold"]) == (count, count + (key != "equations"))


# --- the run ---------------------------------------------------------------------------------------

SMALL = ["--preset", "smoke", "--num_questions", "10", "--num_samples", "7", "--max_new_tokens", "24",
         "--eval_questions", "6", "--batch_size", "4", "--epochs", "2", "--lr", "1e-3"]
SAMPLES = range(7)


def texts_for(problem) -> list[str]:
    """Write seven samples: gold, an equation that does not hold, another path, gold in more words, a wrong answer, a
    third path, whose sample is truncated, and the other path again."""
    mark = f"\n#### {problem.answer}"
    return [problem.solution, "So <<2+2=5>>." + mark, "As <<1+1=2>> is." + mark, "Well, now. " + problem.solution,
            "So <<1+1=2>>.\n#### -7", "But <<7-1=6>>." + mark, "As <<1+1=2>> is." + mark]


def by_hand(question: Answered, problem, order=SAMPLES) -> Answered:
    """Put these samples in the place of a question's own, with ids that no tokenizer makes of their texts."""
    samples = [Sample([5 + i, 2], i != 5, text, "wrong", None) for i, text in enumerate(texts_for(problem))]
    return replace(question, samples=[samples[i] for i in order])


@pytest.fixture(scope="module", autouse=True)
def no_luck():
    """What a tiny model answers to training questions is replaced."""
    answer_once = rft.answer_once

    def answered(path, sampler, problems, **how) -> list[Answered]:
        return [by_hand(*pair, SAMPLES[:how["num_samples"]])
                for pair in zip(answer_once(path, sampler, problems, **how), problems)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.SIZES, "train", 40)
        patch.setattr(rft, "answer_once", answered)
        yield


def questions() -> list:
    return load_problems("toy", "train")[:10]


def training_row(run: Path) -> dict:
    [row] = [row for row in read_json(run / "results.json") if row["split"] == "train"]
    return row


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rft") / "run"
    call(rft, *SMALL, "--model", base, "--seed", "4", "--run_dir", folder)
    return folder


@pytest.mark.parametrize("file, model, split, count, num_samples, temperature, seed", [
    ("iter1/samples", "iter0", "train", 10, 7, 0.7, None),
    *((f"iter{t}/{file}", f"iter{t}", *how, 4) for t in (0, 1) for file, *how in [
        ("eval_dev", "dev", 6, 1, 0.0), ("eval_samples", "test", 6, 1, 0.0), ("eval_sampled", "test", 6, 2, 0.7)])])
def test_each_file_of_samples_is_made_as_it_must(run, base, file, model, split, count, num_samples, temperature, seed):
    """Which model answers which questions, at which temperature: maj@k is sampled like the paths. These are drawn by
    numbers that depend on the base model: with the same for all, models whose samples are pooled would agree."""
    if seed is None:
        seed = derive_seed(4, "sample", model_hash(base))
    said, rows = settings(run / f"{file}.jsonl"), read_lines(run / f"{file}.jsonl")
    expected = dict(weights=model_hash(run / model / "model"), split=split, num_samples=num_samples,
                    temperature=temperature, seed=seed, max_new_tokens=24)
    assert {name: said[name] for name in expected} == expected
    assert [row["id"] for row in rows] == [p.id for p in load_problems("toy", split)[:count]]
    assert {len(row["samples"]) for row in rows} == {num_samples}


def test_a_run_keeps_what_selection_keeps(run, base):
    """With the ids that were sampled, since a text may be encoded otherwise."""
    config, tokenizer = rft.Config(model="m", **rft.TOY), load_tokenizer(base)
    assert read_lines(run / "iter1" / "paths.jsonl") == [
        dict(id=p.id, prompt=config.prompt_ids(tokenizer, p), response=[5 + i, 2], text=texts_for(p)[i], model=0)
        for p in questions() for i in (3, 2)]


def test_the_training_row_of_a_run(run):
    """Four of seven samples are right, on two paths, of which gold's is one."""
    row = training_row(run)
    steps = read_lines(run / "iter1" / "train.jsonl")
    assert (row["kept"], row["steps"]) == (20, 2 * 8) == (20, len(steps))  # 30 examples, 4 at a time
    assert row["tokens_trained"] == sum(step["tokens"] for step in steps)
    config, tokenizer = rft.Config(model="m", **rft.TOY), load_tokenizer(run / "iter1" / "model")
    sft = sum(step["tokens"] for step in read_lines(run / "iter0" / "train.jsonl"))
    prompts = sum(len(config.prompt_ids(tokenizer, p)) for p in questions())
    assert row["flops"] == num_parameters(run / "iter1" / "model") * (
        2 * (row["tokens_sampled"] + prompts) + 6 * (row["tokens_trained"] + sft))
    by_k = [dict(correct_paths=correct, distinct_paths=distinct, distinct_paths_and_gold=distinct, solved=1.0,
                 exclusive=[1.0], histogram={str(correct): 10})
            for correct, distinct in ((1, 1), (2, 2), (3, 2), (4, 2))]
    assert row["over_k"] == [dict(k=k, **figures) for k, figures in zip((1, 3, 6), by_k)]
    assert {name: row[name] for name in by_k[3]} == by_k[3]
    assert [(r["name"], r["iteration"], r["split"], r.get("num_samples")) for r in read_json(run / "results.json")] == [
        ("SFT", 0, "dev", None), ("SFT", 0, "test", 2),
        ("RFT", 1, "train", None), ("RFT", 1, "dev", None), ("RFT", 1, "test", 2)]


# --- what a flag changes in a run, without training ------------------------------------------------

@pytest.fixture
def started(base, tmp_path, monkeypatch):
    """Run with these flags as far as the training loop; return the run and what each fine-tuning is given."""
    starts, tunings = [], []

    def fit_sft(model, examples, options, seed, folder) -> None:
        tunings.append(SimpleNamespace(start=starts[-1], examples=examples, options=options, seed=seed, folder=folder))
        write_jsonl(folder / "train.jsonl", [{"step": 0, "loss": 1.0, "tokens": 1}])

    def run(*flags) -> tuple[Path, list]:
        call(rft, *SMALL, "--model", base, *flags, "--run_dir", tmp_path / "run")
        return tmp_path / "run", tunings

    monkeypatch.setattr(rft, "load_for_training", lambda start, config: starts.append(Path(start)) or load_model(start))
    monkeypatch.setattr(rft, "fit_sft", fit_sft)
    monkeypatch.setattr(rft, "evaluate_model", lambda *args: [])
    return run


def pool_of(folder: Path, base: Path, order=SAMPLES, gold: str | None = None) -> Path:
    """Write what --pool reads of a run."""
    tokenizer, config = load_tokenizer(base), rft.Config(model="m", **rft.TOY)
    answered = [by_hand(Answered(p.id, config.prompt_text(p), config.prompt_ids(tokenizer, p), gold or p.answer, []), p,
                        order) for p in questions()]
    write_records(folder / "iter1" / "samples.jsonl", answered, dict(task="toy", prompt="plain", chat="", marks="hash"))
    return folder


@pytest.fixture(scope="module")
def pool(base, tmp_path_factory) -> Path:
    return pool_of(tmp_path_factory.mktemp("pool"), base)


def test_a_reward_does_not_replace_the_equation_filter(tmp_path):
    (tmp_path / "my.py").write_text("def score(text, problem):\n    return 1\n")
    config = rft.Config(model="m", **rft.TOY, reward=f"{tmp_path}/my.py:score")
    sample = Sample([5, 2], True, "<<1+1=3>>", "correct", None, 1.0)
    assert rft.all_right_paths([[sample]], [None], config) == [[]]
    assert rft.all_right_paths([[sample]], [None], replace(config, equation_filter=False)) == [[0]]


def test_defaults_are_the_papers():
    """Section 3 and appendix, 7B and 13B."""
    paper = dict(num_samples=100, temperature=0.7, lr=2e-5, lr_schedule="cosine", warmup_share=0.03, batch_size=128,
                 epochs=3, weight_decay=0.0, equation_filter=True, dedup="equations", select="levenshtein",
                 restart_from="base")
    assert {name: getattr(rft.Config(model="m"), name) for name in paper} == paper


def test_both_fine_tunings_start_from_rho_with_seeds_of_their_own(started, base):
    """RFT trains rho, not the SFT model, on gold and the kept paths, in the order in which they are stored."""
    run, (sft, last) = started("--seed", "4")
    assert (sft.start, last.start) == (base, base) and (sft.folder, last.folder) == (run / "iter0", run / "iter1")
    assert (sft.seed, last.seed) == (derive_seed(4, "SFT"), derive_seed(4, "RFT"))
    paths = read_records(run / "iter1" / "paths.jsonl", rft.KeptPath)[1]
    assert [e.id for e in sft.examples] == [p.id for p in questions()] and last.examples == sft.examples + paths
    assert all(e.response == encode_solution(load_tokenizer(base), p.solution, f"{p.question}\n")
               for e, p in zip(sft.examples, questions()))


def test_restart_from_sft_trains_the_model_of_step_1(started, base, pool):
    run, (sft, last) = started("--pool", pool, "--restart_from", "sft")
    assert (sft.start, last.start) == (base, run / "iter0" / "model") and len(last.examples) == 30


def test_steps_matched_sees_gold_alone_for_as_many_steps(started, base, pool):
    """With a pool, step 1 is skipped."""
    run, [last] = started("--pool", pool, "--steps_matched")
    assert last.start == base and len(last.examples) == 10
    assert num_steps(10, last.options) == 2 * 8  # as for 30 examples
    assert training_row(run)["kept"] == 0 and training_row(run)["distinct_paths"] == 2
    assert training_row(run)["flops"] == num_parameters(base) * 6 * training_row(run)["tokens_trained"], "no samples"


def test_flops_are_of_all_that_a_model_is_made_of(tmp_path, monkeypatch):
    """Each pooled model reads the prompts once; step 1 counts where step 5 has its model or its samples."""
    monkeypatch.setattr(rft, "flops", lambda directory, forward, trained: (forward, trained))
    for t, tokens in (0, 1000), (1, 10):
        write_jsonl(tmp_path / f"iter{t}" / "train.jsonl", [{"step": 0, "loss": 1.0, "tokens": tokens}])
    problem, sample = Problem("q", "Q?", "5", "#### 5"), Sample([5, 2], True, "#### 5", "correct", "5")
    for flags, expected in (({}, (4 * 2 + 2 * 7, 1010)), (dict(steps_matched=True), (0, 10)),
                            (dict(steps_matched=True, restart_from="sft"), (0, 1010))):
        config = rft.Config(model="m", task="toy", prompt="plain", num_samples=2, **flags)
        row = rft.training_row([[sample] * 4], [[0, 1, 2, 3]], [], [Example("q", [1] * 7, [2])], [problem], config,
                               tmp_path / "iter1")
        assert row["flops"] == expected


def test_steps_matched_counts_what_is_trained_on(started, base, pool, tmp_path):
    """Gold solutions that the model has no positions for are in neither of the two runs that are compared."""
    tokenizer, config = load_tokenizer(base), rft.Config(model="m", **rft.TOY)
    lengths = [len(config.prompt_ids(tokenizer, p)) + len(config.solution_ids(tokenizer, p, text))
               for p in questions() for text in (p.solution, texts_for(p)[3], texts_for(p)[2])]
    positions = sorted(lengths)[-9]
    _, [last] = started("--pool", pool, "--steps_matched", "--model", narrower(base, tmp_path / "narrow", positions))
    count = sum(length <= positions for length in lengths)
    assert count <= 24 and num_steps(10, last.options) == 2 * math.ceil(count / 4)


@pytest.mark.parametrize("flags, kept", [
    ([], [3, 2]), (["--no-equation_filter"], [3, 1, 2]), (["--select", "first"], [0, 2]),
    (["--dedup", "string"], [0, 2, 3]), (["--dedup", "none"], [0, 2, 3, 6])])
def test_flags_of_selection_reach_it(started, flags, kept):
    """An ablation whose flag is lost on the way is the same run twice. A truncated sample is never kept."""
    run, (_, last) = started(*flags)
    assert [(path.id, path.text) for path in last.examples[10:]] == [
        (p.id, texts_for(p)[i]) for p in questions() for i in kept]


@pytest.mark.parametrize("flags, key", [
    ([], "equations"), (["--answer_format", "final_answer"], "string"),
    (["--answer_format", "final_answer", "--dedup", "plain_equations"], "plain_equations")])
def test_where_gold_has_no_marks_texts_are_compared(started, capsys, monkeypatch, flags, key):
    """Only the format "hash" has marks. It is said, and the config says what ran."""
    monkeypatch.setattr(rft, "check_inputs", lambda *args: None)  # the tokenizer of these tests has no "Final answer"
    run, _ = started(*flags)
    assert ("no gold solution has an equation in <<...>>" in capsys.readouterr().out) == (key == "string")
    assert read_json(run / "config.json")["dedup"] == key


def test_a_pool_of_two_keeps_their_order_and_knows_its_models(started, base, pool, tmp_path):
    """Each is cut to its first k. Their models may have had other tokenizers, so texts are encoded anew."""
    second = pool_of(tmp_path / "second", base, [3, 2, 1, 0, 4, 5, 6])
    run, [last] = started("--pool", pool, second, "--num_samples", "2")
    assert [(path.id, path.text, path.model) for path in last.examples[10:]] == [
        (p.id, texts_for(p)[i], model) for p in questions() for i, model in ((0, 0), (2, 1))]
    tokenizer = load_tokenizer(base)
    assert all(path.response == encode_solution(tokenizer, path.text, f"{p.question}\n")
               for p in questions() for path in last.examples[10:] if path.id == p.id)
    row = training_row(run)
    assert row["exclusive"] == [0.0, 0.5] and row["correct_paths"] == 3.0  # both find gold's path
    assert [(of["k"], of["correct_paths"]) for of in row["over_k"]] == [(1, 2.0)]


def test_a_pooled_text_begins_with_one_space(tmp_path):
    """Of a byte-level tokenizer a sampled text already has the space that a written solution needs: with two, every
    pooled path was learnt as "  It is"."""
    tokenizer = load_tokenizer(json_dir(tmp_path, *LLAMA3_JSON))
    problem = Problem("q", "2+3?", "5", "It is <<2+3=5>>5.\n#### 5")
    for pool in (), ("runs/other",):
        config = rft.Config(model="m", task="gsm8k", num_samples=1, pool=pool)
        ids = config.gold_ids(tokenizer, problem)
        sample = Sample(ids, True, tokenizer.decode(ids), "correct", "5")
        [path] = rft.kept_paths([[sample]], [[0]], [problem], tokenizer, config)
        assert path.text == " It is <<2+3=5>>5.\n#### 5" and path.response == ids


def test_a_replaced_pool_is_refused(started, base, tmp_path, capsys):
    """Its paths would be of other samples than those that are counted."""
    started("--pool", pool_of(tmp_path / "pool", base))
    pool_of(tmp_path / "pool", base, [1, 0, 2, 3, 4, 5, 6])
    with pytest.raises(InputError, match="pooled: "):
        started("--pool", tmp_path / "pool")


@pytest.mark.parametrize("flags, said", [
    (["--num_samples", "8"], "--num_samples 8"), (["--num_questions", "12"], "lacks 2 of the questions"),
    (["--chat", "llama2"], "was sampled with chat"), (["--pool", "nowhere"], "samples.jsonl does not exist"),
    (["--pool", "other"], "another right answer"), (["--dedup", "all"], "--dedup all"),
    (["--temperature", "0"], "--temperature 0"), (["--train_fraction", "0"], "--train_fraction 0")])
def test_pools_and_flags_that_do_not_fit_are_refused(base, pool, tmp_path, monkeypatch, capsys, flags, said):
    """Ids are row numbers, which every file of that name has: the right answers must agree, too."""
    monkeypatch.chdir(tmp_path)
    pool_of(tmp_path / "other", base, gold="-3")
    assert said in refusal(capsys, rft, *SMALL, "--model", base, "--pool", pool, *flags, "--run_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, changes", [("task", dict(task="gsm8k")), ("prompt", dict(prompt="reft")),
                                           ("marks", dict(answer_format="boxed"))])
def test_a_pool_that_was_asked_otherwise_is_refused(name, changes, pool):
    with pytest.raises(InputError, match=f"was sampled with {name} "):
        rft.pooled_samples(pool, questions(), rft.Config(model="m", **rft.TOY | changes))


def test_gold_solutions_must_pass_step_3(capsys):
    """If none does, no path will; without any there is no step 1."""
    config, problems = rft.Config(model="m", **rft.TOY), questions()
    unsound = [replace(p, solution=f"So <<2+2=5>>.\n#### {p.answer}") for p in problems]
    rft.check_golds(config, [unsound[0], *problems[1:]])
    assert "9 of 10 gold solutions pass" in capsys.readouterr().out
    absent = [*problems[1:], replace(problems[0], solution="")]
    for golds, said in (unsound, "would drop every path"), (absent, f"1 of 10 .* no gold .* as {problems[0].id}"):
        with pytest.raises(InputError, match=said):
            rft.check_golds(config, golds)
    rft.check_golds(replace(config, equation_filter=False), unsound)


def test_train_fraction_takes_a_share_in_its_order(started):
    """Another one with another seed; and step 1 learns from no more than that."""
    config = rft.Config(model="m", **rft.TOY | dict(num_questions=40, train_fraction=0.5))
    one, other = ([p.id for p in rft.training_problems(replace(config, seed=seed))] for seed in (0, 1))
    assert len(one) == len(other) == 20 and one != other
    assert one == [p.id for p in config.problems("train") if p.id in one]
    run, (sft, last) = started("--train_fraction", "0.5", "--num_questions", "40")
    assert [e.id for e in sft.examples] == one == [e.id for e in last.examples[:20]]
    assert {path.id for path in last.examples[20:]} == {*one}
