"""The saved states of a training run, from which it resumes to the bit.

FOLDER/step-00000040/ holds weights and moments (safetensors, files of each rank, written and read by
torch.distributed.checkpoint, so that a run can resume on another number of ranks), and state.json with what the run is
made of and the SHA-256 of the other files. The last two states are kept: where one is damaged, the run resumes from the
other.
"""
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from infra import InputError
from infra.parallel import by_first, computed, rank, world
from infra.run import fresh_directory, hash_of, put_in_place, read_json, write_json

FILE_BYTES = 2**26  # of a state's file: the writer holds a file twice in memory, besides the tensors
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one rank does not need it


def save_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, made_of: str) -> None:
    """Write the state after so many steps, completely or not at all."""
    target = folder / f"step-{steps:08}"

    def finish() -> None:
        write_json(temporary / "state.json", {"made_of": made_of, "sha256": hashes})
        put_in_place(target)
        for old in states(folder)[2:]:
            shutil.rmtree(old)

    try:
        temporary = by_first(lambda: fresh_directory(target))
        named, file_of, size = tensors(module, optimizer), {}, 0
        for name, tensor in named.items():
            file_of[name] = 1 + size // FILE_BYTES
            size += tensor.nbytes
        dcp.save(named, no_dist=world() == 1, storage_writer=HuggingFaceStorageWriter(
            str(temporary), fqn_to_index_mapping=file_of, save_distributed=True))
        files = by_first(lambda: sorted(path.name for path in temporary.glob("*.safetensors")))
        hashes = dict(zip(files, computed(files, lambda name: hash_of(temporary / name))))
        by_first(finish)
    except (OSError, CheckpointException) as error:
        failures = getattr(error, "failures", {})
        reason = next((failure for failure, _ in failures.values()), error)
        raise InputError(f"{target} cannot be written: {reason}. The states before it in {folder} are intact: free "
                         "some space, then run the same command again to resume from the newest.") from None


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, made_of: str) -> int:
    """Restore the newest intact state; return the number of steps until then, 0 if there is none."""
    found = by_first(lambda: states(folder))
    for path in found:
        if fault := fault_of(path):
            print(f"warning: {path} is damaged and is skipped: {fault}")
            continue
        if read_json(path / "state.json")["made_of"] != made_of:
            raise InputError(f"{path} is from another training run: its data, seed, steps, lr or batch size differed. "
                             f"Remove {folder} to start this run from its beginning.")
        dcp.load(tensors(module, optimizer), no_dist=world() == 1,
                 storage_reader=HuggingFaceStorageReader(str(path)))
        return int(path.name.removeprefix("step-"))
    if found:
        raise InputError(f"{folder} holds no intact state. Remove it to start this run from its beginning.")
    return 0


def drop_states(folder: Path) -> None:
    """Remove the states of a training run that is over, and of the trial run before it."""
    if rank() == 0:
        for state in (folder / "state", folder / "select" / "state"):
            shutil.rmtree(state, ignore_errors=True)


def states(folder: Path) -> list[Path]:
    """List the states in a folder, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".tmp"), reverse=True)


def fault_of(path: Path) -> str:
    """Say what is wrong with the files of a state, or nothing; every rank checks some of them."""
    try:
        hashes = dict(read_json(path / "state.json")["sha256"])
    except (InputError, KeyError, TypeError, ValueError) as error:
        return f"state.json: {error}"
    intact = computed([*hashes], lambda name: (path / name).is_file() and hash_of(path / name) == hashes[name])
    return "; ".join(f"{name} is missing or has changed" for name, whole in zip(hashes, intact) if not whole)


def tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name weights and AdamW's moments and step counts; moments that do not exist yet become zeros."""
    named = {}
    for name, weight in module.named_parameters():
        state = optimizer.state[weight]
        if not state:
            state |= {"step": torch.zeros((), dtype=torch.float32, device=weight.device),
                      "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        named |= {name: weight.detach()} | {f"{name}.{part}": value for part, value in state.items()}
    return named
