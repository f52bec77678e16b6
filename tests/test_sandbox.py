"""Programs that a model might write, including hostile ones: each can only fail its own job."""
import os
import platform
import socket
import subprocess
import sys

import pytest

from grading import sandbox
from rewards import grade, grade_programs



def returns(expression: str) -> str:
    return f"def solution():\n    return {expression}"


GOOD = returns("math.floor(72.9)")


def program(*lines: str) -> str:
    """Run the lines and then return the right answer, 72: "correct" means that they worked."""
    return "def solution():\n" + "".join(f"    {line}\n" for line in lines) + "    return 72\n"


def forever(*lines: str) -> str:
    """Repeat the lines whatever they raise."""
    body = "".join(f"            {line}\n" for line in lines)
    loop = f"    while True:\n        try:\n{body}        except BaseException:\n            pass\n"
    return "def solution():\n" + loop


# In these programs FILE is a file of ours, PORT a port on which we listen.
HOSTILE = {
    "endless loop": forever("raise KeyboardInterrupt"),
    "endless loop outside the function": program() + "while True: pass\n",
    "sleeps": program("import time", "time.sleep(1000)"),
    "uses the system's random numbers": program("import os", "os.urandom(1)"),
    "handles signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal."
    "SIG_IGN)\n    except Exception: pass\n" + forever("1"),
    "fork": program("import os", "os.fork()"),
    "fork bomb": forever("import os", "os.fork()"),
    "daemon": program("import os", "if os.fork() == 0:", "    os.setsid()", "    while 1: pass"),
    "thread": program("import threading", "threading.Thread(target=print).start()"),
    "shell": program("import os", "assert os.system('true') == 0"),
    "exec": program("import os", "os.execv('/bin/sh', ['sh', '-c', 'sleep 1000'])"),
    "spawn": program("import os", "os.posix_spawn('/bin/sleep', ['sleep', '1000'], {})"),
    "subprocess": program("import subprocess", "subprocess.run('true')"),
    "memory at once": program("x = [0] * 10**12"),
    "memory by doubling": program("x = 'x'", "while True: x += x"),
    "memory in small pieces": program("x = []", "while True: x.append(bytearray(1 << 20))"),
    "closes the pipe": program("import os", "os.close(0)"),
    "answers and closes the pipe": program("import os", "os.write(0, b'\"72\"')", "os.close(0)", "os._exit(0)"),
    "os._exit": program("import os", "os._exit(0)"),
    "sys.exit": program("import sys", "sys.exit(72)"),
    "exit": program("exit(72)"),
    "abort": program("import os", "os.abort()"),
    "segmentation fault": program("import ctypes", "ctypes.string_at(0)"),
    "kills itself": program("import os", "os.kill(os.getpid(), 9)"),
    "kills its parent": program("import os", "os.kill(os.getppid(), 9)"),
    "kills everybody": program("import os", "os.kill(-1, 9)"),
    "kills its group": program("import os", "os.killpg(0, 9)"),
    "stops its parent": program("import os, signal", "os.kill(os.getppid(), signal.SIGSTOP)"),
    "writes a file": program("open(FILE, 'w')"),
    "makes a file": program("open(FILE + '.new', 'x')"),
    "makes a file by number": program("import os", "os.open(FILE + '.new', os.O_CREAT)"),
    "deletes": program("import os", "os.unlink(FILE)"),
    "renames": program("import os", "os.rename(FILE, FILE + '.new')"),
    "makes a directory": program("import os", "os.mkdir(FILE + '.new')"),
    "makes a link": program("import os", "os.symlink(FILE, FILE + '.new')"),
    "changes a mode": program("import os", "os.chmod(FILE, 0)"),
    "deletes by ctypes": program("import ctypes", "assert ctypes.CDLL(None).unlink(FILE.encode()) == 0"),
    "reads a file": program("open(FILE).read()"),
    "frees a descriptor and reads": program("import os", "os.close(0)", "open(FILE).read()"),
    "lists a directory": program("import os", "os.listdir('/')"),
    "reads the environment": program("import os", "assert os.environ['SECRET']"),
    "reads its parent's environment": program("import os", "open(f'/proc/{os.getppid()}/environ').read()"),
    "connects": program("import socket", "socket.create_connection(('127.0.0.1', PORT))"),
    "makes a socket": program("import _socket", "_socket.socket()"),
    "makes a pipe": program("import os", "os.pipe()"),
    "reads the keyboard": program("input()"),
    "prints without end": forever("print('72' * 10**6)"),
    "floods its pipe": program("import os", "while True: os.write(0, b'7' * 10**6)"),
    "floods output": program("import os", "while True: os.write(1, b'7' * 10**6)"),
    "fake result in its pipe": program("import os", "os.write(0, b'72')"),
    "fake result and exit": program("import os", "os.write(0, b'{\"value\": 72}')", "os._exit(0)"),
    "prints the result": "def solution():\n    print(72)\n    print('\"72\"')\n",
    "raises its limits": program("import resource", "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))"),
    "deep recursion": program("f = lambda n: f(n + 1)", "f(0)"),
    "deep recursion without limit": program("import sys", "sys.setrecursionlimit(10**9)", "f = lambda n: f(n + 1)",
                                            "f(0)"),
    "huge power": returns("9**9**9"),
    "huge number": returns("10**5000"),
    "huge text": returns("'72' * 10**6"),
    "reads a huge number": program("int('9' * 5000)"),
    "nested source": program("x = " + "(" * 10**5),
    "NUL in the source": program("x = '\0'"),
    "surrogate in the source": program("x = '\ud800'"),
    "lying number": "class X:\n    def __float__(self): return 'x'\n" + returns("X()"),
    "slow number": "class X:\n    def __float__(self):\n        while 1: pass\n" + returns("X()"),
    "True": returns("71 < 72"),
    "list": returns("[72]"),
    "generator": "def solution():\n    yield 72",
}

