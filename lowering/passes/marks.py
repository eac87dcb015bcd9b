"""The pass: scaled_dot_product_attention behind a mark becomes simplex::attn.

Before, in Dynamo's graph of a marked module:

    x   = simplex::mark(h, k2, v2, attn_mask, w1, w2, is_causal=..., form=..., ...)
    q   = f(x);  k = g(x);  v = h(x)                     any operations but attention
    out = scaled_dot_product_attention(q, k, v, is_causal=..., scale=s)

After:

    q   = f(h);  k = g(h);  v = h(h)
    out = simplex::attn(q, k, k2, v, v2, w1, w2, scale=s, is_causal=..., form=..., ...)[0]

A mask that is proven to be causal, whatever the sizes, is left out. Of any other

    kv_bounds = simplex::ranges_of_mask(attn_mask, ...)

makes what simplex::attn takes, once for all attention with that mask, and raises when run where the
mask is no such.

A mark pairs with the one attention whose query comes from it. Every mark that pairs with none, or
with several, or whose module attends elsewhere too, or with a call that says what a window cannot,
stays in the graph and is refused with its reason; it would raise when run, and the backend raises
before that.
"""

import operator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, fx

from lowering import compat
from lowering.graphs.causal_proof import CausalProofs
from lowering.graphs.names import Names
from lowering.graphs.pairing import calls_in, marks_behind, marks_in, spelled_out_outputs, within
from lowering.graphs.subgraphs import Subgraphs
from lowering.passes.no_attention import attends_again, why_no_attention
from lowering.report import Refused, Report, Rewritten
from simplex_ops.contract.schema import ATTN_OP
from simplex_ops.marking import windows_in_graphs
from simplex_ops.marking.call import Expected, SdpaCall, refusal, with_mask
from simplex_ops.marking.ranges import RANGES_OP
from simplex_ops.rules import lowered

_OPTIONS = ("is_causal", "form", "k2_bias", "v2_bias")


def rewrite(subgraphs: Subgraphs, names: Names) -> Report:
    """Rewrite every mark that can be served, in a graph and its sub-graphs, and report on all.

    It never raises on a graph that it does not understand; `Report.raise_if_refused` does.
    """
    marks = [mark for graph in subgraphs.modules for mark in marks_in(graph)]
    pairs, proofs = _pair(marks, subgraphs), CausalProofs(subgraphs)
    rewritten: list[Rewritten] = []
    refused: list[Refused] = []
    for mark in marks:
        found = _serve_or_refuse(mark, pairs, subgraphs, proofs, names)
        (refused if isinstance(found, Refused) else rewritten).append(found)  # pyright: ignore[reportArgumentType]
    for graph in {mark.graph for mark in marks}:
        for module in subgraphs.modules[graph]:
            module.recompile()
    return Report(tuple(rewritten), tuple(refused), tuple(map(names.of, pairs.unmarked)))


class _Unserved(Exception):  # noqa: N818 (a finding, not an error)
    """Why a mark cannot be served."""


@dataclass(frozen=True)
class _Pairs:
    """Marks and calls of attention, by dataflow: in a graph and all its sub-graphs."""

    calls_of: dict[fx.Node, list[fx.Node]]
    marks_of: dict[fx.Node, list[fx.Node]]
    unmarked: list[fx.Node]


def _pair(marks: list[fx.Node], subgraphs: Subgraphs) -> _Pairs:
    calls = [call for graph in subgraphs.modules for call in calls_in(graph)]
    stops = {graph: spelled_out_outputs(graph) for graph in {call.graph for call in calls}}
    marks_of = {
        call: marks_behind(SdpaCall.bind(call.args, call.kwargs).query, call, stops[call.graph])
        for call in calls
    }
    calls_of = {mark: [c for c in calls if mark in marks_of[c]] for mark in marks}
    return _Pairs(calls_of, marks_of, [c for c in calls if not marks_of[c]])


def _serve_or_refuse(
    mark: fx.Node, pairs: _Pairs, subgraphs: Subgraphs, proofs: CausalProofs, names: Names
) -> Rewritten | Refused:
    try:
        return _serve(mark, names.of_mark(mark), pairs, subgraphs, proofs)
    except _Unserved as reason:
        return Refused(names.searched(mark), str(reason))
    except Exception as error:  # noqa: BLE001 (whatever it is, the mark stays, refused)
        reason = f"the pass does not understand its graph ({type(error).__name__}: {error})"
        return Refused(names.searched(mark), reason)


