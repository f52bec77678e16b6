"""What a run computes on: its device, the precision of its products, its threads; and what a sampler asks of a GPU.

Rounding depends on the first three. They are chosen when a run begins and recorded in its config.json; a run that is
resumed keeps its precision and its threads.
"""
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from infra import parallel
from infra.config import Options, option
from infra.run import is_run, read_json

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class ComputeOptions(Options):
    device: str = option("auto", "cpu, cuda or cuda:1; auto: a GPU where there is one", free=True,
                         group="engine")
    precision: str = option("auto", "of matrix products in sampling and training (weights are trained in float32): "
                            "bf16 or fp32; auto: what is faster here", ("auto", *PRECISIONS))
    threads: int = option(0, "of a CPU; 0: one per idle core", low=0, free=True)

    def settled(self) -> "ComputeOptions":
        """Resolve what is "auto" or 0, as before if the run is resumed; print the choice and apply it."""
        use_device(self.device)
        run = getattr(self, "run_dir", "")
        before = read_json(Path(run, "config.json")) if run and is_run(Path(run)) else {}
        precision, threads, why = self.precision, self.threads, "as asked"
        if precision == "auto":
            precision, why = parallel.by_first(  # ranks may measure different speeds
                lambda: (before["precision"], "as before") if "precision" in before else faster_precision())
        elif precision == "bf16" and parallel.device() == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("--precision bf16: this GPU does not support it; give fp32")
        line = f"products in {precision} ({why})"
        if parallel.device() == "cpu" and parallel.world() > 1 and threads:
            torch.set_num_threads(threads)
            line += f", {threads} threads each"
        elif parallel.device() == "cpu" and parallel.world() == 1:
            idle = idle_cores()
            threads = threads or before.get("threads") or idle
            torch.set_num_threads(threads)
            line += f", {threads} threads"
            if idle < usable_cores():
                line += f"; the machine is busy: {idle} of {usable_cores()} cores are idle (--threads decides)"
        if parallel.rank() == 0:
            print(f"{parallel.device()}: {line}", file=sys.stderr)
        return dataclasses.replace(self, precision=precision, threads=threads)


def use_device(name: str) -> None:
    """Compute on cpu, cuda or cuda:N from here on; ValueError where that is not possible."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: give cpu, cuda or cuda:N. (mps has no float64, which drawing tokens needs)")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch finds no GPU here; give cpu")
        number = int(name.partition(":")[2] or torch.cuda.current_device())
        if ":" in name and parallel.world() > 1:
            raise ValueError(f"--device {name}: torchrun gives each rank a GPU of its own; give cuda")
        if number >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, and the first is cuda:0")
        torch.cuda.set_device(number)
    parallel.chosen = "" if name == "auto" else name.partition(":")[0]


# --- precision -------------------------------------------------------------------------------------

def dtype_of(precision: str) -> torch.dtype:
    return PRECISIONS[faster_precision()[0] if precision == "auto" else precision]


def autocast(precision: str):
    """Compute matrix products in bfloat16 where precision says so; parameters stay float32."""
    return torch.autocast(parallel.device(), torch.bfloat16, enabled=dtype_of(precision) == torch.bfloat16)


def faster_precision() -> tuple[str, str]:
    """bf16 or fp32, and why."""
    if parallel.device() == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU computes it") if fast else ("fp32", "this GPU has no bf16")
    ratio = bf16_speed()
    return "bf16" if ratio > 1.2 else "fp32", f"a product in bf16 is {ratio:.1f} times as fast as in fp32 here"


@cache
def bf16_speed() -> float:
    """How many times as fast as in float32 a CPU computes a matrix product in bfloat16: a measurement of 20 ms.

    The processor's flags do not tell: some that have AVX-512 BF16 compute such products at half the speed of float32.
    """
    squares = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in PRECISIONS.values()}
    fastest = dict.fromkeys(squares, float("inf"))
    for _ in range(6):  # in turns, keeping the fastest of each, so that other load matters little
        for dtype, x in squares.items():
            began = time.perf_counter()
            x @ x
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - began)
    return fastest[torch.float32] / fastest[torch.bfloat16]


# --- threads ---------------------------------------------------------------------------------------

def usable_cores() -> int:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int((os.environ.get("OMP_NUM_THREADS") or str(cores)).split(",")[0]))


def idle_cores() -> int:
    """Cores, at least one, that nobody else uses. With a thread more than that, all wait for the slowest at every
    product: beside one busy process, two threads on two cores took several times as long as one.

    Linux only, a measurement of 0.2 s; elsewhere all usable cores count as idle.
    """
    stat = Path("/proc/stat")
    if usable_cores() == 1 or not stat.exists():
        return usable_cores()

    def used() -> float:
        user, nice, system, idle, iowait, *rest = map(int, stat.read_text().split("\n")[0].split()[1:])
        return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")

    before, began = used(), time.perf_counter()
    time.sleep(0.2)
    busy = (used() - before) / (time.perf_counter() - began)
    free = (os.cpu_count() or 1) - busy
    return max(1, min(usable_cores(), round(free)))


# --- sampling -----------------------------------------------------------------------------------------

def cache_budget(model) -> int:
    """Tokens whose keys and values fit into 60 % of a GPU's free memory, or into 1 GiB on a CPU."""
    config, weight = model.config, model.lm_head.weight
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    if not weight.is_cuda:
        return 2**30 // token
    held = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    return int(0.6 * (torch.cuda.mem_get_info(weight.device)[0] + held) / token)


def recorded(batch) -> Callable[[], None]:
    """Make batch.step a CUDA graph: recorded when batch.layout has changed, replayed otherwise."""
    graph, recorded_for = None, None

    def run() -> None:
        nonlocal graph, recorded_for
        if batch.layout == recorded_for:
            return graph.replay()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            batch.step()  # a step like any other, and the warm-up that recording needs
        torch.cuda.current_stream().wait_stream(stream)
        graph, recorded_for = torch.cuda.CUDAGraph(), batch.layout
        with torch.cuda.graph(graph):  # records without running
            batch.step()
    return run