SECCOMP = pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in sandbox.ALLOWED,
                             reason="no seccomp here")


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """Set up a file, a listening port and a secret; check afterwards that nobody touched them."""
    monkeypatch.setenv("SECRET", "72")
    file = tmp_path / "file"
    file.write_text("untouched")
    mode = file.stat().st_mode
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield {"FILE": repr(str(file)), "PORT": str(listener.getsockname()[1])}
        with pytest.raises(BlockingIOError):  # nobody has connected
            listener.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (file.read_text(), file.stat().st_mode) == ("untouched", mode)


def servers(kind: str) -> list[sandbox.Server]:
    return [sandbox._server(kind, worker, os.getpid()) for worker in range(2)]


def survivors() -> list[int]:
    """Return processes in a server's own directory that are no server; a fork cannot leave it."""
    pids = [server.process.pid for server in servers("program")]
    homes = {os.readlink(f"/proc/{pid}/cwd") for pid in pids}
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            home = os.readlink(f"/proc/{pid}/cwd")
        except OSError:  # ended, or a zombie, or not ours
            continue
        if home in homes and pid not in pids:
            found.append(pid)
    return found


def test_hostile_programs(traps):
    """None is rewarded, does harm or leaves a process behind, and the honest programs among them are right."""
    texts = []
    for text in HOSTILE.values():
        for name, value in traps.items():
            text = text.replace(name, value)
        texts += [text, GOOD]
    got = grade_programs(texts, ["72"] * len(texts), "gsm8k", workers=2)
    verdicts = dict(zip(HOSTILE, (g.verdict for g in got[::2]), strict=True))
    assert {name for name, verdict in verdicts.items() if verdict == "correct"} == set()
    assert {g.verdict for g in got[1::2]} == {"correct"}
    assert {verdicts[name] for name in verdicts if "loop" in name} == {"timeout"}
    if sys.platform == "linux":
        assert survivors() == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_survivors_would_be_seen():
    """The check above must be able to fail."""
    grade_programs([GOOD, GOOD], ["72", "72"], "gsm8k", workers=2)
    for server in servers("program"):
        server.run({"code": GOOD})  # started, whichever worker took the two above
    home = f"/proc/{servers('program')[0].process.pid}/cwd"
    with subprocess.Popen(["sleep", "60"], cwd=home) as left_behind:
        assert survivors() == [left_behind.pid]
        left_behind.kill()
    assert survivors() == []


@SECCOMP
@pytest.mark.parametrize("call", ["os.kill(os.getpid(), 0)", "os.unlink('x')", "os.fork()", "os.getcwd()"])
def test_seccomp_refuses(call):
    """Harmless calls of the kinds that the limits alone would let through."""
    code = program("import os", f"try: {call}", "except PermissionError: return 71")
    assert grade(code, "71", "gsm8k", "python").verdict == "correct"


