"""Run text that a model wrote: programs, and formulas for a computer algebra system to read.

A *server* is a clean Python process that has its imports done and forks once per job. The fork locks itself in, works,
and writes one JSON value into its only pipe. When it is done or out of time, it is killed with its process group. Jobs
share nothing, so no program can change another's result; the gold answer never gets here, so no program can read it.

The same job always has the same outcome, on a busy machine too: time is the fork's own CPU time, hashes have a fixed
seed, and the random module begins at a fixed state while the system's random numbers are refused. A program can still
depend on the date and on the addresses of its objects.

Servers for programs have no other environment, sit in an empty temporary directory that is already deleted, and their
forks are sealed. All they can do is compute, read the clock and answer:
  limits   memory, CPU time, no new process or thread, no bytes into files, no core dump, and no file descriptor but
           the pipe, so that no file and no socket can be opened.
  seccomp  the kernel refuses every system call that is not in ALLOWED, and with it signals to other processes,
           deleting, renaming and any kind of network. Linux on x86-64 and arm64, also in containers; it needs no
           privilege.
  nobody   if we are root, the fork becomes the user nobody where the system allows it.
A server tests its seal before its first job and refuses to start if the seal leaks. Without seccomp (macOS, untested)
the limits stand alone, and a program can signal and unlink what its user may. Root is exempt from the process limit,
so root without seccomp is refused.

Left out: namespaces (many containers forbid them, and nothing is left for them to do); numpy, and those parts of sympy
that load late and are not in `load_sympy`: a sealed fork cannot import them.

    run("program", {"code": "def solution():\\n    return 6 * 7"})    ->  Outcome("done", "42")
    run_all("program", jobs, workers=2)                               one Outcome per job
"""
import ctypes
import json
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

CPU_SECONDS = 2  # of its own CPU time per job: a verdict must not depend on what else the machine does
WALL_SECONDS = 45  # ends what waits without computing; no job that computes comes near, unless 20 share its core
MEMORY = 512 << 20  # bytes of address space; Python with sympy loaded takes 100 MB of it
OUTPUT = 4096  # bytes of an answer: more than any needs, less than a pipe holds
START_SECONDS = 60  # to import sympy from a cold disk; more than WALL_SECONDS

# Modules that such programs import. A sealed fork cannot open files, so they are loaded before.
MODULES = """bisect calendar cmath collections copy datetime decimal enum fractions functools heapq itertools math
numbers operator random re statistics string time typing _strptime""".split()

# The system calls of pure computation: read write mmap mprotect munmap mremap madvise brk futex rt_sigaction
# rt_sigprocmask rt_sigreturn restart_syscall sched_yield clock_gettime getrusage getpid exit exit_group. Per machine:
# its audit number, then the numbers of the calls in this order.
ALLOWED = {"x86_64": (0xC000003E, (0, 1, 9, 10, 11, 25, 28, 12, 202, 13, 14, 15, 219, 24, 228, 98, 39, 60, 231)),
           "aarch64": (0xC00000B7, (63, 64, 222, 226, 215, 216, 233, 214, 98, 134, 135, 139, 128, 124, 113, 165,
                                    172, 93, 94))}
PR_SET_PDEATHSIG, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 21, 22, 38
SECCOMP_MODE_FILTER = 2


# --- the caller's side ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Outcome:
    """What became of a job."""
    status: str  # "done" | "timeout" | "failed"
    value: object = None  # what the fork sent, if done


class Server:
    """Talk to one server process; start it when it is first needed, and again if it was killed."""

    def __init__(self, kind: str):
        self.kind = kind
        self.lock = threading.Lock()
        self.process = None

    def start(self) -> None:
        sealed = KINDS[self.kind][2]
        env = {} if sealed else os.environ  # math-verify may be somewhere on PYTHONPATH
        self.process = subprocess.Popen(  # -s: no packages of the user's; -I would ignore the hash seed
            [sys.executable, *(["-s"] if sealed else []), os.path.abspath(__file__), self.kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**env, "PYTHONHASHSEED": "0"},
            start_new_session=True)  # Ctrl-C is for us only; a server ends when its pipe closes
        if self.receive() != b"ready\n":
            raise RuntimeError(f"the {self.kind} sandbox did not start; its message is above")

    def receive(self) -> bytes:
        if not select.select([self.process.stdout], [], [], START_SECONDS)[0]:
            raise RuntimeError(f"the {self.kind} sandbox has not answered for {START_SECONDS} s")
        return self.process.stdout.readline()

    def run(self, job: dict) -> Outcome:
        with self.lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self.start()
                self.process.stdin.write(json.dumps(job).encode() + b"\n")  # ASCII, so any text passes
                self.process.stdin.flush()
                reply = self.receive()
            except BaseException:  # Ctrl-C too: the next job would get this one's late reply
                if self.process:
                    self.process.kill()
                    self.process.wait()
                raise
            if not reply:  # without seccomp, a program can kill its server; only its own job fails
                self.process.wait()
                return Outcome("failed")
        return decode(**json.loads(reply))


