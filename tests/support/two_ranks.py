"""What two ranks make of marked models, on the CPU, in two processes: a test reads what they say.

    python two_ranks.py RANK FOLDER

Each scenario is a function of the mesh and the folder; what it returns, or the text of what it
raised, is saved under its name in FOLDER/RANK.pt.
"""

import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from passed import Passed
from tiny_llama import attention, llama, mark_layers, tokens, train_step
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import simplex_ops

NAME = "model.layers.1.self_attn"


def marked() -> Any:
    return mark_layers(llama(), 1, window=(6, 3)).train()


def batch(rank: int) -> Tensor:
    return tokens(seed=10 + rank)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def whole(found: Any) -> Any:
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def step(run: Any, model: Any) -> dict[str, Tensor]:
    found = train_step(run, model, batch(dist.get_rank()))
    return {name: whole(value) for name, value in found.items()}


def sharded(compiled: bool, **policy: Any) -> Any:
    model = marked()
    for block in model.model.layers:
        if compiled:
            block.compile(backend="simplex", fullgraph=True)
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def replicated_eager(folder: Path) -> Any:
    model = marked()
    return step(DistributedDataParallel(model), model)


def replicated_compiled(folder: Path) -> Any:
    model = marked()
    with torch._dynamo.config.patch(optimize_ddp=False):
        run = torch.compile(DistributedDataParallel(model), backend=Passed())
        return step(run, model), [r.module for r in simplex_ops.last_report().rewritten]


def replicated_and_split(folder: Path) -> Any:
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):  # splits within each layer
        model = marked()
        run = torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.01), backend=Passed())
        run(batch(dist.get_rank()))


def marked_after_replicated(folder: Path) -> Any:
    wrapped = DistributedDataParallel(llama())
    simplex_ops.mark(attention(wrapped.module, 1))


def marked_after_sharded(folder: Path) -> Any:
    simplex_ops.mark(attention(fully_shard(llama()), 1))


def sharded_eager(folder: Path) -> Any:
    model = sharded(False)
    return step(model, model)


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded_bfloat16(folder: Path) -> Any:
    model = sharded(False, mp_policy=BFLOAT16)
    return step(model, model)


def sharded_bfloat16_compiled(folder: Path) -> Any:
    model = sharded(True, mp_policy=BFLOAT16)
    found = step(model, model)
    return found, [r.module for r in simplex_ops.last_report().rewritten]


def sharded_and_saved(folder: Path) -> Any:
    """Train a step, save, and return the loss of the next."""
    model = sharded(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder / "saved")
    return loss_of(model, batch(0)).item()


SCENARIOS = (
    replicated_eager,
    replicated_compiled,
    replicated_and_split,
    marked_after_replicated,
    marked_after_sharded,
    sharded_eager,
    sharded_bfloat16,
    sharded_bfloat16_compiled,
    sharded_and_saved,
)


def main(rank: str, folder: str) -> None:
    """Run every scenario, the ranks beside each other."""
    store = dist.FileStore(str(Path(folder) / "ranks"), 2)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
    init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for run in SCENARIOS:
        torch._dynamo.reset()
        try:
            found[run.__name__] = run(Path(folder))
        except Exception as error:  # noqa: BLE001 (the test asks what was raised)
            found[run.__name__] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        dist.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