@SECCOMP
def test_a_leaking_seal_is_noticed_before_any_program_runs(monkeypatch):
    """With the filter left out, `os.kill(-1, 9)` as root once ended every process of a machine."""
    monkeypatch.setattr(sandbox, "install_seccomp", lambda calls: None)
    monkeypatch.setattr(sandbox, "prepare_program", lambda: None)
    with pytest.raises(SystemExit, match="does not work here"):
        sandbox.serve("program")


def test_no_program_changes_another():
    """In one process, `math.floor = ...` would decide what the next program returns."""
    patch = "import math, builtins\n" + program("math.floor = lambda x: 0", "builtins.str = 0")
    got = grade_programs([patch, GOOD] * 3, ["72"] * 6, "gsm8k", workers=1)
    assert [g.verdict for g in got[1::2]] == ["correct"] * 3


def test_outcomes_are_in_the_order_of_the_jobs():
    texts = [returns(str(i)) for i in range(60)]
    texts[7] = "no program"
    got = grade_programs(texts, [str(i) for i in range(60)], "gsm8k", workers=2)
    assert [g.answer for g in got] == [str(i) if i != 7 else None for i in range(60)]


def test_an_interrupted_call_does_not_shift_the_next(monkeypatch):
    """Ctrl-C between job and reply once left the reply in the pipe, and the next job got it."""
    server = sandbox._server("program", 0, os.getpid())
    server.run({"code": GOOD})

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.run({"code": returns("1")})
    assert server.run({"code": GOOD}).value == "72"


def test_a_killed_server_is_started_again():
    server = sandbox._server("program", 0, os.getpid())
    server.run({"code": GOOD})
    server.process.kill()
    server.process.wait()
    assert server.run({"code": GOOD}).value == "72"


def test_a_server_that_cannot_start_says_why(monkeypatch):
    """Without memory for a process, the message was that None cannot be killed."""
    def refused(*words, **options):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(sandbox.subprocess, "Popen", refused)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        sandbox.Server("program").run({"code": GOOD})


def test_parent_and_forked_child_do_not_share_a_server():
    """Two processes on the ends of one pipe would read each other's verdicts."""
    assert grade(GOOD, "72", "gsm8k", "python").verdict == "correct"
    child = os.fork()
    try:
        for i in range(20) if child else range(100, 120):
            assert grade(returns(str(i)), str(i), "gsm8k", "python").verdict == "correct"
        if child == 0:
            os._exit(0)
    finally:
        if child == 0:  # never back into pytest
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_sandbox_that_cannot_work_says_so(monkeypatch, capfd):
    """If every fork fails, all answers are "wrong" and nobody knows why; starting must fail."""
    with pytest.raises(RuntimeError, match="did not start"):
        monkeypatch.setitem(sandbox.KINDS, "unknown", sandbox.KINDS["program"])
        sandbox.Server("unknown").run({"code": GOOD})
    assert "KeyError" in capfd.readouterr().err


def test_a_failing_trial_stops_the_server(monkeypatch):
    monkeypatch.setitem(sandbox.KINDS, "broken", (lambda: None, lambda job: 1 / 0, False, {}, "1"))
    with pytest.raises(SystemExit, match="does not work here"):
        sandbox.serve("broken")


@pytest.mark.parametrize("code, status", [
    (returns("int(list({'71', '72', '73'})[0])"), "done"),
    (returns("int(next(iter(frozenset('abcdefgh'))) == 'a')"), "done"),
    ("import random\n" + returns("random.random()"), "done"),
    ("import random\n" + returns("random.Random().random()"), "done"),
    ("import random\n" + program("random.seed()", "return random.random()"), "done"),
    ("import random\n" + returns("random.SystemRandom().random()"), "failed"),
    ("import os\n" + returns("int.from_bytes(os.urandom(2), 'big')"), "failed")])
def test_the_same_program_gives_the_same_answer(code, status):
    """-I ignores PYTHONHASHSEED, so the first of a set was another one in each server: right now, wrong later."""
    answers = set()
    for _ in range(3):
        server = sandbox.Server("program")
        outcome = server.run({"code": code})
        server.process.stdin.close()
        server.process.wait()
        answers.add((outcome.status, outcome.value))
    assert len(answers) == 1 and answers.pop()[0] == status


