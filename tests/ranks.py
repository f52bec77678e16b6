"""What several ranks compute, written to a folder for test_parallel.py to compare: run under torchrun.

    torchrun --standalone --nproc_per_node 2 tests/ranks.py OUT MODEL OTHERS

OTHERS: the folder that another number of ranks has written, from whose state these resume.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import irpo  # noqa: E402
import reft  # noqa: E402
from checkpoint import load_model, sampler_of, save_model  # noqa: E402
from evaluate import SampleOptions, sample_all  # noqa: E402
from infra import hardware, parallel  # noqa: E402
from infra.parallel import full_weight, rank, world  # noqa: E402
from infra.run import Pieces  # noqa: E402
from infra.state import load_state, save_state  # noqa: E402
from test_irpo import some_pairs  # noqa: E402
from test_reft import config_of, some_rollouts  # noqa: E402
from test_train import examples, nll  # noqa: E402
from tiny import random_prompts, random_tokens  # noqa: E402
from train import TrainOptions, accumulate, descend, load_for_training, micro_batches, new_optimizer  # noqa: E402

FP32 = TrainOptions(lr=1e-2, batch_size=7, precision="fp32", micro_batch_tokens=20)
MADE_OF = "the same"


def options_here(**changes) -> TrainOptions:
    """With several nodes there is one replica on each, sharded within."""
    return dataclasses.replace(FP32, shard_within_node=parallel.node_size() < world(), **changes)


def keep(folder: Path, name: str, tensors: dict) -> None:
    """Write full tensors of a sharded module to a file."""
    full = {key: full_weight(x.detach()).contiguous().clone() for key, x in tensors.items()}
    if rank() == 0:
        save_file(full, folder / f"{name}.safetensors")


def gradients(folder: Path, model_dir: str) -> list[float]:
    """Accumulate over one batch in micro-batches, whose number is no multiple of 2 or 4; return all losses."""
    module, batches = load_for_training(model_dir, options_here()), micro_batches(examples(), FP32.micro_batch_tokens)
    assert len(batches) % 2 and len(batches) > 4, len(batches)
    values = accumulate(module, batches, nll, "fp32")
    keep(folder, "gradients", {name: p.grad for name, p in module.named_parameters()})
    return values["loss"]


def trained(folder: Path, model_dir: str, states: Path) -> list[dict]:
    """Take five steps from the start, or the last two from a state that is there; save one after the third."""
    module = load_for_training(model_dir, options_here())
    with torch.no_grad():
        nll(module, examples())
    optimizer = new_optimizer(module, FP32)
    done, records = load_state(states, module, optimizer, MADE_OF), []
    with torch.no_grad():  # a forward without a backward must not leave weights gathered
        nll(module, examples())
    name = "resumed-" + states.parent.name if done else "trained"
    for step in range(done, 5):
        batches = micro_batches(examples(seed=step), FP32.micro_batch_tokens)
        values = descend(module, optimizer, batches, nll, FP32)
        records.append({"loss": sum(values["loss"]), "grad_norm": values["grad_norm"][0]})
        if step == 2 and not done:
            save_state(states, module, optimizer, 3, MADE_OF)
    keep(folder, name, dict(module.named_parameters()))
    return records


def skipped(model_dir: str) -> tuple[bool, float]:
    """Take a step with a loss that is infinite on one rank only: all must leave the step out together."""
    def loss(model, batch):
        found = nll(model, batch)
        bad = [math.inf if e.id == "item-3" else 1.0 for e in batch]
        return found | {"loss": found["loss"] * found["loss"].new_tensor(bad)}

    options = options_here(skip_nonfinite=True)
    module = load_for_training(model_dir, options)
    before = [full_weight(weight.detach()).clone() for weight in module.parameters()]
    batches = micro_batches(examples(), FP32.micro_batch_tokens)
    values = descend(module, new_optimizer(module, options), batches, loss, options)
    after = [full_weight(weight.detach()) for weight in module.parameters()]
    return all(map(torch.equal, before, after)), values["skipped"][0]


def ppo(folder: Path, model_dir: str) -> dict:
    """Train on a batch of PPO, with a reference of other weights, a critic and whitened advantages."""
    config = config_of(micro_batch_tokens=20, value_init="random", lr=1e-3,
                       shard_within_node=options_here().shard_within_node)
    policy = load_for_training(model_dir, config, lambda model: reft.Policy(model, config))
    reference = load_for_training(f"{model_dir}-reference", config).requires_grad_(False)
    record = reft.train_on(policy, reference, new_optimizer(policy, config), some_rollouts(), [], config, 0)
    keep(folder, "ppo", dict(policy.named_parameters()))
    return record


def probed(model_dir: str) -> dict:
    """Probe pairs of which only some have a gold solution."""
    config = irpo.Config(micro_batch_tokens=1, precision="fp32")
    pairs = some_pairs()
    return irpo.probe(load_for_training(model_dir, options_here()), pairs, {pairs[1].id: [5, 6, 2]}, config)


def sampled(model_dir: str) -> dict:
    """Sample from a split model, from a complete one, and from a copy of one in training."""
    prompts, ranks = random_prompts(0, [3, 9, 1]), min(2, world())
    found = {}
    for name, model, held in (
            ("complete", load_model(model_dir), 1), ("split", load_model(model_dir, ranks=ranks), ranks),
            ("of training", sampler_of(load_for_training(model_dir, options_here()), "fp32", ranks), ranks)):
        options = SampleOptions(max_new_tokens=12, batch_rows=3, tensor_parallel=held)  # a group for each prompt
        found[name] = [[r.ids for r in group] for group in sample_all(
            model, prompts, options, (2,), num_samples=3, temperature=1.0, seed=0, label="", pieces=Pieces())]
        found[f"logits {name}"] = model(random_tokens(5, 2, 7)).flatten().tolist()[:50]
    return found


def agreements() -> dict:
    found = {"seen": parallel.gather(rank()), "first": parallel.by_first(lambda: f"rank {rank()}"), "dealt": {}}
    for count in (1, 2, 3, 4, 5, 8):
        done: list[int] = []
        results = parallel.computed(list(range(count)), lambda i, done=done: done.append(i) or i * i)
        assert results == [i * i for i in range(count)], results
        found["dealt"][str(count)] = parallel.gather(done)
    if world() > 1:  # ranks that measure different speeds; one by its processor, the other beside other work
        hardware.bf16_speed = lambda: 1.0 + rank()
        options = hardware.ComputeOptions(device="cpu", threads=3).settled()
        found["settled"] = parallel.gather((options.precision, torch.get_num_threads()))
        torch.set_num_threads(1)
    try:
        parallel.by_first(lambda: sys.exit("no"))
    except SystemExit as error:
        found["said by all"] = parallel.gather(error.code)
    return found


def compute(folder: Path, model_dir: str, others: Path | None) -> None:
    """Compute everything, and resume from the state made here and from the one in the folder of other ranks."""
    module = load_for_training(model_dir, options_here())
    save_model(module, folder / "saved", source=model_dir)
    found = {"records": trained(folder, model_dir, folder / "state"), "agreements": agreements(),
             "losses": gradients(folder, model_dir), "skipped": skipped(model_dir), "ppo": ppo(folder, model_dir),
             "samples": sampled(model_dir), "probe": probed(model_dir)}
    found["resumed"] = [trained(folder, model_dir, made / "state") for made in (folder, others) if made]
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    parallel.start()
    compute(*map(Path, sys.argv[1:]))
    parallel.finish()
