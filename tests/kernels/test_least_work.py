"""Small problems run on the portable kernels on Hopper too, eager and compiled alike."""

import pytest
import torch

pytest.importorskip("triton")

from csrc_free import attn, problem
from csrc_free.hopper.least_work import work_of
from csrc_free.traits import DEVICES
from simplex_ops.devices.gpu import kernel_arguments
from simplex_ops.rules import flops

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def hopper_as_users_have_it(small_problems_as_users_have_them, monkeypatch):
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES["sm_90"])


def _inputs(batch, heads, kv_heads, seq, dim, keys=None, dtype=BF16):
    return [
        torch.empty(batch, n, h, dim, dtype=dtype, device="meta").transpose(1, 2)
        for h, n in ((heads, seq), *[(kv_heads, keys or seq)] * 4)
    ]


SMALL = "portable: a problem so small takes the host longer than the device"


def _served_by(sizes, w1=512, w2=32, dtype=BF16, **options):
    """Return who runs the forward, and the backward."""
    inputs = _inputs(*sizes, dtype=dtype)
    arguments = kernel_arguments(w1, w2, inputs[0], options)
    backward = attn.backward_served_by(torch.empty_like(inputs[0]), *inputs, **arguments)
    return attn.forward_served_by(*inputs, **arguments), backward


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 16, 4, 256, 64),
        (1, 32, 8, 1, 128, 4096),  # one token of a generation
        (16, 32, 8, 1, 128, 4096),
    ],
)
def test_small_ones_run_on_the_portable_kernels(sizes):
    assert _served_by(sizes) == (SMALL, SMALL)


@pytest.mark.parametrize(
    "sizes", [(1, 16, 4, 512, 64), (1, 32, 8, 1024, 128), (4, 16, 4, 4096, 64)]
)
def test_others_run_on_hopper_s(sizes):
    assert all(said.startswith("hopper") for said in _served_by(sizes))


def test_a_narrow_window_makes_a_long_problem_small():
    sizes = (1, 16, 4, 1024, 64)
    assert _served_by(sizes, w1=64, w2=8) == (SMALL, SMALL)
    assert all(said.startswith("hopper") for said in _served_by(sizes))


@pytest.mark.parametrize(
    "given", [{"form": "strassen"}, {"form": "determinant"}, {"dtype": torch.float16}]
)
def test_what_takes_the_portable_kernels_longer_is_small_up_to_half_the_length(given):
    sizes = (1, 64, 8, 128, 64)
    assert _served_by(sizes) == (SMALL, SMALL)
    assert SMALL not in _served_by(sizes, **given)
    assert _served_by((1, 64, 8, 64, 64), **given) == (SMALL, SMALL)


@pytest.mark.parametrize("device", sorted(set(DEVICES) - {"sm_90"}))
def test_it_is_no_reason_where_hopper_s_never_run(monkeypatch, device):
    monkeypatch.setattr(problem, "device_of", lambda _device: DEVICES[device])
    assert all("sm_90" in said for said in _served_by((1, 16, 4, 256, 64)))


def test_work_is_that_of_the_flops_formula_where_all_is_seen():
    inputs = _inputs(2, 8, 2, 30, 48, keys=50)
    arguments = kernel_arguments(None, None, inputs[0], {"is_causal": False})
    work = work_of(problem.problem_of(*inputs, **arguments))
    assert work == flops.attn(*(t.shape for t in inputs), is_causal=False)
