"""The blocked path: every way of cutting a call gives the same answer, in bounded memory."""

from itertools import product

import pytest
import torch
from blind_host import blind
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from simplex_ops.contract.checks import FORMS
from simplex_ops.devices import cpu
from simplex_ops.devices.blocked import plan
from simplex_ops.testing import Case, Problem, assert_matches_reference, cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[(64, 4096), (300, 4), (2000, 16)], ids=lambda size: f"{size[0]}x{size[1]}")
def small_tiles(request, monkeypatch):
    """Cut small problems as finely as large ones are cut."""
    tile, step = request.param
    monkeypatch.setattr(plan, "CPU_TILE", tile)
    monkeypatch.setattr(plan, "WIDE_STEP", step)


@pytest.fixture
def blind_host(monkeypatch):
    """Decide nothing by values, as on a device where looking would synchronise."""
    blind(monkeypatch)


several = settings(
    max_examples=40,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
problems = cases(
    dtypes=(torch.float64, torch.float32),
    max_seq=40,
    max_head_dim=16,
    max_heads=4,
    max_work=400_000,
)


@pytest.mark.usefixtures("small_tiles")
@several
@given(case=problems)
def test_tiles_of_any_size_are_within_the_budget(case):
    assert_matches_reference(case)


@pytest.mark.usefixtures("blind_host")
@several
@given(case=problems)
def test_a_host_that_may_not_look_is_within_the_budget(case):
    assert_matches_reference(case)


def _readings(problem):
    """Return the values that a forward and a backward read, and their float64 tensors, counted."""

    class Watch(TorchDispatchMode):
        read = doubled = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.read += func is torch.ops.aten._local_scalar_dense.default
            self.doubled += isinstance(result, torch.Tensor) and result.dtype == torch.float64
            return result

    with Watch() as watch:
        bounds, starts = (problem.options[name] for name in ("kv_bounds", "q_start"))
        _run(problem.inputs, problem.windows, bounds, starts, operators=cpu)
    return watch.read, watch.doubled


BLINDNESS = Problem.of(
    Case(batch=2, kv_heads=2, seq=20, w1=9, w2=4, bounds="ranges", starts="random")
)


@pytest.mark.usefixtures("blind_host")
@pytest.mark.parametrize("magnitude", [1.0, 1e20])
def test_a_host_that_may_not_look_reads_nothing_and_stays_in_float32(magnitude):
    problem = BLINDNESS.mapped(lambda t: t * magnitude if t.is_floating_point() else t)
    assert _readings(problem) == (0, 0)


def test_a_host_that_may_look_reads_and_doubles_where_float32_overflows():
    """What the test above would see, were the host not blind."""
    read, doubled = _readings(BLINDNESS)
    assert (read > 0, doubled) == (True, 0)
    read, doubled = _readings(BLINDNESS.mapped(lambda t: t * 1e20 if t.is_floating_point() else t))
    assert read > 0
    assert doubled > 0


# seq, keys1, keys2, w1, w2
GEOMETRIES = [
    (70, 70, 70, 24, 5),  # the usual: the second side is narrow
    (70, 70, 70, 5, 24),  # exchanged
    (33, 90, 40, 16, 16),  # more keys than queries, and fewer second keys
    (90, 33, 20, 12, 8),  # queries before the first key
    (40, 40, 40, None, 6),  # one side whole
    (40, 40, 40, 6, None),
    (24, 24, 24, None, None),
    (1, 200, 200, None, 7),  # one query against a cache
    (1, 60, 60, None, None),
    (50, 50, 50, 1, 1),
    (20, 20, 20, 500, 3),
    (30, 30, 4, 8, 6),  # a window longer than its pair
]


# Who sees which key is no matter of the form; the drawn problems above have both.
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("form", "geometry"),
    [*product(FORMS[:1], GEOMETRIES), *product(FORMS[1:], GEOMETRIES[:2])],
)
def test_every_geometry_is_within_the_budget(form, is_causal, geometry):
    seq, keys1, keys2, w1, w2 = geometry
    assert_matches_reference(
        Case(
            batch=2,
            kv_heads=2,
            group=3,
            seq=seq,
            keys1=keys1,
            keys2=keys2,
            head_dim=7,
            value_dim=5,
            w1=w1,
            w2=w2,
            is_causal=is_causal,
            form=form,
            k2_bias=0.5,
            v2_bias=-0.5,
            dtype=torch.float64,
            through="both",
        ),
        slack=8.0,  # a wrong geometry errs by far more than float64 rounds
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("amplitude", [1.0, 30.0, 1000.0])
def test_logits_of_any_size_are_within_the_budget(form, amplitude):
    """Sums taken without a maximum are thrown away where they would overflow or vanish."""
    assert_matches_reference(
        Case(
            kv_heads=2, seq=48, head_dim=16, w1=16, w2=4, form=form, amplitude=amplitude,
            through="both",
        )
    )  # fmt: skip


@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_logits_far_from_zero_are_within_the_budget(offset):
    """All exponentials of a query vanish, or overflow, unless its maximum is taken from them."""
    case = Case(kv_heads=1, seq=40, head_dim=16, w1=16, w2=4, through="both")
    q, k1, k2, v1, v2 = case.inputs()
    q[..., 0], k1[..., 0], k2[..., 0] = offset * 4, 1.0, 1.0
    dout, dlse = case.cotangents()
    assert_matches_reference(Problem((q, k1, k2, v1, v2), (16, 4), {}, dout, dlse))


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_values_of_any_magnitude_are_within_the_budget(magnitude):
    case = Case(kv_heads=2, group=2, seq=40, w1=16, w2=4)
    q, k1, k2, v1, v2 = case.inputs()
    assert_matches_reference(Problem((q, k1, k2, v1 * magnitude, v2 / magnitude), (16, 4)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("huge", [1e30, 3e38])
def test_a_huge_key_that_no_query_sees_changes_nothing(form, huge):
    case = Case(batch=2, kv_heads=2, group=2, seq=40, w1=16, w2=4, form=form)
    bounds = torch.tensor([10, 30], dtype=torch.int32).expand(2, 40, 2)
    inputs = case.inputs()
    before = _run(inputs, (16, 4), bounds)
    for x in inputs[1:]:
        x[:, :, :10], x[:, :, 30:] = huge, -huge
    for was, now in zip(before, _run(inputs, (16, 4), bounds), strict=True):
        torch.testing.assert_close(now, was)


def test_an_infinity_spoils_no_other_kv_head():
    case = Case(batch=2, kv_heads=2, seq=40, w1=16, w2=4)
    inputs = case.inputs()
    before = _run(inputs, (16, 4), None)
    for x in inputs[1:]:
        x[0, 1, 5] = torch.inf
    for was, now in zip(before, _run(inputs, (16, 4), None), strict=True):
        torch.testing.assert_close(now[1], was[1])
        torch.testing.assert_close(now[0, 0], was[0, 0])


@pytest.mark.parametrize("windows", [(64, 16), (16, 64), (None, 32), (None, None)])
def test_no_tensor_grows_with_the_product_of_the_windows(windows, monkeypatch):
    """256 queries see up to 65536 pairs each, 16 million in all: 64 MiB, 128 KiB in a tile."""
    tile = 2**15
    monkeypatch.setattr(plan, "CPU_TILE", tile)
    case = Case(group=2, seq=256, head_dim=8, w1=windows[0], w2=windows[1])
    inputs = case.inputs()
    largest = _LargestTensor()
    with largest:
        _run(inputs, windows, None, operators=cpu)
    assert largest.elements > tile // 4  # it saw the tiles
    assert largest.elements <= 2 * tile, f"a tensor of {largest.elements} elements"


def _run(inputs, windows, bounds, starts=None, operators=torch.ops.simplex):
    """Run both; as functions of `devices.cpu`, since a mode sees an operator only from outside."""
    options = {"kv_bounds": bounds, "q_start": starts}
    out, lse = operators.attn(*inputs, *windows, **options)
    grads = operators.attn_backward(
        torch.ones_like(out), torch.ones_like(lse), *inputs, out, lse, *windows,
        **options, grad_mask=[True] * 5,
    )  # fmt: skip
    return out, lse, *grads


class _LargestTensor(TorchDispatchMode):
    """Remember the largest storage behind any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, stored)
        return result
