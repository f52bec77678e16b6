"""The house rules: who may import whom, what no file may do, and that every command shown
exists."""
import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [  # from the top: a room imports from its own and from those below it
    {"irpo", "reft", "rft"}, {"evaluate"}, {"sample", "train"},
    {"model", "losses", "rewards", "checkpoint", "data"}, {"grading"}, {"infra"}]
METHODS = ROOMS[0]
PEERS = {("sample", "train"), ("train", "sample"), ("losses", "model")}  # within a room, and not allowed
RUNS_PROGRAMS = {"sandbox.py"}  # in a locked process of its own, which is its purpose


def sources() -> list[Path]:
    """Every Python file of the project, its tests excepted."""
    return sorted([*ROOT.glob("*.py"), *(path for folder in ("data", "grading", "infra", "tools")
                                         for path in (ROOT / folder).rglob("*.py"))])


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all imports, those inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("data" if node.level else node.module.split(".")[0])
    return names


def import_faults(room: str, text: str) -> list[str]:
    """What a file of this room (a top-level file, or a folder) may not import, of all that its text imports."""
    height = {name: i for i, names in enumerate(ROOMS) for name in names}
    if room == "tools":  # may import anything, and is imported by nothing
        return []
    if room not in height:
        return [f"{room} has no place in ROOMS"]
    others = imported(ast.parse(text)) & {*height, "tools"} - {room}
    return [f"{room} imports {other}" for other in sorted(others)
            if other == "tools" or height[other] < height[room] or {room, other} <= METHODS
            or (room, other) in PEERS]


def test_import_levels():
    """Deleting a method must break nothing else; a formula must be readable without the machinery."""
    for path in sources():
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert import_faults(room, path.read_text()) == [], path


@pytest.mark.parametrize("room, text", [
    ("irpo", "import rft"), ("evaluate", "from irpo import main"), ("losses", "from train import fit"),
    ("losses", "import model"), ("sample", "def f():\n    import train"), ("train", "from tools import report"),
    ("model", "import sample"), ("infra", "import checkpoint"), ("grading", "import rewards"),
    ("helpers", "import torch")])
def test_import_levels_are_checked(room, text):
    """The check above must see each of these, also inside a function."""
    assert import_faults(room, text)


def test_no_module_hides_another():
    """A select.py or types.py beside the drivers is imported in place of Python's own, from
    anywhere; utils, common and helpers become drawers."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert path.stem not in sys.stdlib_module_names, path
            assert path.stem not in {"utils", "common", "helpers", "torch", "numpy", "tqdm"}, path


def dangers(text: str) -> list[str]:
    """Calls that run text as code, and imports or calls that unpickle."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        function, keywords = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
        if (function in ("eval", "exec", "builtins.eval", "builtins.exec")
                or function == "torch.load" and "weights_only=True" not in keywords
                or "allow_pickle=True" in keywords):
            found.append(ast.unparse(node))
    unsafe = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    return found + sorted(imported(ast.parse(text)) & unsafe)


def test_nothing_is_evaluated_or_unpickled():
    """A model's text must not run as code, nor a downloaded weight file."""
    for path in sources():
        if path.name not in RUNS_PROGRAMS:
            assert dangers(path.read_text()) == [], path


@pytest.mark.parametrize("text", [
    "x = eval('1')", "exec(code, {})", "import pickle", "torch.load(path)",
    "torch.load(path, weights_only=False)", "numpy.load(p, allow_pickle=True)"])
def test_dangers_are_seen(text):
    """The check above must see each of these; and leave model.eval() alone."""
    assert dangers(text)
    assert not dangers("model.eval()\ntorch.load(path, weights_only=True)")


# --- every command that is shown ------------------------------------------------------------------

def fenced_commands(markdown: str) -> list[str]:
    """Command lines of fenced blocks, continuations joined; `$ ` and environment settings
    removed."""
    commands = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        commands += command_lines(block)
    return commands


def command_lines(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    found = (re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*((?:python3?|make|\S*/python|torchrun) .*|make$)",
                      line)
             for line in lines)
    return [match.group(1) for match in found if match]