def decode(status: str, output: str) -> Outcome:
    """Parse what a fork sent. The program may have written it, so anything but one JSON value is no answer."""
    try:
        return Outcome(status, json.loads(output)) if status == "done" else Outcome(status)
    except (ValueError, RecursionError):
        return Outcome("failed")


@cache
def _server(kind: str, worker: int, pid: int) -> Server:
    return Server(kind)  # one per pid of ours: after a fork, parent and child must not share pipes


def usable_cores() -> int:
    """Cores that this process may use: under a batch system fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(kind: str, job: dict) -> Outcome:
    """Run one job. The first of its kind waits for a server to start."""
    return run_all(kind, [job], workers=1)[0]


def run_all(kind: str, jobs: Sequence[dict], workers: int) -> list[Outcome]:
    """Run jobs on `workers` servers in parallel, one per core at most; return outcomes in the order of the jobs."""
    idle, workers = SimpleQueue(), min(workers, usable_cores())
    for worker in range(workers):
        idle.put(_server(kind, worker, os.getpid()))

    def run_one(job: dict) -> Outcome:
        server = idle.get()
        try:
            return server.run(job)
        finally:
            idle.put(server)

    if workers == 1:
        return [run_one(job) for job in jobs]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run_one, jobs))


# --- the server's side ----------------------------------------------------------------------------

def serve(kind: str) -> None:
    """Answer each line of JSON with a line of JSON, until the caller closes the pipe."""
    prepare, work, sealed, probe, known = KINDS[kind]
    prepare()
    calls = seccomp_filter() if sealed else None
    if sealed:
        known = known[calls is not None]
    if sealed and calls is None and os.geteuid() == 0:
        sys.exit("no seccomp here, and root is exempt from process limits: run as another user")
    trials = [attempt(work, probe, sealed, calls) for _ in range(3)]  # under load, one may be late
    if {"status": "done", "output": known} not in trials:
        sys.exit(f"the {kind} sandbox does not work here: {probe} gave {trials}")
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if "sympy" in job.get("code", ""):
            load_sympy()
        print(json.dumps(attempt(work, job, sealed, calls)), flush=True)


def attempt(work, job: dict, sealed: bool, calls: bytes | None) -> dict:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        work_alone(work, job, writer, sealed, calls)
    os.close(writer)
    return wait(child, reader)


def wait(child: int, reader: int) -> dict:
    """Collect what the child writes until it ends or time is up, then kill its process group.

    Only a child that ends by itself has answered. The kernel kills it when its CPU time is up (or memory is short).
    """
    deadline = time.monotonic() + WALL_SECONDS
    output, finished = b"", False
    while not finished and len(output) < OUTPUT:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        piece = os.read(reader, OUTPUT)
        output, finished = output + piece, not piece
    os.close(reader)
    os.kill(child, signal.SIGKILL)  # not reaped yet, so the pid is still the child's
    with suppress(ProcessLookupError):  # it died before it had a group of its own
        os.killpg(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killed = ended == -signal.SIGKILL and len(output) < OUTPUT
    status = "done" if ended == 0 else "timeout" if killed else "failed"
    return {"status": status, "output": output.decode("ascii", "replace")}


def work_alone(work, job: dict, writer: int, sealed: bool, calls: bytes | None) -> None:
    """Lock this fork in, work and answer. Never returns."""
    try:
        os.setsid()
        os.dup2(writer, 0)  # the only descriptor left
        os.closerange(1, 256)
        sys.stdin = sys.stdout = sys.stderr = None  # print() becomes a no-op, input() an error
        limit(sealed)
        if sealed and os.geteuid() == 0:
            become_nobody()
        if calls is not None:
            install_seccomp(calls)
        os.write(0, json.dumps(work(job)).encode()[:OUTPUT])
    except BaseException:  # whatever goes wrong in here, the outcome is "no answer"; serve() has tested
        os._exit(1)  # beforehand that locking in works
    os._exit(0)


def limit(sealed: bool) -> None:
    import resource  # here, since Windows has none
    limits = {"CPU": CPU_SECONDS, "CORE": 0}
    if sealed:
        limits |= {"FSIZE": 0, "NPROC": 0, "NOFILE": 1}
    if sys.platform == "linux":
        limits["AS"] = MEMORY  # macOS refuses to set it
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(kind)[1]
        value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        resource.setrlimit(kind, (value, value))


def become_nobody() -> None:
    """Give up root, as a second wall: a call that slips through the filter is made by nobody."""
    with suppress(OSError):  # some containers have no other user, or do not let root change
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def install_seccomp(calls: bytes) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # in case the server dies first
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    code = ctypes.create_string_buffer(calls, len(calls))
    header = struct.pack("HP", len(calls) // 8, ctypes.addressof(code))
    program = ctypes.create_string_buffer(header, len(header))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def seccomp_filter() -> bytes | None:
    """Write the filter in BPF: kill on a foreign architecture, allow the listed calls, refuse others (EPERM)."""
    if sys.platform != "linux" or platform.machine() not in ALLOWED:
        return None
    if libc().prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == -1:  # a kernel built without it
        return None
    audit, calls = ALLOWED[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06  # opcodes: LD|W|ABS, JMP|JEQ|K, RET|K
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(equal, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    code += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if libc().prctl(option, *padded) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


# --- the two kinds of work ------------------------------------------------------------------------

def prepare_program() -> None:
    for name in MODULES:
        __import__(name)


@cache
def load_sympy() -> None:
    """Import sympy (torch installs it) once, when a program first names it, as ReFT's programs may.

    Solve and integrate something, so that it loads now what it usually loads late: a sealed fork cannot.
    """
    with suppress(ImportError):
        import sympy

        x = sympy.Symbol("x")
        sympy.solve(x**2 - 2, x)
        sympy.integrate(sympy.sin(x), (x, 0, 1))


def work_program(job: dict) -> str | None:
    """Run the program, call solution() and spell its value: text as it is, else a number, else None."""
    import math
    import numbers
    import random

    random.Random.__init__.__defaults__ = (0,)  # without a seed of its own, a generator would ask the system for one
    random.Random.seed.__defaults__ = (0, 2)
    random.seed()
    names = {"math": math, "sympy": sys.modules.get("sympy")}
    exec(compile(job["code"], "program", "exec"), names)
    value = names["solution"]()
    if isinstance(value, str):
        return value if len(value) < OUTPUT // 8 else None
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    if isinstance(value, numbers.Rational):
        return str(value)
    # 12 of a float's 16 digits: the last ones are rounding noise, 71.99999999999999 is 72
    return format(round(float(value), 12), ".12g")


def prepare_verify() -> None:
    import logging

    logging.disable()  # math-verify would report every text that it cannot read
    work_verify({"gold": r"\frac{x^2}{3}+\pi", "answer": r"\sqrt{2}"})  # fill the parser's caches


def work_verify(job: dict) -> bool:
    """Whether math-verify finds the two formulas equal, and their values agree beyond its own tolerance."""
    from math_verify import verify

    gold, answer = (parse_formula(job[key]) for key in ("gold", "answer"))
    return None not in (gold, answer) and agree(gold, answer) and verify(gold, answer, timeout_seconds=None)


def parse_formula(latex: str):
    """Return a sympy expression in which all symbols are real and all numbers exact, or None.

    math-verify guesses for each text which symbols are complex; then 3i/2 and (3/2)i have two different i.
    """
    import sympy
    from math_verify import LatexExtractionConfig, parse

    found = parse(f"${latex}$", [LatexExtractionConfig()], parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return None
    exact = {s: sympy.Symbol(s.name, real=True) for s in found[0].free_symbols}
    exact |= {number: sympy.Rational(str(number)) for number in found[0].atoms(sympy.Float)}
    return found[0].xreplace(exact)


def agree(a, b) -> bool:
    """Compare the values of two expressions to 120 digits, at a point: 2^-98 is not 2^-99. Other objects pass."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return True
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {name: sympy.Rational(7 + 3 * i, 5 + 2 * i) for i, name in enumerate(names)}
    a, b = (sympy.N(side.subs(point), 150) for side in (a, b))
    return not (a.is_number and b.is_number) or bool(abs(a - b) <= sympy.Float("1e-120", 150) * max(abs(a), abs(b)))


# Sends itself the signal that does nothing, which seccomp must refuse. No program of a model runs before this was
# seen: a leaking seal can cost more than a wrong verdict.
SEAL_PROBE = """import os
def solution():
    try:
        os.kill(os.getpid(), 0)
    except PermissionError:
        return math.floor(1.5)
    return math.floor(0.5)
"""

# Preparation, work, whether forks are sealed (not for math-verify: sympy loads parts of itself late), and a trial with
# its known outcome (without and with seccomp): a sandbox that does not work must say so, not fail every answer.
KINDS = {
    "program": (prepare_program, work_program, True, {"code": SEAL_PROBE}, ('"0"', '"1"')),
    "verify": (prepare_verify, work_verify, False, {"gold": r"2\sqrt{3}", "answer": r"\sqrt{12}"}, "true"),
}

if __name__ == "__main__":
    home = tempfile.mkdtemp(prefix="sandbox-")
    os.chdir(home)
    os.rmdir(home)  # nothing can be created in a deleted directory, and nothing is left to clean up
    serve(sys.argv[1])
