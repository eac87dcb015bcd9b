"""The key-value gradients on Hopper: when they are chosen, what they compile to, what they give."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from csrc_free.attn import portable_alone
from csrc_free.hopper import backward, backward_keys, key_plan
from csrc_free.hopper.key_plan import KEYS, Plan, plan_of
from csrc_free.problem import problem_of
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import LIMIT_BYTES
from csrc_free.traits import DEVICES
from simplex_ops.contract.windows import reach
from simplex_ops.testing import Case, assert_matches_reference, cases
from tools.compiled.launches import recorded
from tools.compiled.registers import usage_of
from tools.workloads import Workload, meta_inputs

attn = torch.ops.simplex.attn
HOPPER = DEVICES["sm_90"]
GROUP8 = Workload("group8", 4, 64, 8, 2048, 128, 512, 32)


def _problem(workload, device=HOPPER):
    inputs = meta_inputs(workload)
    reach1, reach2 = (reach(w, workload.is_causal) for w in (workload.w1, workload.w2))
    with mock.patch("csrc_free.problem.device_of", return_value=device):
        problem = problem_of(
            *inputs.problem, reach1, reach2, 1.0, workload.form, 0.0, 0.0, None, None
        )  # fmt: skip
    return problem, inputs.dout


def _plan(workload, device=HOPPER):
    return plan_of(*_problem(workload, device))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "for bfloat16 and float16, got torch.float32"),
        (
            {"dtype": torch.float16, "form": "strassen"},
            "in float16 for the trilinear form alone, got strassen",
        ),
        ({"heads": 16}, "for 3 to 64 query heads of a key-value head, got 2"),
        ({"heads": 1024}, "for 3 to 64 query heads of a key-value head, got 128"),
        ({"value_dim": 256}, "for head_dim from 33 to 128, got 128 and 256"),
        ({"head_dim": 100, "value_dim": 128}, "q: strides"),
        ({"w2": 4}, "for 64 rows or more that see a narrow key, got 32"),
        ({"w1": 2048, "w2": 2048, "seq": 2**17, "batch": 1}, "more memory than they may"),
    ],
)
def test_what_is_not_served_is_said(change, reason):
    assert reason in str(_plan(dataclasses.replace(GROUP8, **change)))


def test_a_narrow_window_without_a_bound_has_as_many_rows_as_there_are_keys():
    few = dataclasses.replace(GROUP8, heads=8, seq=50, w1=None, w2=None)
    assert backward.choose(*_problem(few)).served_by == "hopper (wide, narrow)"
    long = dataclasses.replace(few, seq=1000)
    assert "a narrow window of up to 512 keys" in backward.choose(*_problem(long)).reasons["query"]


def test_another_device_is_not_served():
    assert _plan(GROUP8, DEVICES["sm_100"]) == "compiled for sm_90 alone, and the device is sm_100"


def test_an_expanded_dout_is_not_served():
    problem, dout = _problem(GROUP8)
    assert "dout: strides" in str(plan_of(problem, dout[:1].expand(4, -1, -1, -1)))


def test_both_halves_say_why_they_do_not_run():
    choice = backward.choose(*_problem(dataclasses.replace(GROUP8, head_dim=256)))
    assert set(choice.reasons) == {"keys", "wide", "query"}
    assert backward.choose(*_problem(dataclasses.replace(GROUP8, heads=512))).reasons == {}


def test_a_slower_kernel_is_not_chosen():
    """The dq of 4 heads, where a bias of the wide pair leaves it to others."""
    some = dataclasses.replace(GROUP8, heads=32, w1=32, w2=512)
    problem, dout = _problem(some)
    problem = dataclasses.replace(problem, k2_bias=1.0)
    assert "the portable kernel is faster" in backward.choose(problem, dout).reasons["query"]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16, 31, 32, 64])
@pytest.mark.parametrize(
    ("form", "dtype"), [
        ("trilinear", torch.bfloat16), ("trilinear", torch.float16),
        ("strassen", torch.bfloat16), ("determinant", torch.bfloat16),
    ],
)  # fmt: skip
def test_pairs_are_weighed_as_the_forward_did(group, form, dtype):
    """As the portable kernels do, but of 32 heads and more in the trilinear form."""
    some = dataclasses.replace(GROUP8, batch=1, heads=8 * group, form=form, dtype=dtype)
    for change in ({}, {"w2": 64}, {"w1": 128, "w2": 128}, {"seq": 300}):
        choice = backward.choose(*_problem(dataclasses.replace(some, **change)))
        if form == "trilinear" and group >= 32:
            assert isinstance(choice.keys, Plan)
        else:
            assert choice.served_by == "hopper (wide, narrow)"


@pytest.mark.parametrize("group", [2, 8, 64])
def test_other_forms_of_float16_are_left_to_the_portable_kernels(group):
    some = dataclasses.replace(GROUP8, heads=8 * group, dtype=torch.float16, form="strassen")
    choice = backward.choose(*_problem(some))
    assert set(choice.reasons.values()) == {"in float16 for the trilinear form alone, got strassen"}


def test_few_tiles_are_shared():
    def splits(**change):
        return backward.choose(*_problem(dataclasses.replace(GROUP8, **change))).wide

    assert splits() == 1
    assert splits(batch=1) == 1  # 128 tiles
    assert splits(batch=1, seq=1024) == 2
    assert splits(batch=1, seq=300) == 4
    assert splits(batch=1, kv_heads=1, heads=8, seq=128) == 8


@pytest.mark.parametrize("seq", [4096, 32768, 131072])
@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 1), (64, 8), (32, 8), (8, 2)])
@pytest.mark.parametrize(("w1", "w2"), [(512, 32), (128, 128)])
def test_private_sums_stay_within_their_memory(seq, heads, kv_heads, w1, w2):
    batch = 131072 // seq
    workload = Workload("x", batch, heads, kv_heads, seq, 128, w1, w2)
    plan = _plan(workload)
    assert isinstance(plan, Plan)
    parts = -(-seq // (plan.keys * plan.tiles))
    slots = plan.keys * plan.tiles + w1 - 1 + w2 - 1
    some = plan.batch * plan.kv_heads
    taken = 4 * 256 * some * (parts * slots + (seq * (plan.splits + 1) if plan.splits > 1 else 0))
    taken += 8 * batch * heads * seq  # delta and lse2
    gradients = 2 * 128 * batch * seq * (heads + 4 * kv_heads)
    assert taken <= min(LIMIT_BYTES, max(2 * gradients, key_plan.FLOOR_BYTES))


@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(32, 3000), st.integers(32, 600),
    st.sampled_from([4, 8, 64]),
)  # fmt: skip
def test_a_division_uses_the_device(batch, kv_heads, seq, w1, group):
    """Never slower than one program for each tile, by its own count of work."""
    plan = _plan(Workload("x", batch, group * kv_heads, kv_heads, seq, 128, w1, 32))
    assert isinstance(plan, Plan)
    tiles = -(-seq // KEYS)
    weights = [min(tile * KEYS + KEYS + w1 - 1, seq) - tile * KEYS for tile in range(tiles)]
    launches = -(-batch // plan.batch) * -(-kv_heads // plan.kv_heads)
    processors = HOPPER.multiprocessors
    one_each = key_plan._time(weights, batch * kv_heads, 1, 1, processors)
    some = plan.batch * plan.kv_heads
    chosen = launches * key_plan._time(weights, some, plan.tiles, plan.splits, processors)
    slots = KEYS + w1 + 31
    if 4 * 256 * batch * kv_heads * tiles * slots <= key_plan.FLOOR_BYTES:
        assert chosen <= one_each * 1.001


@given(
    st.integers(1, 2), st.integers(1, 4), st.integers(32, 9000), st.integers(1, 3000),
    st.sampled_from([16, 128]), st.sampled_from([4, 64]),
)  # fmt: skip
@example(1, 1, 4096, 2048, 32, 8)
def test_nobody_else_adds_to_a_part_of_several_tiles(batch, kv_heads, seq, w1, w2, group):
    """Programs that share a tile divide its narrow keys otherwise than the next one's."""
    plan = _plan(Workload("x", batch, group * kv_heads, kv_heads, seq, 128, w1, w2))
    assert isinstance(plan, str) or plan.tiles == 1 or plan.splits == 1