def docstring_commands(path: Path) -> list[str]:
    return command_lines(ast.get_docstring(ast.parse(path.read_text())) or "")


class Parsed(Exception):
    """Raised in place of a script's work, once its command line has been understood."""


def script_fault(script: Path, arguments: list[str]) -> str | None:
    """Why a script would refuse these arguments; `...` stands for flags that were given before."""
    if not script.is_file():
        return f"{script.name} does not exist"
    if "..." in arguments:
        arguments = ["--model", "DIR", *(argument for argument in arguments if argument != "...")]
    arguments = ["." if a.startswith("runs/") else a for a in arguments]  # made by commands before
    module = importlib.import_module(".".join(script.relative_to(ROOT).with_suffix("").parts))
    owner, name = ((module, "parse_config") if hasattr(module, "parse_config")
                   else (argparse.ArgumentParser, "parse_args"))
    parse = getattr(owner, name)

    def parse_and_stop(*args, **options):
        parse(*args, **options)
        raise Parsed

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(owner, name, parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *arguments])
        try:
            module.main()
        except Parsed:
            return None
        except SystemExit as stop:
            return f"{script.name}: {said.getvalue() or stop.code}"
    return f"{script.name} did not read its command line"


def dry_run(arguments: list[str], makefile: Path) -> subprocess.CompletedProcess:
    """`make -n`, without the MAKEFLAGS of the `make test` that runs this."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "-n", "-f", str(makefile), *arguments], cwd=ROOT, text=True,
                          capture_output=True, env=environment)


def test_base_models_are_never_made_side_by_side(tmp_path):
    """Two with two threads each took ten times as long as one after the other; a -j must not start both."""
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f"#!/bin/sh\necho start >> {seen}\nsleep 0.3\necho end >> {seen}\n")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(["make", "-s", "-j2", "-o", ".venv/runtime", "base", "rft-base", f"PY={python}"], cwd=ROOT,
                   check=True, env=environment)
    assert seen.read_text().split() == ["start", "end"] * 2


def make_faults(arguments: list[str], makefile: Path) -> list[str]:
    """What `make -n` refuses, variables that the Makefile does not use, and faults of its
    recipes."""
    names = {argument.split("=")[0] for argument in arguments if "=" in argument}
    faults = [f"the Makefile does not use {name}" for name in sorted(names)
              if not re.search(rf"\$\([^)]*\b{name}\b", makefile.read_text())]
    dry = dry_run(arguments, makefile)
    if dry.returncode:
        return [*faults, dry.stderr.strip()]
    for command in sorted({c for c in command_lines(dry.stdout) if not c.startswith("make")}):
        faults += command_faults(command, makefile)
    return faults


def command_faults(command: str, makefile: Path = ROOT / "Makefile") -> list[str]:
    """Why a command would not run as it is written."""
    words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("&&", "|", ";", ">", "&")]
    words = words[:ends[0]] if ends else words
    if words[0] == "make":
        return make_faults(words[1:], makefile)
    while words and words[0] != "-m" and not words[0].endswith(".py"):
        words = words[1:]  # python or torchrun, and its own options
    if not words:
        return []
    if words[0] == "-m":
        path = ROOT.joinpath(*words[1].split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if words[1].split(".")[0] in ("pytest", "ruff", "venv", "pip"):
            return []
        return [fault for fault in [script_fault(path, words[2:])] if fault]
    return [fault for fault in [script_fault(ROOT / words[0], words[1:])] if fault]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README yet")
def test_every_command_in_the_readme_parses():
    """A flag renamed in the code and not in the README is the first thing that a newcomer meets."""
    commands = fenced_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert commands
    faults = {command: command_faults(command) for command in commands}
    assert {command: fault for command, fault in faults.items() if fault} == {}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_docstring_parses(path):
    """The command to run, at the top of each file."""
    for command in docstring_commands(path):
        assert command_faults(command) == []


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="no Makefile yet")
def test_every_command_in_the_makefile_parses():
    """Recipes call scripts with flags, too: all targets that `make help` lists, as `make -n` shows
    them."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w-]+):.*## ", text, re.MULTILINE)
    assert len(targets) > 3
    for target in targets:
        assert make_faults([target], ROOT / "Makefile") == [], target


