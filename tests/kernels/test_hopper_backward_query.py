"""dq on Hopper, and the narrow pair's gradients beside it: choice, compilation, answers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from csrc_free import problem as problems
from csrc_free.hopper import backward_narrow as narrow
from csrc_free.hopper import backward_query as query
from csrc_free.hopper.key_plan import FLOOR_BYTES
from csrc_free.hopper.ordered import columns_of, gradients_of, ordered
from csrc_free.portable import backward as portable_backward
from csrc_free.problem import Problem as KernelProblem
from csrc_free.problem import block, problem_of
from csrc_free.steps.delta import Statistics, statistics_of
from csrc_free.steps.parts import LIMIT_BYTES
from csrc_free.traits import DEVICES
from simplex_ops.devices import gpu
from simplex_ops.testing import (
    Case,
    Problem,
    assert_matches_reference,
    assert_within_budget,
    cases,
    judge,
)
from tools.compiled.launches import recorded
from tools.compiled.registers import device_of, usage_of

HOPPER = DEVICES["sm_90"]
INPUTS = ("q", "k1", "k2", "v1", "v2")


def _problem_of(given: Problem) -> KernelProblem:
    arguments = gpu.kernel_arguments(*given.windows, given.inputs[0], given.options)
    return problem_of(*given.inputs, **arguments)


def _choices(problem: KernelProblem, statistics: Statistics):
    """Return the configs of the kernels that serve the query side: of 5 to 31 heads both do."""
    traits = replace(problem.traits(statistics.dout), block_d=block(columns_of(problem)))
    small = narrow.choose(traits, problem.device, narrow.width_of(problem))
    if any(problem.biases()[:2]):
        small = None
    alone = query.choose(traits, problem.device) if problem.group > 4 or small is None else None
    return [config for config in (alone, small) if config is not None]


# Choice and compilation, without a GPU.


def _on_meta(group=8, kv_heads=2, seq=512, dim=128, w1=512, w2=32, **options) -> Problem:
    def draw(heads):
        return torch.empty(
            2, seq, heads, dim, dtype=torch.bfloat16, device="meta"
        ).transpose(1, 2)  # fmt: skip

    inputs = tuple(draw(h) for h in (group * kv_heads, *[kv_heads] * 4))
    return Problem(inputs, (w1, w2), options, draw(group * kv_heads), None)


def _statistics_on_meta(given: Problem) -> Statistics:
    batch, heads, seq, _ = given.inputs[0].shape
    kv_heads = given.inputs[1].shape[1]
    delta = torch.empty(batch, kv_heads, seq, heads // kv_heads, device="meta")
    huge = torch.empty(batch, kv_heads, dtype=torch.int32, device="meta")
    return Statistics(given.dout, delta, torch.empty_like(delta), huge)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(problems, "device_of", lambda device: HOPPER)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", range(3, 65))
def test_groups_up_to_64_have_tiles_that_fit(hopper, group, dim):
    given = _on_meta(group=group, dim=dim)
    traits = _problem_of(given).traits(given.dout)
    config = query.choose(traits, HOPPER)
    assert config is not None
    assert group <= config.heads < 2 * group
    assert config.shared_bytes(traits, HOPPER) <= HOPPER.shared_limit


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("width", [1, 16, 17, 32, 33, 64, 512])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 31, 64])
def test_small_groups_have_tiles_that_hold_the_narrow_window(hopper, group, width, dim):
    given = _on_meta(group=group, dim=dim)
    traits = _problem_of(given).traits(given.dout)
    config = narrow.choose(traits, HOPPER, width)
    assert config is not None
    assert min(width, 64 if group == 1 else 32) <= config.keys <= max(16, 2 * width)
    assert config.shared_bytes(traits, HOPPER) <= HOPPER.shared_limit
    assert narrow.choose(traits, HOPPER, 513) is None


@pytest.mark.parametrize("reach", [(0, 0), (63, 0), (127, 0), (99, 70), (0, 200), (2**31, 2**31)])
def test_a_wide_window_passes_in_parts(hopper, reach):
    """Every key that a query may see is in one of them."""
    problem = replace(_problem_of(_on_meta(seq=300)), narrow_reach=reach)
    windows = narrow._windows(narrow._reach(problem), 32)
    offsets = [offset for left, right in windows for offset in range(-right, left + 1)]
    assert offsets == list(range(-min(reach[1], 299), min(reach[0], 299) + 1))
    assert all(left + right < 32 for left, right in windows)


@given(st.integers(1, 40_000), st.integers(1, 300), st.sampled_from([1, 78, 132]))
@example(2000, 8, 132)  # 32 tiles to an item were 128 for the program that has most
def test_items_of_small_groups_are_even(tiles, heads, processors):
    """The program with most tiles has little more than its share: a tenth, or two small items."""
    steps, chunks = narrow._division(tiles, heads, processors)
    assert (chunks - 1) * steps < tiles <= chunks * steps
    share = -(-tiles * heads // processors)
    most = -(-heads * chunks // processors) * min(steps, tiles)
    assert most <= share * 1.11 + 2 * narrow._FEWEST_STEPS
    if (tiles, heads, processors) == (2000, 8, 132):
        assert most == 124


@pytest.mark.parametrize("seq", [512, 4096, 32768, 131072])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 31])
def test_parts_of_small_groups_stay_within_their_memory(hopper, group, seq):
    given = _on_meta(group=group, kv_heads=16 if group <= 4 else 4, seq=seq)
    problem = _problem_of(given)
    config = narrow.choose(problem.traits(given.dout), HOPPER, 32)
    assert config is not None
    share = narrow.share_of(problem, config)
    assert share is not None
    batch, kv_heads = share
    some = _on_meta(group=group, kv_heads=kv_heads, seq=seq)
    dq = torch.empty_like(some.inputs[0][:batch])
    few = replace(some, inputs=tuple(t[:batch] for t in some.inputs), dout=some.dout[:batch])
    with recorded(HOPPER):
        parts = narrow.backward_narrow(_problem_of(few), _statistics_on_meta(few), dq, config)
    gradients = 2 * sum(t.numel() for t in given.inputs)
    taken = 4 * (parts.dk.numel() + parts.dv.numel())
    assert taken <= min(LIMIT_BYTES, max(2 * gradients, FLOOR_BYTES))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"block_d": 256, "block_dv": 256},
        {"block_dv": 64},
        {"is_describable": False},
    ],
)
def test_what_is_not_served_is_left_to_others(hopper, change):
    given = _on_meta()
    traits = replace(_problem_of(given).traits(given.dout), **change)
    assert query.choose(traits, HOPPER) is None
    assert narrow.choose(replace(traits, group=1), HOPPER, 32) is None


@pytest.mark.parametrize("name", sorted(set(DEVICES) - {"sm_90"}))
def test_no_other_device_is_served(hopper, name):
    given = _on_meta()
    traits = _problem_of(given).traits(given.dout)
    assert query.choose(traits, DEVICES[name]) is None
    assert narrow.choose(replace(traits, group=1), DEVICES[name], 32) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("given", "spills"),
    [
        ({"group": 64}, [160, 900]),
        # `query` in masked tiles, and once a turn; `narrow` where rows are added to a part, once a
        # step.
        ({"group": 8}, [480, 900]),
        # In the register table too, which test_registers.py holds to be of these sources.
        pytest.param({"group": 8, "form": "strassen"}, [640, 900], marks=pytest.mark.long),
        pytest.param({"group": 8, "form": "determinant"}, [300, 900], marks=pytest.mark.long),
        ({"group": 1}, [2000]),
        ({"group": 4}, [900]),
    ],
    ids=str,
)
def test_compiles_for_sm_90_with_few_spills(hopper, given, spills):
    problem = _on_meta(**given)
    kernel_problem, statistics = _problem_of(problem), _statistics_on_meta(problem)
    dq = torch.empty_like(problem.inputs[0])
    configs = _choices(kernel_problem, statistics)
    for config, most in zip(configs, spills, strict=True):
        with recorded(HOPPER) as launches:
            if isinstance(config, query.Config):
                query.backward_query(kernel_problem, statistics, dq, config)
            else:
                narrow.backward_narrow(kernel_problem, statistics, dq, config)
        usage = usage_of(launches[0], device_of("sm_90"))
        bound = config.shared_bytes(kernel_problem.traits(statistics.dout), HOPPER)
        assert usage.shared <= bound
        assert usage.spills <= most


# Answers, on a Hopper GPU.

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]


def _statistics_of(given: Problem, problem: KernelProblem) -> Statistics:
    out, lse = torch.ops.simplex.attn(*given.inputs, *given.windows, **given.options)
    return statistics_of(problem, given.dout, given.dlse, out, lse)


def _run(given: Problem) -> list[dict[str, torch.Tensor]]:
    """Return the query side's gradients by each of the kernels that serve a problem."""
    problem = _problem_of(given)
    statistics = _statistics_of(given, problem)
    found = []
    for config in _choices(problem, statistics):
        dq = torch.full_like(given.inputs[0], torch.nan)
        got = {"dq": dq}
        if isinstance(config, query.Config):
            with gradients_of(problem, dq) as (place,):
                query.backward_query(ordered(problem), statistics, place, config)
        else:
            names = ("dk1", "dv1") if problem.is_exchanged else ("dk2", "dv2")
            got |= {
                name: torch.full_like(tensor, torch.nan)
                for name, tensor in zip(names, (problem.k_narrow, problem.v_narrow), strict=True)
            }
            dk, dv = (got[name] for name in names)
            with gradients_of(problem, dq, dk) as (dq_place, dk_place):
                narrow.write_query_and_narrow(
                    ordered(problem), statistics, (dq_place, dk_place, dv), config
                )
        found.append(got)
    assert found, "no kernel here serves this problem"
    return found


