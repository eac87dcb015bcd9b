"""The pass: scaled_dot_product_attention behind a mark becomes simplex::attn.

Before, in Dynamo's graph of a marked module:

    x   = simplex::mark(h, k2, v2, attn_mask, w1, w2, is_causal=..., form=..., ...)
    q   = f(x);  k = g(x);  v = h(x)                     any operations but attention
    out = scaled_dot_product_attention(q, k, v, is_causal=..., scale=s)

After:

    q   = f(h);  k = g(h);  v = h(h)
    out = simplex::attn(q, k, k2, v, v2, w1, w2, scale=s, is_causal=..., form=..., ...)[0]

A mark pairs with the one attention whose query comes from it. Every mark that pairs with none, or
with several, or with a call that says what a window cannot, stays in the graph and is refused with
its reason; it would raise when run, and the backend raises before that.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lowering import compat
from lowering.graphs.causal_proof import why_not_causal
from lowering.graphs.subgraphs import Subgraphs
from lowering.report import Refused, Report, Rewritten
from simplex_ops.marking.call import SDPA, SdpaCall, refusal
from simplex_ops.marking.mark_op import MARK_OP

ATTN_OP = torch.ops.simplex.attn.default

_OPTIONS = ("is_causal", "form", "k2_bias", "v2_bias")
_NO_ATTENTION = (
    "no scaled_dot_product_attention in its graph takes its query from the marked input. "
    "Either a graph break parts the two (torch.compile(fullgraph=True) shows where), "
    "or DDPOptimizer did (set torch._dynamo.config.optimize_ddp = False), "
    'or the model attends by other means (attn_implementation="sdpa" sets it right)'
)


def rewrite(gm: fx.GraphModule) -> Report:
    """Rewrite every mark that can be served, in a graph and its sub-graphs, and report on all.

    It never raises on a graph that it does not understand; `Report.raise_if_refused` does.
    """
    subgraphs = Subgraphs(gm)
    rewritten: list[Rewritten] = []
    refused: list[Refused] = []
    unmarked: list[str] = []
    for graph, modules in subgraphs.modules.items():
        marks = [n for n in graph.nodes if _calls(n, MARK_OP)]
        taken_by: dict[fx.Node, list[fx.Node]] = {m: [] for m in marks}
        for call in [n for n in graph.nodes if n.op == "call_function" and n.target is SDPA]:
            reached = _marks_behind(call)
            for m in reached:
                taken_by[m].append(call)
            if not reached:
                unmarked.append(_module_of(call))
        shared = {
            c for m in marks for c in taken_by[m] if sum(c in t for t in taken_by.values()) > 1
        }
        for m in marks:
            found = _serve(m, taken_by[m], shared, subgraphs)
            (refused if isinstance(found, Refused) else rewritten).append(found)  # pyright: ignore[reportArgumentType]
        if marks:
            graph.lint()
            for module in modules:
                module.recompile()
    return Report(tuple(rewritten), tuple(refused), tuple(unmarked))


def _serve(
    mark: fx.Node, calls: list[fx.Node], shared: set[fx.Node], subgraphs: Subgraphs
) -> Rewritten | Refused:
    name = _module_of(mark)
    if not calls:
        return Refused(name, _NO_ATTENTION)
    if len(calls) > 1:
        return Refused(
            name, f"{len(calls)} calls of scaled_dot_product_attention take their query from it"
        )
    if calls[0] in shared:
        return Refused(name, "the query of its scaled_dot_product_attention comes from other marks")
    x, k2, v2, mask, w1, w2 = _positional(mark)
    options = {name: _constant(mark.kwargs[name]) for name in _OPTIONS if name in mark.kwargs}
    is_causal = options.get("is_causal", True)
    if mask is not None and not is_causal:
        return Refused(name, "it is not causal and was given an attention_mask: leave the mask out")
    reason = None if mask is None else why_not_causal(mask, subgraphs)
    call = calls[0]
    given = SdpaCall.bind(call.args, call.kwargs)
    seen = SdpaCall(*(compat.example(getattr(given, f)) for f in SdpaCall.__dataclass_fields__))
    seen = replace(seen, dropout_p=_constant(given.dropout_p), scale=_constant(given.scale))
    tensors = (seen.query, seen.key, compat.example(k2))
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return Refused(name, "its graph holds no example tensors, so it is not Dynamo's own")
    reason = reason or refusal(seen, tensors[2], is_causal)
    if reason is not None:
        return Refused(name, reason)
    inputs = (given.query, given.key, k2, given.value, v2, w1, w2)
    _put(call, inputs, {"scale": seen.scale, **options})
    mark.replace_all_uses_with(x)
    mark.graph.erase_node(mark)
    return Rewritten(name, compat.hint(compat.example(w1)), compat.hint(compat.example(w2)),
                     options.get("form", "trilinear"))  # fmt: skip


def _put(call: fx.Node, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    graph = call.graph
    with graph.inserting_before(call):
        attn = graph.call_function(ATTN_OP, inputs, options)
        out = graph.call_function(operator.getitem, (attn, 0))
    out.meta = dict(call.meta)  # attention's output has the same shape and dtype as ever
    attn.meta = {key: value for key, value in call.meta.items() if key != "example_value"}
    call.replace_all_uses_with(out)
    graph.erase_node(call)


def _marks_behind(call: fx.Node) -> list[fx.Node]:
    """Walk back from a call's query to marks, but not through other attention.

    Attention between the two belongs to an earlier layer: without that stop, a layer that nobody
    marked would take the mark of the layer before it.
    """
    found: list[fx.Node] = []
    pending, seen = [SdpaCall.bind(call.args, call.kwargs).query], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if _calls(node, MARK_OP):
            if _traced_within(call, node):
                found.append(node)
        elif node.target is not SDPA and not _calls(node, ATTN_OP):
            pending.extend(node.all_input_nodes)
    return found


def _traced_within(call: fx.Node, mark: fx.Node) -> bool:
    """Say whether a call was traced inside the module that emitted a mark, where both are known.

    Where attention between two layers is not a node of its own (plain matrix products), dataflow
    alone would pair a mark with the next layer's call.
    """
    inside, owner = compat.module_stack(call), compat.module_stack(mark)
    return not inside or not owner or next(reversed(owner)) in inside


def _calls(node: fx.Node, op: Any) -> bool:
    return node.op == "call_function" and node.target in (op, op.overloadpacket)


def _positional(mark: fx.Node) -> tuple[Any, ...]:
    names = ("x", "k2", "v2", "attn_mask", "w1", "w2")
    given = {**dict(zip(names, mark.args, strict=False)), **mark.kwargs}
    return tuple(given.get(name) for name in names)


def _constant(value: Any) -> Any:
    """Return a plain number for a symbolic one: dynamic=True makes floats symbols; adds a guard."""
    value = compat.example(value)
    return float(value) if isinstance(value, torch.SymFloat) else value


def _module_of(node: fx.Node) -> str:
    stack = compat.module_stack(node)
    return next(reversed(stack.values())) if stack else "a module traced after a graph break"
