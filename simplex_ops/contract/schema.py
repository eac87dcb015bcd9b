"""The operators' schemas: one string each, the library that owns them, and their names.

What the arguments mean stands in the docstring of `simplex_ops.functional`.
"""

import torch

_PROBLEM = "Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2"
_SAVED = "Tensor out, Tensor lse"
_WINDOWS = "SymInt? w1=None, SymInt? w2=None"
_OPTIONS = (
    'float? scale=None, bool is_causal=True, str form="trilinear", '
    "float k2_bias=0.0, float v2_bias=0.0, "
    "Tensor? kv_bounds=None, Tensor? q_start=None"
)

ATTN = f"attn({_PROBLEM}, {_WINDOWS}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)"
ATTN_BACKWARD = (
    f"attn_backward(Tensor? dout, Tensor? dlse, {_PROBLEM}, {_SAVED}, {_WINDOWS}, *, "
    f"{_OPTIONS}, bool[5] grad_mask=[True, True, True, True, True]) "
    "-> (Tensor dq, Tensor dk1, Tensor dk2, Tensor dv1, Tensor dv2)"
)
MARK = (
    "mark(Tensor x, Tensor k2, Tensor v2, Tensor? attn_mask=None, "
    "SymInt? w1=None, SymInt? w2=None, Tensor? q_start=None, *, "
    'bool is_causal=True, str form="trilinear", '
    "float k2_bias=0.0, float v2_bias=0.0, bool without_dropout=False, "
    "SymInt? keys=None, bool causal_by_mark=False) -> Tensor"
)
RANGES_OF_MASK = (
    "ranges_of_mask(Tensor attn_mask, SymInt batch, SymInt queries, SymInt keys, "
    "bool is_causal=True, Tensor? q_start=None) -> Tensor"
)

# The dispatcher drops arguments that equal their default before it calls a Python kernel.
DEFAULTS = {
    "scale": None,
    "is_causal": True,
    "form": "trilinear",
    "k2_bias": 0.0,
    "v2_bias": 0.0,
    "kv_bounds": None,
    "q_start": None,
}
ALL_GRADS = (True, True, True, True, True)

LIBRARY = torch.library.Library("simplex", "DEF")

# Outputs follow their inputs' memory order, so the fake kernels are only right where a compiled
# graph hands over the strides that eager code had.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

for _schema in (ATTN, ATTN_BACKWARD, MARK, RANGES_OF_MASK):
    LIBRARY.define(_schema, tags=_TAGS)

ATTN_OP = torch.ops.simplex.attn.default
ATTN_BACKWARD_OP = torch.ops.simplex.attn_backward.default
