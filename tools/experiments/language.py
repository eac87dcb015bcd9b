"""Language: a Llama of bytes, with every fourth layer ordinary, windowed or 2-simplicial.

Three arms see the same blocks of text in the same order, from the same starting weights:

- ordinary: the model as it is;
- windowed: ordinary attention through the first of the windows in every fourth layer, which a mark
  is whose k2 and v2 stay at their zero start;
- 2-simplicial: the same layers marked with both windows, and trained.

All are trained with as many FLOPs as the ordinary model takes for its tokens, so an arm whose
layers cost more sees less text. FLOPs are counted: 6 for each token and weight of a linear layer,
and by the formula of simplex::attn for all attention, an ordinary layer's being that through a
second window of one key. Models are compiled by the pass; loss is that of held-out files.
"""

import functools
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering
from simplex_ops import mark
from simplex_ops.rules import flops
from tools.demo import llama
from tools.demo.corpus import even_batches
from tools.demo.train import warm_cosine
from tools.experiments import text
from tools.experiments.train import Watch
from tools.experiments.updates import AdamW, updates_of

_HOW = AdamW(betas=(0.9, 0.95), weight_decay=0.1, clip=1.0)
Arm = Literal["ordinary", "windowed", "2-simplicial"]
ARMS: tuple[Arm, ...] = ("ordinary", "windowed", "2-simplicial")


@dataclass(frozen=True)
class Size:
    """A model, its windows in keys, and how it is trained and evaluated."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    learning_rate: float
    batch: int = 64
    seq: int = 512
    w1: int = 64
    w2: int = 8
    evaluations: int = 10
    held_out_batches: int = 16


@dataclass(frozen=True)
class Setting:
    size: Size
    arm: Arm
    tokens: int  # of the ordinary arm; the others have its FLOPs
    seed: int


def settings(seeds: int, *, quick: bool) -> Iterator[tuple[str, Setting]]:
    """Yield (part, setting) of every run: all arms of a seed, then those of the next."""
    for part, (size, tokens) in (_QUICK if quick else _PARTS).items():
        for seed in range(seeds):
            for arm in ARMS:
                yield part, Setting(size, arm, tokens, seed)


def measure(setting: Setting, device: torch.device, watch: Watch) -> dict[str, Any]:
    """Train one model; return its loss on held-out files, nats a byte, by tokens seen."""
    size = setting.size
    model, forward = _compiled(size, setting.arm, device)
    with ThreadPoolExecutor(1) as beside:  # reads while this thread compiles
        reading = beside.submit(_text, device)
        any_tokens = torch.zeros(size.batch, size.seq + 1, dtype=torch.int64, device=device)
        _loss(forward, any_tokens).backward()  # compiles, and is no update
        source = reading.result()
    model.load_state_dict(build(size, setting.arm, setting.seed).state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    total = steps(setting)
    parts = size.evaluations
    evaluated = sorted({round(total * n / parts) for n in range(1, parts + 1)} - {0})
    rates = [size.learning_rate * warm_cosine(n, total) for n in range(total)]
    blocks = text.Blocks(source.training, size.seq, setting.seed)
    tests = even_batches(source.held_out, size.batch, size.seq, size.held_out_batches)
    most = max(last - first for first, last in itertools.pairwise((0, *evaluated)))
    update = updates_of(functools.partial(_loss, forward), trained, most, device, _HOW)
    curve: list[tuple[int, float]] = []
    done, seconds = 0, 0.0
    for step in evaluated:
        start = time.perf_counter()
        drawn = blocks.draw((step - done) * size.batch).unflatten(0, (step - done, size.batch))
        update((drawn,), rates[done:step])
        done = step
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        curve.append((step * size.batch * size.seq, held_out_loss(forward, tests)))
        watch(step, curve[-1][1])
    tokens = total * size.batch * size.seq
    return {
        "loss": curve[-1][1],
        "tokens": tokens,
        "flops": flops_per_token(size, setting.arm) * tokens,
        "flops_per_token": flops_per_token(size, setting.arm),
        "parameters": sum(p.numel() for p in trained),
        "passes": round(tokens / (blocks.count * size.seq), 3),
        "evaluated_bytes": size.held_out_batches * size.batch * size.seq,
        "tokens_per_second": round(tokens / seconds),
        "seconds": round(seconds, 1),
        "dtype": str(_dtype(device)).removeprefix("torch."),
        "curve": curve,
        "text": source.listing,
    }


def steps(setting: Setting) -> int:
    """Return the number of updates that come nearest to the FLOPs of the ordinary arm."""
    size = setting.size
    budget = flops_per_token(size, "ordinary") * setting.tokens
    return round(budget / (flops_per_token(size, setting.arm) * size.batch * size.seq))


def flops_per_token(size: Size, arm: Arm) -> float:
    """Return the FLOPs of training on one token, forward and backward, of what the arm trains."""
    demo = _demo_setting(size)
    head_dim = size.hidden // size.heads
    keys = size.hidden * size.kv_heads * head_dim
    weights = size.layers * (2 * size.hidden**2 + 2 * keys + 3 * size.hidden * 3 * size.hidden)
    weights += size.hidden * llama.VOCABULARY
    marked = len(demo.marked_layers)
    if arm == "2-simplicial":
        weights += marked * 2 * keys
    w1, w2 = _windows(size, arm)
    whole = _attention_flops(size, None, 1)
    through = _attention_flops(size, w1, w2)
    attention = (size.layers - marked) * whole + marked * through
    return 6 * weights + 3.5 * attention / size.seq


def build(size: Size, arm: Arm, seed: int) -> nn.Module:
    """Return an arm's model; those of one seed start from the same function's weights."""
    demo = _demo_setting(size)
    model = llama.build(demo, seed=seed)
    if arm == "ordinary":
        return model
    for layer in demo.marked_layers:
        marked = mark(
            model.get_submodule(f"model.layers.{layer}.self_attn"), window=_windows(size, arm)
        )
        if arm == "windowed":
            for second in (marked.get_submodule("simplex_k2"), marked.get_submodule("simplex_v2")):
                second.requires_grad_(requires_grad=False)
    return model


def held_out_loss(forward: Any, tests: list[Tensor]) -> float:
    """Return the mean loss of all held-out blocks, in nats a byte.

    Gradients stay enabled: without them the model would be compiled once more.

    Raises:
        ArithmeticError: it is not finite.
    """
    loss = torch.stack([_loss(forward, tokens).detach() for tokens in tests]).mean().item()
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss on held-out files must be finite, got {loss}")
    return round(loss, 6)


def say(line: dict[str, Any]) -> str:
    """Return one run's outcome in words."""
    setting, result = line["setting"], line["result"]
    return (
        f"{result['parameters']:,} parameters, {setting['arm']}, seed {setting['seed']}: "
        f"{result['loss']:.4f} nats a byte after {result['tokens']:,} tokens, "
        f"{result['seconds']:.0f} s, {result['tokens_per_second']:,} tokens/s"
    )