@pytest.mark.parametrize("arguments, remedy", [
    (f"{goal} TASK=gsm8k", f"make {goal} TASK=gsm8k MODEL=dir") for goal in ("irpo", "rft", "reft", "eval")] + [
    (f"{goal} MODEL=dir", "needs TASK") for goal in ("irpo", "rft", "reft")])
def test_make_refuses_a_task_without_a_model_and_a_model_without_a_task(arguments, remedy):
    dry = dry_run(arguments.split(), ROOT / "Makefile")
    assert dry.returncode and remedy in dry.stderr and not dry.stdout


@pytest.mark.parametrize("arguments, programs", [
    *((f"{name} TASK=gsm8k MODEL=dir", [name, "tools.report"]) for name in ("irpo", "rft", "reft")),
    *((f"{name} SEED=3 JOBS=2", ["train", "tools.sweep"]) for name in ("rft", "reft")),
    ("tables", ["tools.sweep"] * 3), ("eval TASK=gsm8k MODEL=dir", ["evaluate"]),
    ("eval MODEL=dir", ["evaluate"]), ("data TASK=gsm8k", ["data.download"])])
def test_make_runs_the_right_programs(arguments, programs):
    """Besides those that make the environment, if it is missing."""
    dry = dry_run(arguments.split(), ROOT / "Makefile")
    assert not dry.returncode, dry.stderr
    assert [name for name in re.findall(r"python (?:-m )?(\S+?)(?:\.py)? ", dry.stdout)
            if name not in ("pip", "venv")] == programs


EXAMPLE = """
```
python train.py --preset base --seed 3    # about two minutes
$ make irpo
make irpo ARGS="--model DIR --alpha 0"
OMP_NUM_THREADS=1 python irpo.py --preset toy --model DIR \\
    --beta 0.5 ...
python -m data.toy --steps 4
python -m pytest -q
```
python irpo.py --not_in_a_block
"""


@pytest.fixture
def makefile(tmp_path) -> Path:
    path = tmp_path / "Makefile"
    path.write_text("irpo: base\n\tpython irpo.py --model DIR $(ARGS) --seed $(or $(SEED),0)\n"
                    "base:\n\t@echo\n")
    return path


def test_commands_of_a_readme_are_found(makefile):
    """What is not found is not checked."""
    commands = fenced_commands(EXAMPLE)
    programs = [command.split()[0] for command in commands]
    assert programs == ["python", "make", "make", "python", "python", "python"]
    assert [command_faults(command, makefile) for command in commands] == [[]] * 6


@pytest.mark.parametrize("command", [
    "python irpo.py --preset toy --alhpa 0", "python nothing.py", "python irpo.py --preset huge",
    "python irpo.py --alpha much", "python train.py --pairs_per_question 3",
    "python -m data.toy --size 3",
    "python sample.py --model DIR --top_z 3", "python -m data.nothing", "make ipro",
    "make irpo GPU=1",
    'make irpo ARGS="--alhpa 0"', ".venv/bin/python -u irpo.py --alhpa 0",
    "torchrun --nproc_per_node 8 irpo.py --alhpa 0", "python irpo.py --method ppo"])
def test_commands_that_would_fail_are_seen(command, makefile):
    """The check above must see each of these."""
    assert command_lines(command) == [command]
    assert command_faults(command, makefile)


@pytest.mark.parametrize("name", ["irpo", "train", "evaluate", "reft", "rft"])
def test_every_flag_has_help(name):
    """A flag without a word of explanation is one that nobody can use."""
    if not (ROOT / f"{name}.py").exists():
        pytest.skip(f"no {name}.py yet")
    for field in dataclasses.fields(importlib.import_module(name).Config):
        assert field.metadata.get("help"), field.name