@pytest.mark.parametrize(
    ("group", "w1", "w2", "keys"), [
        (64, 512, 32, 64), (64, 1024, 32, 64), (64, 128, 128, 16), (64, 256, 64, 16),
        (64, 128, 32, 64), (40, 128, 128, 16), (8, 128, 128, 16), (8, 2048, 128, 64),
        (4, 64, 49, 16), (4, 512, 64, 64),
    ],
)  # fmt: skip
def test_fewer_wide_keys_are_a_tile_where_many_rows_see_only_some(group, w1, w2, keys):
    plan = _plan(dataclasses.replace(GROUP8, batch=1, heads=8 * group, w1=w1, w2=w2))
    assert isinstance(plan, Plan)
    assert plan.keys == keys


def test_a_device_of_fewer_multiprocessors_is_filled_by_fewer_programs():
    """Programs that share a tile are for devices that would be idle without."""
    small = dataclasses.replace(GROUP8, batch=1, heads=16, kv_heads=2)
    few, many = (_plan(small, dataclasses.replace(HOPPER, multiprocessors=n)) for n in (1, 132))
    assert isinstance(few, Plan)
    assert isinstance(many, Plan)
    assert few.splits < many.splits


# The register table holds these too, and test_registers.py that it was compiled from these sources.
IN_THE_TABLE = functools.partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "most_spills"), [
        (GROUP8, 450),
        (dataclasses.replace(GROUP8, heads=64, kv_heads=1), 450),
        (dataclasses.replace(GROUP8, heads=64, kv_heads=1, w1=128, w2=128), 480),
        (dataclasses.replace(GROUP8, heads=64, kv_heads=1, head_dim=64), 120),
        IN_THE_TABLE(dataclasses.replace(GROUP8, form="strassen"), 450),
        IN_THE_TABLE(dataclasses.replace(GROUP8, form="determinant"), 450),
    ], ids=[
        "group 8, D 128", "group 64, D 128", "16 wide keys", "group 64, D 64", "strassen",
        "determinant",
    ],
)  # fmt: skip
def test_it_compiles_for_hopper_and_spills_little(workload, most_spills):
    """Spill stores of the whole kernel: what stands in its inner loop is next to nothing."""
    with recorded(HOPPER) as launches:
        problem, dout = _problem(workload)
        shape = (problem.q.shape[0], workload.kv_heads, workload.seq, problem.group)
        given = Statistics(
            dout, torch.empty(shape, device="meta"), torch.empty(shape, device="meta"),
            torch.empty(shape[:2], dtype=torch.int32, device="meta"),
        )  # fmt: skip
        backward.write_gradients(
            problem, given, backward.Choice(keys=plan_of(problem, dout), wide=None, query=""),
            None, (None, None), (torch.empty_like(problem.k_narrow), None),
        )  # fmt: skip
    names = [launch.kernel.__name__ for launch in launches]
    assert set(names) - {"order_columns_kernel"} == {
        "hopper_backward_keys_kernel", "sum_parts_kernel",
    }  # fmt: skip
    usage = usage_of(launches[names.index("hopper_backward_keys_kernel")], HOPPER)
    assert usage.spills <= most_spills
    assert usage.shared <= HOPPER.shared_limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "dtype"), [
        *((group, torch.bfloat16) for group in (1, 2, 4, 8)),
        (1, torch.float16), IN_THE_TABLE(8, torch.float16),
    ],
)  # fmt: skip
def test_the_kernel_of_small_groups_compiles_and_spills_little(group, dtype):
    with recorded(HOPPER) as launches:
        problem, dout = _problem(dataclasses.replace(GROUP8, heads=8 * group, dtype=dtype))
        shape = (problem.q.shape[0], 8, GROUP8.seq, group)
        given = Statistics(
            dout, torch.empty(shape, device="meta"), torch.empty(shape, device="meta"),
            torch.empty(shape[:2], dtype=torch.int32, device="meta"),
        )  # fmt: skip
        choice = backward.choose(problem, dout)
        assert choice.wide == 1
        wide = torch.empty_like(problem.k_wide), torch.empty_like(problem.v_wide)
        backward.write_gradients(problem, given, choice, None, wide, (None, None))
    launch = launches[-1]
    assert launch.kernel.__name__ == "hopper_backward_wide_kernel"
    usage = usage_of(launch, HOPPER)
    assert usage.spills <= 320
    assert usage.shared <= HOPPER.shared_limit


