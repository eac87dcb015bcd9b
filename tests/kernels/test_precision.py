"""How float32 is multiplied: by the device, by what the user set, and as the answers show it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from csrc_free.precision import precision_of
from csrc_free.problem import problem_of
from csrc_free.tracing import traced_by
from csrc_free.traits import DEVICES, INTERPRETER
from simplex_ops.testing import Case, assert_matches_reference

attn = torch.ops.simplex.attn


@pytest.fixture
def matmul():
    """Return where PyTorch keeps the setting, and put it back afterwards."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]


def _of_float32(name, columns=128):
    return precision_of(torch.float32, columns, DEVICES[name])


def test_parts_of_bfloat16_are_the_default_where_triton_has_them():
    found = {name: _of_float32(name) for name in DEVICES}
    assert {found[name] for name in found if name.startswith("sm_")} == {"bf16x6"}
    assert {found[name] for name in found if name.startswith("gfx")} == {"ieee"}
    assert precision_of(torch.float32, 128, INTERPRETER) == "ieee"


def test_operands_in_three_parts_are_too_large_at_256_columns():
    assert _of_float32("sm_90", 256) == "ieee"


@pytest.mark.parametrize("said", ["ieee", "tf32"])
def test_a_setting_of_the_user_is_obeyed(matmul, said):
    matmul.fp32_precision = said
    for name, device in DEVICES.items():
        assert _of_float32(name) == (said if device.has_tf32 else "ieee")
    assert _of_float32("sm_90", 256) == said


@pytest.mark.parametrize(
    ("said", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_the_older_settings_are_the_same_one(matmul, said, expected):
    torch.set_float32_matmul_precision(said)
    assert _of_float32("sm_90") == expected
    matmul.allow_tf32 = True
    assert _of_float32("sm_90") == "tf32"
    matmul.allow_tf32 = False
    assert _of_float32("sm_90") == "ieee"


@pytest.mark.parametrize("said", ["none", "ieee", "tf32"])
def test_no_setting_reaches_half_precision(matmul, said):
    matmul.fp32_precision = said
    assert precision_of(torch.bfloat16, 128, DEVICES["sm_90"]) is None
    assert precision_of(torch.float16, 128, DEVICES["sm_90"]) == "tf32"
    assert precision_of(torch.float16, 128, DEVICES["gfx950"]) == "ieee"


def test_a_changed_setting_is_another_choice_and_another_program(matmul, monkeypatch):
    monkeypatch.setattr("csrc_free.problem.device_of", lambda device: DEVICES["sm_90"])
    q = torch.empty(1, 8, 64, 64, device="meta")
    k1, k2, v1, v2 = (torch.empty(1, 2, 64, 64, device="meta") for _ in range(4))
    seen = set()
    for said in ("none", "ieee", "tf32"):
        matmul.fp32_precision = said
        problem = problem_of(
            q, k1, k2, v1, v2, (15, 0), (3, 0), 0.1, "trilinear", 0.0, 0.0, None, None
        )
        seen.add((problem.traits(), problem.constants()["PRECISION"]))
    assert len({traits for traits, _ in seen}) == len({constant for _, constant in seen}) == 3


@pytest.mark.parametrize("kept", [False, True])
def test_a_setting_is_part_of_a_trace_only_where_another_is_another_trace(kept):
    left = []
    tracer: Any = SimpleNamespace(keeps_precision=lambda: kept, leave=left.append)
    with traced_by(tracer):
        assert _of_float32("sm_90") == "bf16x6"
    assert len(left) == (not kept)


CASES = [
    Case(kv_heads=2, group=4, seq=300, head_dim=64, w1=128, w2=16, through="both"),
    Case(kv_heads=1, group=64, seq=100, head_dim=128, w1=None, w2=None, through="both"),
    Case(kv_heads=2, group=1, seq=300, head_dim=33, value_dim=80, w1=30, w2=200, through="both"),
    Case(group=3, seq=90, head_dim=24, form="determinant", amplitude=4.0, through="both"),
    Case(group=8, seq=150, head_dim=40, form="strassen", k2_bias=1.0, v2_bias=-0.5),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("said", ["none", "ieee"])
def test_products_are_within_the_budget_of_float32(matmul, case, said):
    matmul.fp32_precision = said
    assert_matches_reference(case, attn, device="cuda")


def _inputs():
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, heads, 120, 64, device="cuda", generator=generator).requires_grad_()
        for heads in (8, 2, 2, 2, 2)
    ]


def _graded(run, inputs):
    out, lse = run(*inputs)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)]


@pytest.mark.gpu
def test_one_product_is_what_a_setting_brings_and_compiled_code_follows(matmul):
    def run(*inputs):
        return attn(*inputs, 60, 9)

    inputs, eager = _inputs(), {}
    compiled = torch.compile(run, fullgraph=True)
    for said in ("none", "tf32", "ieee", "none"):
        matmul.fp32_precision = said
        eager[said] = _graded(run, inputs)
        for one, other in zip(eager[said], _graded(compiled, inputs), strict=True):
            assert torch.equal(one, other), said
    coarse = (eager["tf32"][0] - eager["ieee"][0]).abs().max()
    fine = (eager["none"][0] - eager["ieee"][0]).abs().max()
    assert 0 < 20 * fine < coarse


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("which", "size"),
    [
        (0, 3.4e38),
        (1, 3.4e38),
        (2, 3.4e38),
        (0, 1e-30),
        (1, 1e-30),
        (3, 1e29),
        (4, 1e29),
        (3, 1e-30),
    ],
)
def test_numbers_near_the_ends_of_float32_stay_right(which, size):
    """A number that is rounded to infinity before its rest is taken does not bear this."""
    inputs = [t.detach().clone() for t in _inputs()]
    inputs[which] = inputs[which].clamp(-1, 1) * size
    scale = 0.125
    if which < 3:  # logits of the size that they had
        scale /= max(size * 1e-20, 1e-30)
        inputs[2 if which == 0 else 0] *= 1e-20 if size > 1 else 1.0  # so q∘k2 is within range
    out, lse = attn(*inputs, 60, 9, scale=scale)
    true_out, true_lse = attn(*(t.double() for t in inputs), 60, 9, scale=scale)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    most = true_out.abs().max()
    torch.testing.assert_close(out.double() / most, true_out / most, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_who_sees_it(bad):
    inputs = [t.detach().clone() for t in _inputs()]
    inputs[3][:, 0, 60] = bad
    out, _ = attn(*inputs, 60, 9)
    assert not out[:, :4, 60:100].isfinite().any()
    assert out[:, 4:].isfinite().all()
