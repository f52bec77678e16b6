"""The house rules: who may import whom, and what no file may do or be called."""
import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data", "grading", "infra", "tools", "results")
ROOMS = [  # from the top: a room imports from its own and from those below it
    {"irpo", "reft", "rft"}, {"evaluate"}, {"sample", "train"},
    {"model", "losses", "rewards", "checkpoint", "data"}, {"grading"}, {"infra"}]
METHODS = ROOMS[0]
PEERS = {("sample", "train"), ("train", "sample"), ("losses", "model")}  # within a room, and not allowed
RUNS_PROGRAMS = {"sandbox.py"}  # in a locked process of its own, which is its purpose


def sources() -> list[Path]:
    """List every Python file of the project except its tests."""
    return sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def imported(tree: ast.AST) -> set[str]:
    """Collect the top-level names of all imports, those inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("data" if node.level else node.module.split(".")[0])
    return names


def import_faults(room: str, text: str) -> list[str]:
    """List the forbidden imports of a file in this room (a top-level file, or a folder)."""
    height = {name: i for i, names in enumerate(ROOMS) for name in names}
    if room in ("tools", "results"):  # may import anything, and are imported by nothing
        return []
    if room not in height:
        return [f"{room} has no place in ROOMS"]
    others = imported(ast.parse(text)) & {*height, "tools", "results"} - {room}
    return [f"{room} imports {other}" for other in sorted(others)
            if other in ("tools", "results") or height[other] < height[room] or {room, other} <= METHODS
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
    assert import_faults(room, text)


def test_no_module_hides_another():
    """A select.py next to the scripts would be imported in place of Python's own, from anywhere; utils, common and
    helpers become drawers."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert path.stem not in sys.stdlib_module_names, path
            assert path.stem not in {"utils", "common", "helpers", "torch", "numpy", "tqdm"}, path


def test_an_installed_project_is_complete():
    """A module that pyproject.toml does not list is missing after `pip install .`, and only there."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert listed["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    assert listed["packages"] == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def dangers(text: str) -> list[str]:
    """List calls that run text as code, and imports or calls that unpickle."""
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