CASE = Case(
    kv_heads=2, group=8, seq=150, w1=70, w2=12, head_dim=128, dtype=torch.bfloat16,
    grad_mask=(False, True, True, True, True),
)  # fmt: skip


def _change(**fields):
    return dataclasses.replace(CASE, **fields)


# By `keys`, which serves all groups from 3 to 64: of those below 32 what others leave.
CASES = {
    "whole tiles and a tail": CASE,
    "64 heads, a position to a tile": _change(kv_heads=1, group=64, seq=100),
    "4 heads": _change(group=4),
    "5 heads in tiles of 8": _change(group=5, seq=99),
    "12 heads, D 80, Dv 96": _change(group=12, head_dim=80, value_dim=96),
    "D 64": _change(group=16, head_dim=64),
    "D 64, Dv 128": _change(group=16, head_dim=64, value_dim=128),
    "both sides": _change(is_causal=False),
    "the first pair narrow": _change(w1=12, w2=70),
    "windows beyond the sequence": _change(w1=None, w2=2**31 - 1, seq=70),
    "a window of one": _change(w1=70, w2=1),
    "fewer first keys": _change(seq=90, keys1=100, keys2=150),
    "a cache": _change(seq=20, keys1=150, keys2=150),
    "documents": _change(batch=2, bounds="documents"),
    "padding": _change(batch=2, bounds="padding"),
    "a range for each query": _change(batch=2, bounds="ranges"),
    "wild bounds": _change(batch=2, bounds="wild", is_causal=False),
    "starts": _change(batch=2, starts="random"),
    "biases": _change(k2_bias=1.0, v2_bias=-0.5),
    "biases of the wide pair": _change(w1=12, w2=70, k2_bias=1.0, v2_bias=-0.5, bounds="ranges"),
    "transposed": _change(layout="transposed", layout_of_gradients="transposed"),
    "fused": _change(layout="fused"),
    "through lse": _change(through="both"),
    "one gradient": _change(grad_mask=(False, False, False, False, True)),
    "logits of thousands": _change(amplitude=1000.0),
    "strassen": _change(form="strassen"),
    "strassen, 64 heads": _change(form="strassen", kv_heads=1, group=64, seq=100),
    "strassen, 5 heads in tiles of 8": _change(form="strassen", group=5, seq=99),
    "strassen, both sides, a cache": _change(
        form="strassen", is_causal=False, seq=20, keys1=150, keys2=130
    ),
    "strassen, wild bounds, starts": _change(
        form="strassen", batch=2, bounds="wild", starts="random"
    ),
    "strassen, biases": _change(form="strassen", k2_bias=1.0, v2_bias=-0.5),
    "strassen, the first pair narrow, biases": _change(
        form="strassen", w1=12, w2=70, k2_bias=1.0, v2_bias=-0.5
    ),
    "strassen, logits of hundreds": _change(form="strassen", amplitude=30.0),
    "determinant": _change(form="determinant"),
    "determinant, 64 heads": _change(form="determinant", kv_heads=1, group=64, seq=100),
    "determinant, 5 heads in tiles of 8, D 80": _change(
        form="determinant", group=5, seq=99, head_dim=80, value_dim=96
    ),
    "determinant, D 64": _change(form="determinant", group=16, head_dim=64),
    "determinant, D 96, transposed": _change(
        form="determinant", head_dim=96, layout="transposed", layout_of_gradients="transposed"
    ),
    "determinant, the first pair narrow, biases": _change(
        form="determinant", w1=12, w2=70, k2_bias=1.0, v2_bias=-0.5
    ),
    "determinant, biases": _change(form="determinant", k2_bias=1.0, v2_bias=-0.5),
    "determinant, wild bounds, starts": _change(
        form="determinant", batch=2, bounds="wild", starts="random"
    ),
    "determinant, a cache": _change(
        form="determinant", is_causal=False, seq=20, keys1=150, keys2=130
    ),
    "determinant, logits of hundreds": _change(form="determinant", amplitude=30.0),
}