def _run_portable(given: Problem) -> torch.Tensor:
    """Return dq by the portable kernels."""
    problem = _problem_of(given)
    dq = torch.full_like(given.inputs[0], torch.nan)
    statistics = _statistics_of(given, problem)
    portable_backward.write_gradients(problem, statistics, dq, (None, None), (None, None))
    return dq


def _assert_right(case: Case | Problem) -> None:
    """Hold the gradients to their budget against float64, and two runs to the same bits."""
    given = Problem.of(case, "cuda") if isinstance(case, Case) else case
    for got, again in zip(_run(given), _run(given), strict=True):
        exact, rounded = judge(replace(given, grad_mask=tuple(f"d{n}" in got for n in INPUTS)))
        for name, value in got.items():
            assert torch.equal(value, again[name]), f"{name}: other bits in a second run"
            assert_within_budget(name, value, exact[name], rounded[name])


def _case(**given) -> Case:
    plain = {"head_dim": 128, "dtype": torch.bfloat16, "layout": "transposed", "through": "both"}
    return Case(**plain | given)


CASES = {
    "64 heads": _case(group=64, seq=90, w1=64, w2=12),
    "64 heads, two groups of tiles": _case(group=64, seq=9, keys1=390, keys2=390, w1=370, w2=9),
    "64 heads, one offset": _case(group=64, seq=70, w1=40, w2=1),
    "64 heads, both ways": _case(group=64, seq=80, w1=50, w2=7, is_causal=False),
    "64 heads, wide second": _case(group=64, seq=80, w1=8, w2=70),
    "64 heads, bounds": _case(group=64, batch=2, seq=70, w1=60, w2=7, bounds="ranges"),
    "32 heads": _case(group=32, seq=100, w1=80, w2=15),
    "12 heads": _case(kv_heads=2, group=12, seq=100, w1=80, w2=15),
    "8 heads, a tail": _case(kv_heads=2, group=8, seq=50, keys1=220, keys2=220, w1=123, w2=12),
    "8 heads, 4 tiles in 3 slots": _case(group=8, seq=10, keys1=260, keys2=100, w1=190, w2=12),
    "8 heads, 7 tiles in 3 slots": _case(group=8, seq=10, keys1=460, keys2=460, w1=430, w2=3),
    "8 heads, one offset": _case(group=8, seq=70, w1=40, w2=1),
    "8 heads, an odd number of offsets": _case(kv_heads=2, group=8, seq=60, w1=50, w2=5),
    "64 heads, bounds, odd": _case(group=64, batch=2, seq=40, w1=30, w2=5, bounds="wild"),
    "8 heads, both ways": _case(group=8, seq=120, w1=50, w2=7, is_causal=False),
    "8 heads, more queries than keys": _case(group=8, seq=100, keys1=40, keys2=60, w1=30, w2=12),
    "8 heads, placed": _case(batch=3, group=8, seq=60, keys1=90, keys2=90, w1=40, starts="random"),
    "8 heads, documents": _case(batch=2, group=8, seq=110, w1=80, w2=7, bounds="documents"),
    "8 heads, wild": _case(batch=2, group=8, seq=110, w1=80, bounds="wild", starts="random"),
    "8 heads, biased": _case(group=8, seq=100, w1=64, w2=8, k2_bias=1.0, v2_bias=-0.5),
    "8 heads, biased wide": _case(group=8, seq=100, w1=8, w2=80, k2_bias=0.5, v2_bias=1.0),
    "8 heads, strassen": _case(group=8, seq=100, w1=80, w2=8, form="strassen", k2_bias=0.5),
    "8 heads, determinant": _case(group=8, seq=100, w1=80, w2=8, form="determinant"),
    "8 heads, determinant, wide second": _case(
        kv_heads=2, group=8, seq=90, w1=8, w2=80, form="determinant", k2_bias=0.5, v2_bias=1.0
    ),
    "8 heads, determinant, biased": _case(
        group=8, seq=90, w1=70, w2=9, form="determinant", k2_bias=1.0, v2_bias=-0.5
    ),
    "5 heads, determinant, 80 columns": _case(
        kv_heads=2, group=5, seq=90, head_dim=80, value_dim=96, w1=64, w2=8, form="determinant"
    ),
    "64 heads, determinant": _case(
        group=64, batch=2, seq=70, w1=60, w2=7, bounds="ranges", form="determinant"
    ),
    "8 heads, 64 columns": _case(group=8, seq=131, head_dim=64, w1=130, w2=9),
    "8 heads, 96 and 80 columns": _case(group=8, seq=90, head_dim=96, value_dim=80, w1=64, w2=8),
    "5 heads": _case(kv_heads=3, group=5, seq=100, w1=80, w2=15, layout="fused"),
    "4 heads": _case(kv_heads=2, group=4, seq=150, w1=100, w2=16, layout="contiguous"),
    "3 heads": _case(kv_heads=2, group=3, seq=150, w1=100, w2=16),
    "3 heads, 80 and 96 columns": _case(
        batch=2, kv_heads=2, group=3, seq=100, head_dim=80, value_dim=96, w1=70, w2=20
    ),
    "3 heads, wild, placed": _case(
        batch=2, group=3, seq=110, w1=80, w2=30, bounds="wild", starts="random"
    ),
    "3 heads, 40 keys": _case(kv_heads=2, group=3, seq=90, w1=70, w2=40),
    "8 heads, 60 keys": _case(group=8, seq=90, w1=70, w2=60),
    "8 heads, 80 keys": _case(group=8, seq=90, w1=90, w2=80),
    "8 heads, 150 keys, bounds, biased": _case(
        batch=2, kv_heads=2, group=8, seq=190, w1=160, w2=150, bounds="ranges", k2_bias=0.5
    ),
    "2 heads, both ways, 199 keys, placed": _case(
        batch=2, group=2, seq=110, w1=120, w2=100, is_causal=False, starts="random"
    ),
    "1 head, no window": _case(group=1, seq=100, w1=None, w2=None),
    "1 head, strassen": _case(kv_heads=2, group=1, seq=103, w1=77, w2=14, form="strassen"),
    "1 head, determinant, biased": _case(
        group=1, seq=103, w1=77, w2=20, form="determinant", k2_bias=0.5, v2_bias=1.0
    ),
    "4 heads, strassen, biased": _case(
        group=4, seq=90, w1=70, w2=20, form="strassen", k2_bias=0.5, v2_bias=1.0
    ),
    "2 heads, determinant, 64 keys": _case(group=2, seq=90, w1=70, w2=60, form="determinant"),
    "31 heads": _case(batch=2, group=31, seq=90, w1=60, w2=20, bounds="ranges"),
    "24 heads, wild, placed": _case(
        batch=2, group=24, seq=70, w1=60, w2=14, bounds="wild", starts="random"
    ),
    "20 heads, both ways, biased": _case(
        kv_heads=2, group=20, seq=80, w1=40, w2=9, is_causal=False, k2_bias=0.5, v2_bias=1.0
    ),
    "16 heads, 64 columns, wide second": _case(group=16, seq=99, head_dim=64, w1=30, w2=90),
    "4 heads, 32 keys": _case(kv_heads=2, group=4, seq=150, w1=100, w2=32, layout="fused"),
    "4 heads, documents": _case(batch=2, group=4, seq=110, w1=80, w2=27, bounds="documents"),
    "4 heads, biased": _case(group=4, seq=80, w1=64, w2=8, k2_bias=1.0, v2_bias=-0.5),
    "4 heads, 64 columns": _case(group=4, seq=81, head_dim=64, w1=70, w2=30, is_causal=False),
    "2 heads": _case(kv_heads=2, group=2, seq=190, w1=150, w2=32),
    "2 heads, both ways, biased": _case(
        group=2, seq=150, w1=70, w2=9, is_causal=False, k2_bias=0.5, v2_bias=1.0
    ),
    "2 heads, 33 keys": _case(group=2, seq=131, w1=90, w2=33),
    "2 heads, documents": _case(
        batch=2, kv_heads=2, group=2, seq=150, w1=80, w2=16, bounds="documents"
    ),
    "2 heads, 64 columns": _case(group=2, seq=151, head_dim=64, w1=130, w2=20, layout="fused"),
    "1 head": _case(kv_heads=2, group=1, seq=203, w1=150, w2=32),
    "1 head, 16 keys": _case(kv_heads=2, group=1, seq=203, w1=77, w2=14),
    "1 head, 64 keys": _case(kv_heads=2, group=1, seq=130, w1=100, w2=60),
    "1 head, both ways": _case(batch=2, group=1, seq=150, w1=50, w2=14, is_causal=False),
    "1 head, wide second": _case(batch=2, group=1, seq=103, w1=20, w2=50),
    "1 head, cache": _case(batch=2, group=1, seq=10, keys1=240, keys2=100, w1=190, w2=22),
    "1 head, wild": _case(batch=2, group=1, seq=130, w1=80, w2=30, bounds="wild", starts="random"),
    "1 head, placed": _case(batch=3, group=1, seq=130, w1=90, w2=30, starts="random"),
    "1 head, more queries than keys": _case(group=1, seq=99, keys1=40, keys2=60, w1=30, w2=12),
    "1 head, 96 and 80 columns": _case(group=1, seq=90, head_dim=96, value_dim=80, w1=64, w2=8),
    "1 head, 64 columns": _case(kv_heads=3, group=1, seq=201, head_dim=64, w1=170, w2=32),
    "1 head, biased": _case(group=1, seq=100, w1=50, w2=32, k2_bias=1.0, v2_bias=-0.5),
}


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("name", CASES)
    def test_within_the_budget(self, name):
        _assert_right(CASES[name])

    @pytest.mark.parametrize("amplitude", [0.0, 30.0, 1000.0, 1e9])
    @pytest.mark.parametrize("group", [1, 8, 64])
    def test_any_score_scale(self, group, amplitude):
        """1e9 takes lse past where P must be capped at 1."""
        _assert_right(_case(group=group, seq=60, w1=48, w2=8, amplitude=amplitude))

    @pytest.mark.parametrize("group", [1, 8, 64])
    def test_what_a_query_cannot_see_does_not_matter(self, group):
        given = Problem.of(_case(group=group, seq=80, w1=40, w2=8), "cuda")
        loud = [t.clone() for t in given.inputs]
        for t in loud[1:]:
            t[:, :, 53:] *= 1e18
        runs = zip(_run(given), _run(replace(given, inputs=tuple(loud))), strict=True)
        for one, other in ((a["dq"][:, :, :53], b["dq"][:, :, :53]) for a, b in runs):
            # Not bit for bit: what else is in a tile decides how its exponents are rounded.
            assert (one - other).float().norm() <= 4e-3 * one.float().norm()

    @pytest.mark.parametrize("share", [(2, 2), (1, 2), (1, 1)])
    def test_heads_may_take_turns(self, share, monkeypatch):
        monkeypatch.setattr(narrow, "share_of", lambda problem, config: share)
        case = _case(batch=2, kv_heads=2, group=2, seq=110, w1=90, w2=20)
        assert_matches_reference(case, torch.ops.simplex.attn, device="cuda")

    @pytest.mark.parametrize("group", [8, 64])
    def test_as_the_portable_kernels(self, group):
        """Whole windows, more items than programs: too large for float64."""
        given = Problem.of(_case(batch=2, kv_heads=2, group=group, seq=700, w1=512, w2=32), "cuda")
        theirs = _run_portable(given).double()
        for got in _run(given):
            assert (got["dq"].double() - theirs).norm() <= 1e-3 * theirs.norm()

    @given(
        case=cases(
            dtypes=(torch.bfloat16,), max_seq=150, max_heads=64, max_head_dim=128, max_batch=2,
            max_work=20_000_000,
        ),
        group=st.sampled_from((3, 8, 64)),
        dims=st.sampled_from(((128, 128), (64, 64), (80, 96))),
    )  # fmt: skip
    @settings(max_examples=12)
    def test_any_case(self, case, group, dims):
        """Few constants are drawn: a kernel of new ones takes seconds to compile."""
        drawn = replace(
            case, group=group, kv_heads=min(case.kv_heads, 2), head_dim=dims[0], value_dim=dims[1]
        )
        given = Problem.of(drawn, "cuda")
        if any(t.numel() == 0 for t in given.inputs) or given.dout is None:
            return
        problem = _problem_of(given)
        if _choices(problem, _statistics_of(given, problem)):
            _assert_right(given)
