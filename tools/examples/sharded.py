"""Train on several ranks in torchtitan's order: meta, mark, compile, shard, initialise.

torchrun --nproc-per-node 8 -m tools.examples.sharded
python -m tools.examples.sharded --dim 32 --layers 4 --seq 32 --steps 2   # one rank, toy size
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from simplex_ops import last_report, mark


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def main(dim: int = 512, layers: int = 8, seq: int = 1024, steps: int = 50) -> None:
    """Train on random tokens and save a distributed checkpoint."""
    kind, heads = "cuda" if torch.cuda.is_available() else "cpu", dim // 64 or 1
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**({} if "RANK" in os.environ else alone))
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    with torch.device("meta"):
        blocks = [Block(dim, heads) for _ in range(layers)]
        model = nn.Sequential(nn.Embedding(256, dim), *blocks, nn.Linear(dim, 256))
    for block in blocks[3::4]:
        mark(block.attention, window=(256, 16), kv_heads=heads, head_dim=dim // heads)
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks:
        block.compile(backend="simplex", fullgraph=True)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=kind)
    for module in model.modules():  # k2 and v2 come back to their start
        getattr(module, "reset_parameters", lambda: None)()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        tokens = torch.randint(256, (4, seq + 1), device=kind)
        logits = model(tokens[:, :-1]).flatten(0, 1).float()
        (loss := F.cross_entropy(logits, tokens[:, 1:].flatten())).backward()
        optimizer.step()
        model.zero_grad()
        print(f"rank {dist.get_rank()}, step {step}: loss {loss.item():.3f}")
    checkpoint.save({"model": model.state_dict()}, checkpoint_id="out/sharded")
    print(last_report())
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