# By `wide` and `narrow`.
SMALL = {
    "1 head": _change(group=1),
    "2 heads": _change(group=2),
    "1 head, D 64": _change(group=1, head_dim=64),
    "1 head, D 40, Dv 48": _change(group=1, head_dim=40, value_dim=48),
    "1 head, both sides": _change(group=1, is_causal=False),
    "1 head, the first pair narrow": _change(group=1, w1=12, w2=70),
    "1 head, a window of one": _change(group=1, w2=1),
    "1 head, no windows": _change(group=1, w1=None, w2=None, seq=90),
    "1 head, fewer first keys": _change(group=1, seq=90, keys1=100, keys2=150),
    "1 head, documents": _change(group=1, batch=2, bounds="documents"),
    "1 head, wild bounds": _change(group=1, batch=2, bounds="wild"),
    "1 head, biases and starts": _change(
        group=1, batch=2, k2_bias=1.0, v2_bias=-0.5, starts="random"
    ),
    "2 heads, fused": _change(group=2, layout="fused"),
    "3 heads, wild bounds": _change(group=3, batch=2, bounds="wild"),
    "4 heads": _change(group=4),
    "4 heads, D 64, both sides": _change(group=4, head_dim=64, is_causal=False),
    "2 heads, logits of thousands": _change(group=2, amplitude=1000.0),
    "5 heads": _change(group=5, seq=99),
    "8 heads": CASE,
    "8 heads, wild bounds, starts": _change(batch=2, bounds="wild", starts="random"),
    "8 heads, no windows": _change(w1=None, w2=None, seq=60),
    "12 heads, documents": _change(
        group=12, batch=2, bounds="documents", head_dim=80, value_dim=96
    ),
    "16 heads, D 64, both sides": _change(group=16, head_dim=64, is_causal=False),
    "31 heads, fused": _change(group=31, layout="fused", seq=80),
    "8 heads, logits of thousands": _change(amplitude=1000.0),
    "64 heads": _change(group=64, kv_heads=1, seq=80),
    "1 head, strassen": _change(group=1, form="strassen"),
    "1 head, determinant, wild bounds": _change(
        group=1, form="determinant", batch=2, bounds="wild", starts="random"
    ),
}
SMALL |= {
    f"{name}, float16": dataclasses.replace(SMALL[name], dtype=torch.float16)
    for name in (
        "1 head",
        "1 head, biases and starts",
        "1 head, wild bounds",
        "1 head, no windows",
        "2 heads, logits of thousands",
        "4 heads, D 64, both sides",
        "5 heads",
        "8 heads",
        "8 heads, wild bounds, starts",
        "12 heads, documents",
        "31 heads, fused",
        "64 heads",
    )
} | {
    name: case
    for name, case in CASES.items()
    if case.form != "trilinear" and "first pair narrow" not in name  # a bias of the wide pair
}


