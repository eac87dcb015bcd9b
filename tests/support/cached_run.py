"""Train a marked model for a step in a process of its own, and print what the compile caches said.

    python cached_run.py DEVICE CHANGE...

It imports the packages that PYTHONPATH gives first. Each change is made to the model or to the
packages, a step runs, and the change is undone, but for a file's, which stays. It prints [hits,
misses] of AOTAutograd's cache and of the cache of FX graphs.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters

import csrc_free
import lowering
import simplex_ops
from lowering.passes import pipeline
from simplex_ops.rules import cache_key


class Attention(nn.Module):
    """Attention with nothing to fuse, so that no compiler but Inductor is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(hidden_states).unflatten(2, (2, 8)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


MARK = {"window": (5, 3), "form": "trilinear"}
MARKS = {
    "same": {},
    "form": {"form": "strassen"},
}


@contextlib.contextmanager
def changed(change: str) -> Iterator[dict]:
    """Make a change, and give the mark to set."""
    with contextlib.ExitStack() as stack:
        if change in MARKS:
            yield {**MARK, **MARKS[change]}
            return
        if change == "pass":
            passes = (*pipeline.PASSES, lambda *_given: lowering.Report())
            stack.enter_context(mock.patch.object(pipeline, "PASSES", passes))
        elif change in ("choice", "figures"):
            path = Path(csrc_free.__file__).parent / "measured" / "sm_90.json"
            table = json.loads(path.read_text())
            if change == "choice":
                table["lines"]["forward"][0]["config"]["num_stages"] += 1
            else:
                table["figures"], table["date"] = [], "another day"
            path.write_text(json.dumps(table))
        else:
            path = Path(simplex_ops.__file__).parents[1] / change
            path.write_text(path.read_text() + "# changed\n")
        cache_key.sources.cache_clear()
        yield MARK


def step(mark: dict, device: str) -> None:
    """Compile, and run forward and backward."""
    torch.manual_seed(0)
    model = simplex_ops.mark(Attention(), **mark).to(device)
    x = torch.randn(2, 12, 16, device=device)
    torch.compile(model, backend=lowering.simplex, fullgraph=True)(x).sum().backward()


def main(device: str, *changes: str) -> None:
    """Run a step after each change."""
    for change in changes:
        torch._dynamo.reset()
        counters.clear()
        with changed(change) as mark, torch.compiler.config.patch(cache_key_tag=""):
            step(mark, device)
        aot, fx = counters["aot_autograd"], counters["inductor"]
        found = [
            [aot["autograd_cache_hit"], aot["autograd_cache_miss"]],
            [fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"]],
        ]
        print(json.dumps([change, *found]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