def test_verdicts_do_not_depend_on_load():
    """Under a limit of wall-clock time 19 of 96 right programs timed out with 32 workers on 2 cores, and a file of
    samples had an accuracy of 0.0 %, then of 100.0 %. Beside busy processes, this program takes several seconds."""
    code = "import time\n" + program("end = time.process_time() + 0.8", "while time.process_time() < end: pass")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * sandbox.usable_cores())]
    try:
        got = grade_programs([code] * 2, ["72"] * 2, "gsm8k", workers=32)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [g.verdict for g in got] == ["correct"] * 2


def test_workers_are_usable_cores_at_most(monkeypatch):
    """A batch system that gives 2 of 64 cores would share them among 64 programs at once."""
    asked = []
    monkeypatch.setattr(sandbox.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr(sandbox, "_server", lambda kind, worker, pid: asked.append(worker) or sandbox.Server(kind))
    monkeypatch.setattr(sandbox.Server, "run", lambda self, job: sandbox.Outcome("done", "72"))
    assert [g.verdict for g in grade_programs([GOOD] * 9, ["72"] * 9, "gsm8k", workers=64)] == ["correct"] * 9
    assert asked == [0, 1]


@pytest.mark.parametrize("code, gold, verdict", [
    (GOOD, "72", "correct"),
    *[(f"{fence}\n{GOOD}\n```\nThat is it.", "72", "correct") for fence in (
        "```python3", "```Python", "```py3", "``` python", "```", "~~~python", '```python title="a.py"')],
    (f"```python\n{GOOD}\n```".replace("\n", "\r\n"), "72", "correct"),
    (f"{GOOD}\n```", "72", "correct"),
    (f"{GOOD}\n```\nIt returns 72.", "72", "correct"),
    (f"The plan:\n```\nadd the two\n```\nThe program:\n```python\n{GOOD}\n```", "72", "correct"),
    (f"```python\n{returns('71')}\n```\nNo:\n```python\n{GOOD}\n```\n```\n72\n```", "72", "correct"),
    ("1. Write:\n   ```python\n   def solution():\n       return 72\n   ```", "72", "correct"),
    ("def solution():\n    a = 48\n\n    b = 24\n    return a + b", "72", "correct"),
    (GOOD + "\n\nQuestion:\nNext?\nAnswer reasoning:\ndef solution():\n    x", "72", "correct"),
    (GOOD + "\n\nThis program returns 72.", "72", "correct"),
    (GOOD + "\n\nprint(solution() / 0)", "72", "correct"),
    ("import math\n\ndef half(x):\n    return x / 2\n\n" + returns("half(144)"), "72", "correct"),
    (returns("half(144)") + "\n\ndef half(x):\n    return x / 2", "72", "correct"),
    (returns("72") + "\n" + returns("70"), "72", "wrong"),
    (returns("71.99999999999999"), "72", "correct"),
    (returns("72.02"), "72", "wrong"),
    (returns("0.1 + 0.2 - 0.3"), "0", "correct"),
    (returns("-3 / 8"), "-0.375", "correct"),
    (returns("10**20 + 1"), "100000000000000000000", "wrong"),
    ("from fractions import Fraction\n" + returns("Fraction(1, 3)"), "0.3333333333333333", "correct"),
    ("from decimal import Decimal\n" + returns("Decimal('72.0')"), "72", "correct"),
    ("import datetime\n" + returns("datetime.datetime.strptime('2024-03-01', '%Y-%m-%d').timetuple().tm_yday"),
     "61", "correct"),
    (returns("'72'"), "72", "correct"),
    *[(returns(value), "72", "unparsed") for value in ("'72 clips'", "None", "float('nan')", "float('inf')", "72j")],
    ("def solution(x):\n    return 72", "72", "unparsed"),
    ("def solution():\nreturn 72", "72", "unparsed"),
    ("def answer():\n    return 72", "72", "unparsed"),
    ("", "72", "unparsed")])
def test_programs(code, gold, verdict):
    assert grade(code, gold, "gsm8k", "python").verdict == verdict


@pytest.mark.parametrize("value, verdict", [
    ("'A'", "correct"), ("'b'", "wrong"), ("None", "unparsed"), ("['a']", "unparsed"), ("97", "unparsed")])
def test_letter_programs(value, verdict):
    """str(None) is "none", and the authors read it as a wrong answer, so that every crash earned a reward of 0.1."""
    assert grade(returns(value), "a", "mathqa", "python").verdict == verdict


def test_sympy_programs():
    pytest.importorskip("sympy")
    code = returns("sympy.solve(2 * sympy.Symbol('x') - 144)[0]")
    assert grade(code, "72", "gsm8k", "python").verdict == "correct"