@pytest.fixture
def used(monkeypatch):
    """Note which kernels ran."""
    noted = []

    def note(name):
        inner = getattr(backward, name)

        def noting(*args):
            noted.append(name)
            inner(*args)

        monkeypatch.setattr(backward, name, noting)

    monkeypatch.setattr(key_plan, "FEWEST_ROWS", 0)
    note("backward_keys")
    note("backward_wide")
    return noted


def _choosing(change, monkeypatch):
    """Let a function change the choice."""
    inner = backward.choose
    monkeypatch.setattr(backward, "choose", lambda *args: change(inner(*args), *args))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_within_the_budget(name, used, monkeypatch, poisoned_memory):
    _choosing(lambda choice, *given: dataclasses.replace(choice, keys=plan_of(*given)), monkeypatch)
    assert_matches_reference(CASES[name], attn, device="cuda")
    assert used


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_small_groups_are_within_the_budget(name, splits, used, monkeypatch, poisoned_memory):
    """However few tiles there are, whole and shared."""
    _choosing(
        lambda choice, *_: dataclasses.replace(choice, keys="not here", wide=splits), monkeypatch
    )
    assert_matches_reference(SMALL[name], attn, device="cuda")
    assert used == ["backward_wide"]


@pytest.mark.gpu
@settings(max_examples=30)
@given(
    cases(
        dtypes=(torch.bfloat16,), forms=("trilinear",), max_heads=1, max_seq=150,
        max_work=40_000_000,
    )
)  # fmt: skip
def test_drawn_problems_are_within_the_budget(case):
    """Of 8 heads to one and D = 64, whose constants are few."""
    assert_matches_reference(
        dataclasses.replace(case, group=8, head_dim=64, value_dim=None), attn, device="cuda"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [(1, 1), (1, 3), (2, 1), (3, 1)])
