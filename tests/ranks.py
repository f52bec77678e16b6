"""What several ranks compute, written to a folder for test_parallel.py to compare: run under torchrun.

    torchrun --standalone --nproc_per_node 2 tests/ranks.py OUT MODEL
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint  # noqa: E402
import reft  # noqa: E402
from checkpoint import load_model, sampler_of, save_model  # noqa: E402
from infra import parallel  # noqa: E402
from infra.parallel import full_weight, rank, world  # noqa: E402
from infra.state import load_state, save_state  # noqa: E402
from sample import generate  # noqa: E402
from test_reft import config_of, some_rollouts  # noqa: E402
from test_train import examples, nll  # noqa: E402
from tiny import random_prompts, random_tokens  # noqa: E402
from train import TrainOptions, accumulate, descend, load_for_training, micro_batches, new_optimizer  # noqa: E402

FP32 = TrainOptions(lr=1e-2, batch_size=7, precision="fp32", micro_batch_tokens=20)
MADE_OF = "the same"
TRAINED_FOR = 3


def keep(folder: Path, name: str, tensors: dict) -> None:
    """Full tensors of a sharded module, in a file."""
    full = {key: full_weight(x.detach()).contiguous().clone() for key, x in tensors.items()}
    if rank() == 0:
        save_file(full, folder / f"{name}.safetensors")


def gradients(folder: Path, model_dir: str, **options) -> list[float]:
    """Of one batch in micro-batches, none of whose numbers is a multiple of 2 or 4; and all losses."""
    module = load_for_training(model_dir, dataclasses.replace(FP32, **options))
    batches = micro_batches(examples(), FP32.micro_batch_tokens)
    assert len(batches) % 2 and len(batches) > 4, len(batches)
    values = accumulate(module, batches, nll, "fp32")
    keep(folder, "-".join(["gradients", *options]), {name: p.grad for name, p in module.named_parameters()})
    return values["loss"]


def trained(folder: Path, model_dir: str) -> tuple[str, list[dict]]:
    """A few steps from the start, or from the state that is there, saved after the third of five."""
    module = load_for_training(model_dir, FP32)
    with torch.no_grad():
        nll(module, examples())
    optimizer = new_optimizer(module, FP32)
    records = load_state(folder / "state", module, optimizer, MADE_OF)
    with torch.no_grad():  # a forward without a backward must not leave weights gathered
        nll(module, examples())
    started = len(records)
    while len(records) < 5:
        batches = micro_batches(examples(seed=len(records)), FP32.micro_batch_tokens)
        values = descend(module, optimizer, batches, nll, FP32)
        records.append({"loss": sum(values["loss"]), "grad_norm": values["grad_norm"][0]})
        if len(records) == TRAINED_FOR and not started:
            save_state(folder / "state", module, optimizer, records, MADE_OF)
    keep(folder, f"trained-from-{started}", dict(module.named_parameters()))
    return records


def skipped(model_dir: str) -> tuple[bool, float]:
    """A loss that is infinite on one rank only: all must leave the step out together."""
    def loss(model, batch):
        found = nll(model, batch)
        bad = [math.inf if e.id == "item-3" else 1.0 for e in batch]
        return found | {"loss": found["loss"] * found["loss"].new_tensor(bad)}

    options = dataclasses.replace(FP32, skip_nonfinite=True)
    module = load_for_training(model_dir, options)
    before = [full_weight(weight.detach()).clone() for weight in module.parameters()]
    batches = micro_batches(examples(), FP32.micro_batch_tokens)
    values = descend(module, new_optimizer(module, options), batches, loss, options)
    after = [full_weight(weight.detach()) for weight in module.parameters()]
    return all(map(torch.equal, before, after)), values["skipped"][0]


def ppo(folder: Path, model_dir: str) -> dict:
    """A batch of PPO, with a reference of other weights, a critic and whitened advantages."""
    config = config_of(micro_batch_tokens=20, value_init="random", lr=1e-3)
    policy = load_for_training(model_dir, config, lambda model: reft.Policy(model, config))
    reference = load_for_training(f"{model_dir}-reference", config).requires_grad_(False)
    optimizer = new_optimizer(policy, config)
    record = reft.train_on(policy, reference, optimizer, some_rollouts(), [], config, 0)
    keep(folder, "ppo", dict(policy.named_parameters()))
    return record


def sampled(model_dir: str) -> dict:
    """From a split model, from the whole one, and from one in training."""
    prompts = random_prompts(0, [3, 9, 1])
    found = {}
    for name, model in (("whole", load_model(model_dir)),
                        ("split", load_model(model_dir, ranks=min(2, world()))),
                        ("of training", sampler_of(load_for_training(model_dir, FP32), ranks=min(2, world())))):
        found[name] = [[r.ids for r in group] for group in
                       generate(model, prompts, num_samples=3, max_new_tokens=12, eos_id=2, seed=0)]
        found[f"logits {name}"] = model(random_tokens(5, 2, 7)).flatten().tolist()[:50]
    return found


def agreements() -> dict:
    found = {"seen": parallel.gather(rank()), "first": parallel.by_first(lambda: f"rank {rank()}"), "dealt": {}}
    for count in (1, 2, 3, 4, 5, 8):
        done: list[int] = []
        results = parallel.computed(list(range(count)), lambda i, done=done: done.append(i) or i * i)
        assert results == [i * i for i in range(count)], results
        found["dealt"][count] = parallel.gather(done)
    try:
        parallel.by_first(lambda: sys.exit("no"))
    except SystemExit as error:
        found["said by all"] = parallel.gather(error.code)
    return found


def main() -> None:
    folder, model_dir = Path(sys.argv[1]), sys.argv[2]
    parallel.start()
    checkpoint.sampling_dtype = lambda: torch.float32  # responses are compared exactly
    if parallel.node_size() < world():  # several nodes: one replica on each, sharded within
        gradients(folder, model_dir, shard_within_node=True)
        return parallel.finish()
    found = {"records": trained(folder, model_dir)}
    if not parallel.by_first((folder / "trained-from-3.safetensors").exists):  # it did not resume from a state
        found |= everything(folder, model_dir)
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    parallel.finish()


def everything(folder: Path, model_dir: str) -> dict:
    module = load_for_training(model_dir, FP32)
    save_model(module, folder / "saved", source=model_dir)
    return {"agreements": agreements(), "losses": gradients(folder, model_dir), "skipped": skipped(model_dir),
            "ppo": ppo(folder, model_dir), "samples": sampled(model_dir)}


if __name__ == "__main__":
    main()
