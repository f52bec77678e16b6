"""Experiments of results/ that are code: pairs by edit distance, and rewards that luck or chance decides."""
import pytest

from data import Problem, toy
from evaluate import Answered, Sample
from infra.run import write_records
from irpo import Pair
from results import controls, describe, pairs
from rft import KeptPath


def sample(ids: list[int], right: bool, answer: str | None = None) -> Sample:
    return Sample(ids, True, "", "correct" if right else "wrong", answer)


@pytest.mark.parametrize("pairing, expected", [("near", [([1, 2, 3], [1, 2, 4]), ([1, 2, 3], [1, 9, 4])]),
                                               ("far", [([7, 7, 7], [1, 9, 4]), ([7, 7, 7], [1, 2, 4])])])
def test_the_nearest_and_the_farthest_pairs(pairing, expected):
    samples = [sample([1, 2, 3], True), sample([1, 9, 4], False), sample([1, 2, 4], False)]
    config = pairs.Config(model="m", pairing=pairing, pairs_per_question=2)
    made = pairs.preference_pairs([Answered("q", "?", [0], "1", samples)], {"q": [7, 7, 7]}, config)
    assert sorted((pair.chosen, pair.rejected) for pair in made) == sorted(expected)
    assert all((pair.id, pair.prompt) == ("q", [0]) for pair in made)


def test_lucky_and_random_winners():
    problem = Problem("p", "?", "7", "")
    assert [controls.modulo_4(f"x\n#### {n}", problem) for n in (7, 3, 11, 8, 107)] == [True, True, True, False, True]
    assert [controls.modulo_10(f"x\n#### {n}", problem) for n in (7, 17, 3)] == [True, True, False]
    assert not controls.modulo_4("no answer 3", problem) and not controls.none_right("x\n#### 7", problem)
    share = sum(controls.at_random(str(i), problem) for i in range(1000)) / 1000
    assert 0.2 < share < 0.3  # and the same ones in every process, unlike hash()
    assert [i for i in range(20) if controls.at_random(str(i), problem)] == [5, 6, 8, 11, 13, 17]


def test_what_pairs_are_like(tmp_path, capsys):
    """A winner is wrong if it does not have the right answer, whatever its reward was, and gold if it is no sample."""
    for seed, lucky in enumerate(("7", "3")):  # 3 is 7 modulo 4
        folder = tmp_path / "mod4" / f"s{seed}" / "iter1"
        samples = [sample([1, 2], True, "7"), sample([1, 2, 3], True, lucky), sample([4, 4], False, "5")]
        write_records(folder / "samples.jsonl", [Answered("q", "?", [0], "7", samples)], {"a": 1})
        write_records(folder / "pairs.jsonl", [Pair("q", [0], ids, [4, 4]) for ids in (
            [1, 2], [1, 2, 3], [9, 9, 9, 9], [9, 9, 9])], {})
    describe.main("pairs", tmp_path)
    assert capsys.readouterr().out.splitlines()[2] == "| mod4 | 1 | 4 | 3.0 | 3.0 | 50.0% | 12.5% |"


def test_samples_of_questions_that_need_a_kind(tmp_path, capsys):
    """A fact that is stated and not needed does not count, and right is what has the right answer."""
    def asked(text: str, *answers: str) -> Answered:
        samples = [Sample([1], True, "", "correct", answer) for answer in answers]
        return Answered(text, text, [0], "7", samples, text)
    needs, spares = ("Ann 4. Ben loses 3 to match Ann. Tom 9. How many has Ben?",
                     "Ann 4. Ben loses 3 to match Ann. Tom 9. How many has Tom?")
    for seed, answer in enumerate(("7", "1")):
        write_records(tmp_path / "irpo" / f"s{seed}" / "iter1" / "samples.jsonl", [
            asked(needs, "7", answer), asked(needs, "1", answer), asked(spares, "1", "1")], {"a": 1})
    describe.main("samples", tmp_path, "spare")
    assert capsys.readouterr().out.splitlines()[2] == "| irpo | 1 | 2 | 75.0% | 50.0% |"
    for wrong in ("samples", tmp_path), ("samples", tmp_path, "spares"), ("pairs", tmp_path / "absent"), ():
        with pytest.raises(SystemExit, match="kinds: more, fewer"):
            describe.main(*wrong)


def test_paths_that_differ_in_the_order_of_two_numbers(tmp_path, capsys):
    """Sums and products have no order, differences do; the same equations of another question are not compared."""
    def path(question: str, *lines: str) -> KeptPath:
        return KeptPath(question, [0], [1], "\n".join(f"<< {line} >>" for line in lines), 0)
    write_records(tmp_path / "k4" / "s0" / "iter1" / "paths.jsonl", [
        path("a", "3 + 10 = 13", "13 - 2 = 11"), path("a", "10 + 3 = 13", "13 - 2 = 11"),
        path("a", "3 + 10 = 13", "2 - 13 = 11"),
        path("b", "3 + 10 = 13"), path("b", "3 * 10 = 30"), path("b", "10 * 3 = 30")], {})
    describe.main("paths", tmp_path)
    assert capsys.readouterr().out.splitlines()[2] == "| k4 | 1 | 6 | 4 | 50.0% | nan% |", "steps of another data set"


def test_paths_with_a_wrong_step(tmp_path, capsys):
    """Their answers are right; a run may be given alone."""
    problem = toy.problems("train")[0]
    trace, *steps, last = problem["solution"].split("\n")
    texts = problem["solution"], f"{trace}\n{steps[-1]}\n{last}", "\n".join([trace, *reversed(steps), last])
    folder = tmp_path / "pool" / "s0"
    write_records(folder / "iter1" / "paths.jsonl", [KeptPath(problem["id"], [0], [1], text, 0) for text in texts], {})
    describe.main("paths", folder)
    assert capsys.readouterr().out.splitlines()[2].endswith("| 66.7% |")
    write_records(folder / "iter1" / "paths.jsonl", [], {})
    describe.main("paths", folder)
    assert capsys.readouterr().out.splitlines()[2] == "| pool | 1 | 0 | 0 | 0.0% | nan% |", "no path was kept"
