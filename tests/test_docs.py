"""What is written about the code is true of it: commands parse, links lead somewhere, names exist."""
import ast
import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from infra.run import read_json
from commands import ROOT, code_spans, command_faults, command_lines, named_blocks, script_fault, shown_commands
from tools import memory

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "LOG.md", *sorted((ROOT / "results").rglob("*.md"))]
SOURCES = [path for folder in (".", "data", "grading", "infra", "tools")
           for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = ["irpo", "rft", "reft", "train", "evaluate", "sample", "data", "tools.memory", "tools.bench"]

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # scripts are run once more


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- what can be wrong -----------------------------------------------------------------------------

@cache
def all_flags() -> set[str]:
    """Collect the flags that the scripts' --help shows."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        for script in SCRIPTS:
            script_fault(script, ["--help"])
    return set(re.findall(r"--[\w-]+", text.getvalue()))


def flag_faults(span: str, script: str) -> list[str]:
    """Check `--flag`, `--flag value` (by the script that the page is about) and `script.py --flag value`."""
    if re.match(r"\w+\.py --", span):
        return command_faults(f"python {span} ...")
    if not span.startswith("--"):
        return []
    if " " in span and (ROOT / f"{script}.py").exists():
        return command_faults(f"python {script}.py {span} ...")
    return [f"{span}: no such flag"] if span.split()[0] not in all_flags() else []


def link_faults(text: str, folder: Path) -> list[str]:
    """Check relative links; one that says `file.py:name` must lead to that file."""
    faults = []
    for label, target, anchor in re.findall(r"\[([^\]]*)\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        path = folder / target
        if target.startswith("https://"):
            continue
        if not path.exists() or anchor and anchor not in anchors(path.read_text() if target else text):
            faults.append(f"{target}#{anchor}")
        named = re.match(r"`([\w/]+\.py)", label)
        if named and path.resolve() not in (ROOT / named[1], ROOT / "tests" / named[1]):
            faults.append(f"{label} leads to {target}")
    return faults


def anchors(text: str) -> set[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def name_faults(text: str) -> list[str]:
    """Check `file.py:name`, `test_file.py::test_name`, `name()`, and paths of ours."""
    faults = []
    for span in code_spans(text):
        if match := re.fullmatch(r"([\w/]+\.py)(?::(\w+))?", span):
            path, name = ROOT / match[1], match[2]
            known = path.exists() and (not name or name in defined(path))
        elif match := re.fullmatch(r"(\w+\.py)::(\w+)", span):
            path = ROOT / "tests" / match[1]
            known = path.exists() and match[2] in defined(path)
        elif match := re.fullmatch(r"(\w+)\(.*\)", span):
            known = any(match[1] in defined(path) for path in SOURCES)
        else:
            known = "/" not in span or re.search(r"[^\w./-]|^(runs|downloads|models)\b", span) or (ROOT / span).exists()
        faults += [] if known else [span]
    return faults


@cache
def defined(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def guide_faults(text: str, script: str) -> list[str]:
    """Check the commands, flags and names of a page about a script."""
    faults = [fault for command in shown_commands(text) for fault in command_faults(command)]
    return faults + [fault for span in code_spans(text) for fault in flag_faults(span, script)] + name_faults(text)


def result_faults(text: str) -> list[str]:
    """Check that a table of percentages repeats the file of results to which the last link before it leads."""
    faults = []
    for table in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        files = re.findall(r"\]\((results/[^)#]+\.md)", text[:table.start()])
        known = (ROOT / files[-1]).read_text(encoding="utf-8") if files else ""
        numbers = re.findall(r"[-+]?\d+\.\d+%?", table[0].replace("\N{MINUS SIGN}", "-")) if "%" in table[0] else []
        faults += [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", known)]
    return faults


# --- and is not ------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_are_true(path, tmp_path, monkeypatch):
    """A flag renamed in the code and not in the README is the first thing that a newcomer meets. Results and the log
    may speak of what is gone, but their links lead somewhere."""
    text = path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # where the files lie that the page shows
    for name, content in named_blocks(text).items():
        (tmp_path / name).write_text(content)
    assert link_faults(text, path.parent) + (guide_faults(text, path.stem) if path in GUIDES else []) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_commands_of_docstrings_parse(path):
    """The command to run, at the top of each file."""
    for command in command_lines(ast.get_docstring(ast.parse(path.read_text())) or ""):
        assert command_faults(command) == []


def test_commands_are_found():
    """What is not found is not checked."""
    commands = shown_commands("""
```
python train.py --preset base --seed 3    # about two minutes
$ make irpo
make irpo ARGS="--alpha 0"
OMP_NUM_THREADS=1 python irpo.py --preset toy --model DIR \\
    --beta 0.5 ...
python -m data.toy --steps 4
```
python irpo.py --not_shown_as_code, and `python -m pytest -q`
""")
    assert [command.split()[0] for command in commands] == ["python", "make", "make", "python", "python", "python"]
    assert [command_faults(command) for command in commands] == [[]] * 6


@pytest.mark.parametrize("text", [
    "`python irpo.py --preset toy --alhpa 0`", "`python nothing.py`", "`python irpo.py --preset huge`",
    "`python irpo.py --alpha much`", "`python train.py --pairs_per_question 3`", "`python -m data.toy --size 3`",
    "`python sample.py --model DIR --top_z 3`", "`python -m data.nothing`", "`make ipro`", "`make irpo GPU=1`",
    '`make irpo ARGS="--alhpa 0"`', "`.venv/bin/python -u irpo.py --alhpa 0`", "`python -m tools.sweep ifrt`",
    "`torchrun --nproc_per_node 8 irpo.py --alhpa 0`", "`python irpo.py --method ppo --model DIR`", "`--alhpa`",
    "`irpo.py --alhpa 0`", "[x](nothing.md)", "[x](LOG.md#no-such-heading)", "[x](#nowhere)", "![x](no.png)",
    "[`irpo.py:main`](rft.py)", "`irpo.py:make_pears`", "`nothing.py`", "`make_pears(right)`", "`grades/`",
    "`test_irpo.py::test_pears`", "`test_nothing.py::test_pairs`"])
def test_faults_are_seen(text):
    assert len(link_faults(text, ROOT) + guide_faults(text, "README")) == 1


def test_the_results_of_the_readme_are_those_of_their_files():
    text = GUIDES[0].read_text(encoding="utf-8")
    assert result_faults(text) == []
    rows = {row.strip(): re.findall(r"[\d.]+%", numbers)  # of both tables, whose rows have different names
            for row, numbers in re.findall(r"^\| ([^|]+)\|(.*%.*)", text, re.MULTILINE)}
    cells = read_json(ROOT / "results" / "irpo-table" / "table.json")["cells"]
    for row, cell in (("IRPO", "irpo"), ("DPO only (α = 0)", "dpo"), ("SFT on chosen", "sft_chosen"),
                      ("SFT on gold", "sft_gold")):
        assert rows[row] == [f"{model['accuracy']['mean']:.1%}" for model in cells[cell]["models"].values()], row
    cells = read_json(ROOT / "results" / "compare" / "compare.json")["cells"]
    for row, cell in (("SFT on chosen (STaR)", "sft_chosen"), ("IRPO, α tuned (16)", "irpo_alpha"), ("RLOO", "rloo"),
                      ("PPO", "ppo"), ("GRPO", "grpo"), ("IRPO, α = 1", "irpo"), ("DPO", "dpo"),
                      ("base model", "irpo")):
        model = [*cells[cell]["models"].values()][0 if row == "base model" else -1]
        assert rows[row] == [f"{model[measure]['mean']:.1%}" for measure in ("accuracy", "pass@8")], row
    file = next((ROOT / "results").rglob("*.md")).relative_to(ROOT)
    assert result_faults(f"| x | 1234.5% |\n\n[y]({file})\n") == ["1234.5%"]
    assert result_faults(f"[y]({file})\n\n| x | 1234.5% |\n") == ["1234.5%"]


def test_numbers_about_the_code_are_current():
    """Line counts of the README within a tenth, and rows of the memory table to the digit."""
    rows = re.findall(r"^\| \[`(\w+\.py)`\].*?\| ([\d,]+) \|", GUIDES[0].read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(path.name for path in ROOT.glob("*.py"))
    for name, lines in rows:
        count = len((ROOT / name).read_text().splitlines())
        assert int(lines) == pytest.approx(count, rel=0.1), f"README's table: {name} has {count} lines now"
    text, config = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), memory.Config()
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    assert len(rows) > 4
    for name, parameters, *values, responses in rows:
        needed = memory.memory(memory.model_config(name), config)
        assert values == [f"{needed[column]:,.2f}" for column in head[2:-1]], name
        assert parameters == f"{memory.parameters(memory.model_config(name))[0]:,}"
        assert responses == f"{memory.responses(needed, config):,}"