def _loss(forward: Any, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of [batch, seq + 1] tokens."""
    kind = tokens.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
        logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@functools.cache
def _text(device: torch.device) -> text.Text:
    read = text.load()
    return text.Text(read.training.to(device), read.held_out.to(device), read.listing)


@functools.lru_cache(maxsize=1)
def _compiled(size: Size, arm: Arm, device: torch.device) -> tuple[nn.Module, Any]:
    """Return a model, and what runs it: compiled once for all seeds, whose weights it is given."""
    model = build(size, arm, 0).to(device)
    return model, torch.compile(model, backend=lowering.simplex)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _windows(size: Size, arm: Arm) -> tuple[int | None, int]:
    """Return the windows of every fourth layer."""
    return {"ordinary": (None, 1), "windowed": (size.w1, 1), "2-simplicial": (size.w1, size.w2)}[
        arm
    ]


def _attention_flops(size: Size, w1: int | None, w2: int) -> int:
    """Return the FLOPs of one layer's attention, forward, over one block."""
    q = (1, size.heads, size.seq, size.hidden // size.heads)
    key = (1, size.kv_heads, size.seq, size.hidden // size.heads)
    return flops.attn(q, key, key, key, key, w1, w2)


def _demo_setting(size: Size) -> llama.Setting:
    return llama.Setting(
        layers=size.layers,
        hidden=size.hidden,
        heads=size.heads,
        kv_heads=size.kv_heads,
        seq=size.seq,
        batch=size.batch,
        window=(size.w1, size.w2),
        steps=0,
        learning_rate=size.learning_rate,
    )


_PARTS: dict[str, tuple[Size, int]] = {
    "1M": (Size(4, 128, 2, 1, 4e-3), 2**25),
    "4M": (Size(8, 192, 3, 1, 3e-3), 2**25),
    "16M": (Size(8, 384, 6, 2, 2e-3), 2**25),
}
_QUICK: dict[str, tuple[Size, int]] = {
    "quick": (Size(4, 64, 2, 1, 4e-3, 8, 128, 32, 4, 4, 4), 2**16),
}
PARTS = tuple(_PARTS)
