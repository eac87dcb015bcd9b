"""The determinant's columns in order: on a GPU, and in the interpreter (TRITON_INTERPRET=1)."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")

from csrc_free.hopper.ordered import columns_of, gradients_of, ordered
from csrc_free.problem import problem_of
from simplex_ops.devices.gpu import kernel_arguments
from simplex_ops.testing import Case

DIMS = (33, 47, 62, 63, 64, 65, 96, 123, 127, 128)


def _problem(device, head_dim, **given):
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    case = Case(2, 2, 3, 5, head_dim=head_dim, form="determinant", **given)
    inputs = case.inputs(device)
    return problem_of(*inputs, **kernel_arguments(*case.windows, inputs[0], case.options(device)))


def _threes_and_others(row, head_dim):
    """Return the threes of an ordered row of column numbers, and where the others stand."""
    blocks = row.unflatten(0, (-1, 8)).tolist()
    whole = len(blocks) // 3 * 3
    threes = [
        tuple(blocks[block + axis][n] for axis in range(3))
        for block in range(0, whole, 3) for n in range(8)
    ]  # fmt: skip
    left = blocks[whole:]
    threes += [tuple(block[2 * axis + n] for axis in range(3)) for block in left for n in (0, 1)]
    others = [number for block in left for number in block[6:]]
    if len(left) == 2:
        threes.append(tuple(others[:3]))
        others = others[3:]
    return [three for three in threes if any(three)], [number for number in others if number]


@pytest.mark.parametrize("is_exchanged", [False, True])
@pytest.mark.parametrize("head_dim", DIMS)
def test_a_lane_has_whole_threes(head_dim, is_exchanged, device):
    """Turned around where the roles are exchanged; columns are numbered from 1, 0 is none."""
    windows = (2, 5) if is_exchanged else (5, 2)
    problem = _problem(device, head_dim, w1=windows[0], w2=windows[1])
    assert problem.is_exchanged == is_exchanged
    numbers = torch.arange(1.0, head_dim + 1, device=device)
    problem = dataclasses.replace(problem, q=numbers.expand_as(problem.q).contiguous())
    row = ordered(problem).q[1, 4, 3].int().cpu()
    threes, others = _threes_and_others(row, head_dim)
    first = range(1, head_dim // 3 * 3, 3)
    turned = (2, 1) if is_exchanged else (1, 2)
    assert sorted(threes) == [(n, n + turned[0], n + turned[1]) for n in first]
    assert others == list(range(head_dim // 3 * 3 + 1, head_dim + 1))


@pytest.mark.parametrize("head_dim", DIMS)
def test_columns_come_back(head_dim, device):
    problem = _problem(device, head_dim, layout="fused", w1=2, w2=5)
    there = ordered(problem)
    back = [torch.full_like(t, torch.nan) for t in (problem.q, problem.k_narrow)]
    with gradients_of(problem, *back) as places:
        for place, moved in zip(places, (there.q, there.k_narrow), strict=True):
            assert place.shape[3] == columns_of(problem)
            place.copy_(moved)
    for found, given in zip(back, (problem.q, problem.k_narrow), strict=True):
        assert torch.equal(found, given)


def test_other_forms_stay_as_they_are(device):
    problem = dataclasses.replace(_problem(device, 64), form="trilinear")
    assert ordered(problem) is problem
    with gradients_of(problem, problem.q) as (place,):
        assert place is problem.q
