"""Everything that knows about ranks: the processes that torchrun starts, one per device.

    make irpo GPUS=8                                               # or, for any command here:
    torchrun --standalone --nproc_per_node 8 irpo.py ...
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 irpo.py ...

All ranks run the same program on the same run directory, on a disk that they share. Work that can be split (sampling,
grading, reference log-probs, micro-batches) is split into pieces that do not depend on the number of ranks, and all
ranks get all results, in the same order. So the number of ranks changes only the order in which gradients are added up.
Only rank 0 prints, and writes files other than pieces and states.

Without torchrun there is one rank, and these functions do next to nothing. Left out: pipeline parallelism, and every
engine except PyTorch's own.
"""
import ctypes
import dataclasses
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tqdm import tqdm

from infra import InputError

Item, Result = TypeVar("Item"), TypeVar("Result")
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>: the signal to get when the parent ends
PARENT = os.getppid()  # torchrun; in a container that is process 1
chosen = ""  # the device that --device has named, cpu or cuda (see infra/hardware.py)


def device() -> str:
    return chosen or ("cuda" if torch.cuda.is_available() else "cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def node_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world() > 1 else 1


def start() -> None:
    """Join the ranks that torchrun has started, if there are several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if sys.platform == "linux":  # otherwise ranks whose torchrun was killed wait for each other for half an hour
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != PARENT:  # it is dead already
            os.kill(os.getpid(), signal.SIGKILL)
    if device() == "cuda":
        ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if ranks > gpus:
            raise InputError(f"{ranks} ranks, but {gpus} GPUs here: start as many ranks as GPUs, or set "
                             "CUDA_VISIBLE_DEVICES= to compute on CPUs")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Python objects travel by gloo; a rank may have to wait for all of another's share of the samples
    dist.init_process_group("cpu:gloo,cuda:nccl" if device() == "cuda" else "gloo", timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")


def finish() -> None:
    """Shut down cleanly; without this, gloo ranks abort at exit about half the time."""
    if dist.is_initialized():
        gc.collect()  # sharded modules must be gone before their process group
        dist.barrier()
        dist.destroy_process_group()


def leave(message: str | int | None) -> NoReturn:
    """Exit with a message, which rank 0 prints for all."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one just kills: a traceback would hide the message
        signal.signal(number, signal.SIG_DFL)
    if world() == 1:
        raise SystemExit(message)
    if rank():
        time.sleep(10)  # torchrun ends the others when one has ended
    if isinstance(message, str):
        print(message, file=sys.stderr, flush=True)
    os._exit(message if isinstance(message, int) else message is not None)  # others may wait for this rank


# --- agreement -----------------------------------------------------------------------------------

def barrier() -> None:
    """Wait for all ranks: after this, all of them see what rank 0 wrote before."""
    if world() > 1:
        dist.barrier()


def by_first(act: Callable[[], Result]) -> Result:
    """Return act() of rank 0, or raise its InputError, OSError or SystemExit, on every rank."""
    if world() == 1:
        return act()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = act()
        except (SystemExit, InputError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value: Result) -> list[Result]:
    """Return every rank's value, in the order of ranks."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value)
    return values


# --- distributing work -------------------------------------------------------------------------------

def dealt(items: list[Item], hands: int | None = None) -> Iterator[tuple[Item, bool]]:
    """Yield this rank's items, every world()-th, each with True.

    All ranks must take part when a sharded model computes. If items do not divide evenly, the remaining ranks get the
    first item again, marked False: compute it, ignore the result. hands: deal to this many groups of neighbouring ranks
    instead, each of which works on its own.
    """
    step = hands or world()
    mine = rank() // (world() // step)
    for i in range(mine, len(items), step):
        yield items[i], True
    if hands is None and 0 < len(items) % step <= mine:
        yield items[0], False


def collected(mine: list[Result], hands: int | None = None) -> list[Result]:
    """Return the results of all ranks, in the order of the dealt items; `mine`: those of this rank that count."""
    everyone = gather(mine)[::world() // (hands or world())]
    total = sum(map(len, everyone))
    return [everyone[i % len(everyone)][i // len(everyone)] for i in range(total)]


def computed(items: list[Item], compute: Callable[[Item], Result], label: str = "") -> list[Result]:
    """Compute each item on one rank; all ranks return all results. Safe for sharded models. A label shows a bar."""
    mine = tqdm(list(dealt(items)), desc=label, unit="part", dynamic_ncols=True, disable=not label or rank() > 0)
    return collected([result for item, counts in mine for result in [compute(item)] if counts])


@functools.cache  # every mesh creates new process groups
def mesh(outer: int, inner: int):
    """Arrange all ranks as a grid with `inner` neighbours per row."""
    return init_device_mesh(device(), (outer, inner), mesh_dim_names=("outer", "inner"))


# --- sharded training ------------------------------------------------------------------------------

def shard(module: nn.Module, blocks: list[nn.Module], dtype: torch.dtype, *, within_node: bool,
          cpu_offload: bool) -> nn.Module:
    """Shard a module's float32 weights, gradients and moments over all ranks (FSDP2), block by block.

    A block's weights are gathered, in this dtype, when it computes; the embedding and the head in float32, which
    autocast casts as it does without ranks. Gradients are summed, never averaged: the loop divides by the number of
    items in the global batch. within_node: shard over the ranks of a node and replicate across nodes, for more memory
    and less traffic between them.
    """
    ranks = mesh(world() // node_size(), node_size()) if within_node else mesh(1, world())["inner"]
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    options = dict(mesh=ranks, offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy())
    for block in blocks:
        fully_shard(block, mp_policy=low, **options)
    # By default the outermost module stays gathered after a forward without a backward, and an optimizer created
    # then would hold weights that never see a gradient.
    fully_shard(module, mp_policy=full, reshard_after_forward=True, **options)
    for part in (*blocks, module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    if hasattr(module, "logps"):
        register_fsdp_forward_method(module, "logps")
    return module


def full_weight(weight: Tensor) -> Tensor:
    """Gather a weight that may be sharded; all ranks must call this together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


# --- sampling from models that do not fit one device -----------------------------------------------

# Outputs of the first are split, by heads or hidden units; inputs of the second are split, and their outputs summed.
PLAN = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
                     ColwiseParallel()) | dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())


def split_over_ranks(model: nn.Module, ranks: int) -> nn.Module:
    """Split a Llama's heads and hidden units over `ranks` neighbouring ranks (tensor parallelism).

    They compute the same tokens together, with two all-reduces per block and step, whose results are bitwise equal on
    all ranks (devices must be alike). A rank's cache holds only its own heads.
    """
    config = model.config
    if world() % ranks or config.num_key_value_heads % ranks or config.intermediate_size % ranks:
        raise InputError(f"--tensor_parallel {ranks} must divide the number of ranks, {world()}, the model's "
                         f"{config.num_key_value_heads} key-value heads and its {config.intermediate_size} "
                         "hidden units")
    for layer in model.model.layers:
        parallelize_module(layer, mesh(world() // ranks, ranks)["inner"], PLAN, src_data_rank=None)
    model.config = dataclasses.replace(config, num_attention_heads=config.num_attention_heads // ranks,
                                       num_key_value_heads=config.num_key_value_heads // ranks)
    return model


def shard_like(target: Tensor, weight: Tensor) -> Tensor:
    """Return a full weight, or this rank's part of it if the target is split."""
    if not isinstance(target, DTensor):
        return weight
    return distribute_tensor(weight, target.device_mesh, target.placements, src_data_rank=None)