@pytest.mark.parametrize("at_once", [(2, 2), (1, 1)])
def test_every_division_gives_the_answer(plan, at_once, monkeypatch, used):
    """Tiles that share a part, programs that share a tile, and several launches."""
    plan = Plan(KEYS, *plan, *at_once)
    _choosing(lambda choice, *_: dataclasses.replace(choice, keys=plan), monkeypatch)
    assert_matches_reference(_change(batch=2, seq=200), attn, device="cuda")
    assert len(used) == 4 // (at_once[0] * at_once[1])


OF_SEVERAL_NARROW_KEYS = (
    "whole tiles and a tail",
    "64 heads, a position to a tile",
    "D 64, Dv 128",
    "both sides",
    "the first pair narrow",
    "windows beyond the sequence",
    "a window of one",
    "fewer first keys",
    "a cache",
    "wild bounds",
    "starts",
    "biases of the wide pair",
    "strassen, wild bounds, starts",
    "determinant, the first pair narrow, biases",
)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OF_SEVERAL_NARROW_KEYS)
@pytest.mark.parametrize("keys", [16, 32])
def test_several_narrow_keys_may_share_a_product(name, keys, used, monkeypatch, poisoned_memory):
    """Whatever would be chosen, and where a part is of several tiles too."""
    monkeypatch.setattr(backward, "plan_of", _with(backward.plan_of, keys=keys, tiles=2, splits=1))
    assert_matches_reference(CASES[name], attn, device="cuda")
    assert used


def _with(plan_of, **changes):
    def changed(problem, dout):
        plan = plan_of(problem, dout)
        assert isinstance(plan, Plan)
        return dataclasses.replace(plan, **changes)

    return changed


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", ["none", "ranges"])
@pytest.mark.parametrize(("group", "lag"), [(8, 1), (8, 2), (8, 4), (64, 2), (64, 16)])
def test_the_second_warpgroup_may_be_any_way_behind(group, lag, bounds, monkeypatch, used):
    """So far behind, too, that some tiles of rows are of neither's key."""
    monkeypatch.setattr(backward_keys, "lag_of", lambda problem: lag)
    assert_matches_reference(
        _change(kv_heads=1, group=group, batch=2, seq=110, bounds=bounds), attn, device="cuda"
    )
    assert used


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 2, 3, 8, 64])
def test_gradients_repeat_bit_for_bit(group, dtype, used):
    kv_heads = 12 if group < 3 else 2
    inputs = [
        torch.randn(2, 700, heads, 128, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (kv_heads * group, *[kv_heads] * 4)
    ]
    out, _lse = attn(*inputs, 300, 20)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        assert all(map(torch.equal, first, again))
    assert used


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "kernel"), [(8, "backward_wide"), (64, "backward_keys")])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_extreme_scores_agree_with_the_portable_kernels(size, group, kernel, used):
    """Up to logits of 1e9, where lse is capped; never NaN."""
    inputs = [
        (torch.randn(1, heads, 300, 128, device="cuda") * (size if heads > 1 else 1.0))
        .to(torch.bfloat16)
        .requires_grad_()
        for heads in (group, 1, 1, 1, 1)
    ]
    out, _lse = attn(*inputs, 100, 20)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    assert used == [kernel]
    with portable_alone():
        expected = torch.autograd.grad(out, inputs, dout)
    for one, other in zip(got, expected, strict=True):
        assert torch.isfinite(one).all()
        if size <= 1e3:
            assert (one - other).float().norm() <= 1e-2 * other.float().norm()


@pytest.mark.gpu
def test_a_nan_stays_in_its_head(used):
    inputs = [
        torch.randn(2, heads, 200, 128, device="cuda", dtype=torch.bfloat16)
        for heads in (16, 2, 2, 2, 2)
    ]
    for t in inputs[1:]:
        t[0, 0, 100] = torch.nan
    leaves = [t.requires_grad_() for t in inputs]
    out, _lse = attn(*leaves, 60, 10)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out).contiguous())
    for grad in grads[1:]:
        assert torch.isfinite(grad[0, 1]).all()
        assert torch.isfinite(grad[1]).all()
    assert used
