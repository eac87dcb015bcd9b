"""Proof that a mask computed inside a graph is the causal mask and nothing more.

Hugging Face hands a compiled model a dense mask where eager code gets None. It is computed from
`arange` alone; a mask that knows of padding or packed documents comes from an input tensor.

A proof holds for every size that its graph will serve. The rule that makes the mask is read from
its nodes; what the rule says beyond causality (a window of 4096) must hold at all sizes up to one
that becomes a guard. A mask whose rule cannot be read is run at the example's sizes, and these
become constants, so that other sizes are compiled, and proven, again.
"""

from typing import Any

import torch
from torch import Tensor, fx

from lowering import compat
from lowering.graphs.mask_at_size import MaskAtSize
from lowering.graphs.mask_rule import Linear, Unread, read_rule
from lowering.graphs.not_proven import NotProven
from lowering.graphs.subgraphs import Subgraphs
from lowering.graphs.writes import writer_into

_HIDES_MORE = "it hides other keys than those after the query"


class CausalProofs:
    """What one run of the pass has proven: layers share a mask, and it is read once for all."""

    def __init__(self, subgraphs: Subgraphs) -> None:
        self._subgraphs = subgraphs
        self._holds: dict[Any, bool] = {}
        self._is_written: dict[fx.Node, bool] = {}

    def holds(self, mask: fx.Node, query: Tensor, key: Tensor) -> bool:
        """Say whether a mask is proven to be causal, for attention of these sizes."""
        asked = (mask, compat.identity_of(query), compat.identity_of(key))
        if asked not in self._holds:
            try:
                prove_causal(mask, query, key, self._subgraphs)
                self._holds[asked] = True
            except NotProven:
                self._holds[asked] = False
        return self._holds[asked]

    def is_written(self, mask: fx.Node) -> bool:
        """Say whether a mask's graph writes into it."""
        if mask not in self._is_written:
            self._is_written[mask] = writer_into(mask.graph, {mask: None}) is not None
        return self._is_written[mask]


def prove_causal(mask: fx.Node, query: Tensor, key: Tensor, subgraphs: Subgraphs) -> None:
    """Prove that `mask` is causal for this attention in every call of its graph.

    Raises:
        NotProven: it may be more than causal, or is not the size of the attention.
    """
    for source in subgraphs.sources_of(mask):
        example = compat.example(source)
        if not isinstance(example, Tensor):
            raise NotProven(f"it is {example!r}, no tensor")
        _check_kind(example, query, key)
        read: dict[fx.Node, Any] = {}
        if not _holds_by_rule(source, example, read):
            _prove_at_size(source, query, read)
        writer = writer_into(source.graph, read)
        if writer is not None:
            raise NotProven(f"{writer} writes into it")


def _check_kind(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise where scaled_dot_product_attention would not take the mask, or would stretch it."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise NotProven(
            f"it is of {mask.dtype}, and scaled_dot_product_attention takes truth values or floats"
        )
    queries, keys = query.shape[2], key.shape[2]
    if mask.dim() not in (2, 3, 4):
        raise NotProven(
            f"it has {mask.dim()} dimensions, and a mask [{queries}, {keys}] or one with heads and "
            "batch before that is wanted"
        )
    if not (compat.agree(mask.shape[-2], queries) and compat.agree(mask.shape[-1], keys)):
        raise NotProven(
            f"it has {mask.shape[-2]} queries and {mask.shape[-1]} keys, and the attention "
            f"{queries} and {keys}"
        )
    if not compat.agree(queries, keys):
        raise NotProven(f"there are {queries} queries and {keys} keys, as with a key-value cache")
    leading = reversed(mask.shape[:-2])
    for size, wanted in zip(leading, (query.shape[1], query.shape[0]), strict=False):
        if not (compat.agree(size, 1) or compat.agree(size, wanted)):
            raise NotProven(
                f"it is of shape {list(mask.shape)}, and the query of {list(query.shape)}"
            )


def _holds_by_rule(source: fx.Node, example: Tensor, read: dict[fx.Node, Any]) -> bool:
    """Say whether the mask's rule is causal at all sizes up to one that is guarded then."""
    known: dict[fx.Node, Any] = {}
    try:
        rule = read_rule(source, known)
    except Unread:
        return False
    causal = Linear((0,) * (example.dim() - 2) + (1, -1))
    if rule.all_of is None or causal not in rule.all_of:
        return False
    weaker = {c for c in rule.all_of if c.coefs == causal.coefs and c.const >= 0}
    least = [_least(claim, example) for claim in rule.all_of - weaker]
    if not all(compat.hint(value) >= 0 for value in least):
        return False
    for value in least:
        compat.guard(value >= 0)
    read.update(known)
    return True


def _least(claim: Linear, example: Tensor) -> Any:
    """Return what a claim's value is at least, over all coordinates of a shape."""
    falling = [c * (size - 1) for c, size in zip(claim.coefs, example.shape, strict=True) if c < 0]
    return sum(falling, start=claim.const)


def _prove_at_size(source: fx.Node, query: Tensor, read: dict[fx.Node, Any]) -> None:
    run = MaskAtSize()
    _check_causal(run.value_of(source))
    read.update(run.known)
    bound = [size for size in run.sizes if compat.must_stay_symbolic(size)]
    if bound:
        raise NotProven(
            f"it is causal at this size, but nothing says so of other values of {bound[0]}, which "
            "mark_dynamic forbids to make a constant (torch._dynamo.maybe_mark_dynamic allows it, "
            "and compiles again for each size)"
        )
    for size in run.sizes:
        compat.make_constant(size)


def _check_causal(mask: Tensor) -> None:
    queries, keys = mask.shape[-2:]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    shared = tuple(0 if stride == 0 else slice(None) for stride in mask.stride()[:-2])
    for one in mask[shared].reshape(-1, queries, keys):
        seen = one if one.dtype == torch.bool else one == 0
        hidden = ~one if one.dtype == torch.bool else one <= torch.finfo(one.dtype).min
        if not (torch.equal(seen, causal) and torch.equal(hidden, ~causal)):
            raise NotProven(_HIDES_MORE)