def _serve(
    mark: fx.Node, name: str, pairs: _Pairs, subgraphs: Subgraphs, proofs: CausalProofs
) -> Rewritten:
    call = _only_call(mark, pairs, subgraphs)
    x, k2, v2, mask, w1, w2, q_start = _positional(mark)
    options = {name: _constant(mark.kwargs[name]) for name in _OPTIONS if name in mark.kwargs}
    is_causal = options.get("is_causal", True)
    given, found = with_mask(SdpaCall.bind(call.args, call.kwargs), mask)
    seen = SdpaCall(*(compat.example(getattr(given, f.name)) for f in fields(SdpaCall)))
    seen = replace(seen, dropout_p=_constant(given.dropout_p), scale=_constant(given.scale))
    without_dropout = bool(mark.kwargs.get("without_dropout", False))
    rows = compat.example(k2)
    if not all(isinstance(t, Tensor) for t in (seen.query, seen.key, rows)):
        raise _Unserved("its graph holds no example tensors, so it is not Dynamo's own")
    reason = found or refusal(seen, rows, is_causal, without_dropout, _expected(mark, x))
    if reason is not None:
        raise _Unserved(str(reason))
    inputs = (given.query, given.key, k2, given.value, v2, w1, w2)
    told1, told2 = (windows_in_graphs.told(compat.hint(compat.example(w))) for w in (w1, w2))
    done = Rewritten(
        name,
        told1,
        told2,
        options.get("form", "trilinear"),
    )
    if q_start is not None:
        options["q_start"] = q_start
    lowered.guard_precision(seen.query)
    bounds = _bounds(given, call, is_causal, q_start, seen, proofs)
    if bounds is not None:
        options["kv_bounds"] = bounds
    _put(call, inputs, {"scale": seen.scale, **options})
    mark.replace_all_uses_with(x)
    mark.graph.erase_node(mark)
    return done


def _expected(mark: fx.Node, x: Any) -> Expected | None:
    """Return what a mark says of the call of a module that was given a key-value cache."""
    keys = compat.example(mark.kwargs.get("keys"))
    if keys is None:
        return None
    by_mark = bool(mark.kwargs.get("causal_by_mark", False))
    return Expected(compat.example(x).shape[1], keys, by_mark)


def _only_call(mark: fx.Node, pairs: _Pairs, subgraphs: Subgraphs) -> fx.Node:
    calls = pairs.calls_of[mark]
    if not calls:
        raise _Unserved(why_no_attention(mark, subgraphs))
    if len(calls) > 1:
        raise _Unserved(
            f"{len(calls)} calls of scaled_dot_product_attention take their query from it, and a "
            "mark takes over exactly one: mark a module that calls it once"
        )
    if len(pairs.marks_of[calls[0]]) > 1:
        raise _Unserved(
            "the query of its scaled_dot_product_attention comes from other marks too: "
            "unmark all but one of the modules that make it"
        )
    if any(within(other, mark) for other in pairs.unmarked):
        raise _Unserved(
            "its module calls scaled_dot_product_attention again, with a query that does not come "
            "from the module's input, and a mark takes over exactly one call: mark a module that "
            "calls it once"
        )
    again = attends_again(mark)
    if again is not None:
        raise _Unserved(
            f"its module attends by {again} too, and a mark takes over exactly one attention: mark "
            "a module that attends once"
        )
    return calls[0]


def _bounds(
    given: SdpaCall,
    call: fx.Node,
    is_causal: bool,
    q_start: Any,
    seen: SdpaCall,
    proofs: CausalProofs,
) -> fx.Node | None:
    """Return what makes kv_bounds of a mask, before a call; None where the mask says nothing."""
    mask, graph = given.attn_mask, call.graph
    options: dict[str, Any] = {"is_causal": is_causal}
    if mask is None:
        return None
    if q_start is not None:
        options["q_start"] = q_start
    elif is_causal and proofs.holds(mask, seen.query, seen.key):
        return None
    for node in graph.nodes:  # layers share a mask; what is written into it may come between them
        if node is call:
            break
        same = node.target is RANGES_OP and node.args[0] is mask and node.kwargs == options
        if same and not proofs.is_written(mask):
            return node
    with graph.inserting_before(call):
        sizes = [
            graph.call_method("size", (of, dim))
            for of, dim in ((given.query, 0), (given.query, 2), (given.key, 2))
        ]
        return graph.call_function(RANGES_OP, (mask, *sizes), options)


def _put(call: fx.Node, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    graph = call.graph
    with graph.inserting_before(call):
        attn = graph.call_function(ATTN_OP, inputs, options)
        out = graph.call_function(operator.getitem, (attn, 0))
    out.meta = dict(call.meta)  # attention's output has the same shape and dtype as ever
    attn.meta = {key: value for key, value in call.meta.items() if key != "example_value"}
    call.replace_all_uses_with(out)
    graph.erase_node(call)


def _positional(mark: fx.Node) -> tuple[Any, ...]:
    names = ("x", "k2", "v2", "attn_mask", "w1", "w2", "q_start")
    given = {**dict(zip(names, mark.args, strict=False)), **mark.kwargs}
    return tuple(given.get(name) for name in names)


def _constant(value: Any) -> Any:
    """Return a plain number for a symbolic one: dynamic=True makes floats symbols; adds a guard."""
    return compat.make_constant(compat.example(value))
