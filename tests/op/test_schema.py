"""The schemas as they are: an exported program names them, and must load for years."""

import pytest
import torch

import simplex_ops.contract.schema  # noqa: F401

SCHEMAS = {
    "attn": (
        "simplex::attn(Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, SymInt? w1=None, "
        "SymInt? w2=None, *, float? scale=None, bool is_causal=True, "
        'str form="trilinear", float k2_bias=0., float v2_bias=0., Tensor? kv_bounds=None, '
        "Tensor? q_start=None) -> (Tensor out, Tensor lse)"
    ),
    "attn_backward": (
        "simplex::attn_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k1, Tensor k2, "
        "Tensor v1, Tensor v2, Tensor out, Tensor lse, SymInt? w1=None, SymInt? w2=None, *, "
        'float? scale=None, bool is_causal=True, str form="trilinear", float k2_bias=0., '
        "float v2_bias=0., Tensor? kv_bounds=None, Tensor? q_start=None, "
        "bool[5] grad_mask=[True, True, True, True, True]) "
        "-> (Tensor dq, Tensor dk1, Tensor dk2, Tensor dv1, Tensor dv2)"
    ),
    "mark": (
        "simplex::mark(Tensor x, Tensor k2, Tensor v2, Tensor? attn_mask=None, "
        "SymInt? w1=None, SymInt? w2=None, Tensor? q_start=None, *, bool is_causal=True, "
        'str form="trilinear", float k2_bias=0., float v2_bias=0., '
        "bool without_dropout=False, SymInt? keys=None, bool causal_by_mark=False) -> Tensor"
    ),
    "ranges_of_mask": (
        "simplex::ranges_of_mask(Tensor attn_mask, SymInt batch, SymInt queries, SymInt keys, "
        "bool is_causal=True, Tensor? q_start=None) -> Tensor"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_what_exported_programs_know(name):
    """A change breaks saved programs: add arguments at the end, with a default, or none."""
    assert str(getattr(torch.ops.simplex, name).default._schema) == SCHEMAS[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_operator_has_one_overload(name):
    assert getattr(torch.ops.simplex, name).overloads() == ["default"]
