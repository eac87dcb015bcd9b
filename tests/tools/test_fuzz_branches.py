"""Fuzzing the Hopper kernels, on the host: what is drawn, what it compiles to, what is counted."""

import json
from unittest import mock

import hypothesis
import pytest
import torch
import typer

pytest.importorskip("triton.experimental.gluon")

from csrc_free import problem as problems
from csrc_free.hopper import backward, serve
from csrc_free.traits import DEVICES
from simplex_ops.contract.checks import FORMS
from simplex_ops.devices import gpu
from simplex_ops.testing import Case, Problem
from tools.compiled.fingerprint import fingerprint
from tools.compiled.launches import recorded
from tools.fuzz import __main__ as fuzz
from tools.fuzz import hopper
from tools.fuzz.branches import BRANCHES
from tools.fuzz.families import FAMILIES, LAYOUTS, any_constants, member

MOST_COMPILATIONS = 70
BF16 = {"dtype": torch.bfloat16, "head_dim": 128}
FORWARD = {"grad_mask": (False,) * 5}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    monkeypatch.setattr(problems, "device_of", lambda device: DEVICES["sm_90"])
    monkeypatch.setattr(serve, "USEFUL_FROM", dict.fromkeys(serve.USEFUL_FROM, 0.0))
    for choice in ("plan_of", "splits_of_wide"):
        monkeypatch.setattr(backward, choice, hopper.of_one_processor(getattr(backward, choice)))


def taken(case: Case, change=None) -> set[str]:
    problem = Problem.of(case)
    if change is not None:
        change(*problem.inputs)
    return set(hopper.branches_of(problem))


def drawn(strategy, examples: int) -> list[Case]:
    found = []

    @hypothesis.seed(1)
    @hypothesis.settings(max_examples=examples, phases=(hypothesis.Phase.generate,))
    @hypothesis.given(strategy)
    def loop(case):
        found.append(case)

    loop()
    return found


def programs(case: Case) -> set[str]:
    problem = Problem.of(case)
    with (
        recorded(DEVICES["sm_90"]) as noted,
        mock.patch.object(gpu, "unserved", return_value=None),
    ):
        out, lse = gpu.attn(*problem.inputs, *problem.windows, **problem.options)
        if any(case.grad_mask):
            gpu.attn_backward(
                problem.dout, problem.dlse, *problem.inputs, out, lse, *problem.windows,
                **problem.options, grad_mask=list(case.grad_mask),
            )  # fmt: skip
    return {fingerprint(launch) for launch in noted}


def test_families_are_served_and_compile_to_few_programs():
    compiled = set()
    for family in FAMILIES:
        for case in drawn(member(family), 3):
            found = taken(case)
            assert "forward: hopper" in found, family
            assert not any(said.startswith("backward: portable") for said in found), family
            compiled |= programs(case)
    assert len(compiled) <= MOST_COMPILATIONS
    assert compiled <= set().union(*(programs(case) for case in hopper.first_cases()))


def test_constants_are_drawn_over_what_is_served():
    found = drawn(any_constants(40_000), 60)
    assert len({case.group for case in found}) > 5
    assert len({(case.head_dim, case.value_dim) for case in found}) > 5
    assert {case.form for case in found} >= {"trilinear", "strassen"}
    served = ["forward: hopper" in taken(case) for case in found]
    assert sum(served) > len(served) / 6


# One query of 64 heads: 64 wide keys are a tile, and groups of up to four of them stay.
ONE = {"group": 64, "seq": 1, **BF16, **FORWARD}
# Eight heads: a tile is eight positions.
EIGHT = {"group": 8, "seq": 8, **BF16, **FORWARD}


@pytest.mark.parametrize(
    ("given", "named", "absent"),
    [
        ({**ONE, "keys1": 80, "keys2": 8, "w1": 64, "w2": 4}, ["whole tile"], ["masked tile"]),
        ({**ONE, "keys1": 80, "keys2": 8, "w1": 63, "w2": 4}, ["masked tile"], ["whole tile"]),
        ({**ONE, "keys1": 600, "w1": 512, "keys2": 8, "w2": 4},
         ["whole tile", "several groups of tiles"], ["masked tile"]),
        ({**ONE, "keys1": 80, "keys2": 40, "w1": 64, "w2": 33},
         ["several chunks of narrow keys", "a narrow key of one warpgroup alone"], []),
        ({**ONE, "keys1": 80, "keys2": 40, "w1": 64, "w2": 32}, [],
         ["several chunks of narrow keys", "a narrow key of one warpgroup alone"]),
        ({**ONE, "seq": 9, "keys1": 64, "keys2": 8, "w1": 64, "w2": 4}, ["empty row"], []),
        ({**ONE, "seq": 5, "keys1": 64, "keys2": 8, "w1": 64, "w2": 4}, [], ["empty row"]),
        # Eight positions see 71 keys: a tile of 64 and a tail, or two tiles.
        ({**EIGHT, "keys1": 100, "keys2": 50, "w1": 64, "w2": 8}, ["tail"],
         ["empty tile", "several groups of tiles", "masked tile amid a group", "hidden offset"]),
        ({**EIGHT, "keys1": 100, "keys2": 12, "w1": 64, "w2": 8}, ["hidden offset"], []),
        ({**EIGHT, "keys1": 100, "keys2": 50, "w1": 80, "w2": 8}, ["masked tile"], ["tail"]),
        ({**EIGHT, "keys1": 500, "keys2": 50, "w1": 380, "w2": 8},
         ["tail", "several groups of tiles", "whole tile"], []),
        ({**EIGHT, "seq": 24, "keys1": 100, "keys2": 8, "w1": 70, "w2": 4},
         ["empty tile", "empty row"], []),
        # A query that sees all keys, and one that sees few of them, in the middle tile of three.
        ({**EIGHT, "keys1": 190, "keys2": 50, "w1": 190, "w2": 8, "bounds": "ranges"},
         ["masked tile amid a group"], []),
    ],
    ids=str,
)  # fmt: skip
def test_a_branch_is_named_where_it_is_taken(given, named, absent):
    kernel = "heads" if given["group"] == 64 else "tiles"
    found = taken(Case(**given))
    assert {f"{kernel}: {name}" for name in named} <= found
    assert not {f"{kernel}: {name}" for name in absent} & found


@pytest.mark.parametrize(("group", "kernel"), [(64, "heads"), (8, "tiles")])
def test_the_guard_is_named_where_a_later_tile_is_far_above(group, kernel):
    case = Case(group=group, seq=8, keys1=140, keys2=50, w1=128, w2=8, **BF16, **FORWARD)

    def oldest_are_large(q, k1, k2, v1, v2):
        k1[:, :, :70] *= 1000

    def newest_are_large(q, k1, k2, v1, v2):
        k1[:, :, 70:] *= 1000
        k2[:, :, :-2] = 0
        k2[:, :, -2:] = 1

    assert f"{kernel}: guard" in taken(case, oldest_are_large)
    assert f"{kernel}: guard" not in taken(case)
    one = Case(group=group, seq=1, keys1=140, keys2=50, w1=128, w2=2, **BF16, **FORWARD)
    if kernel == "heads":
        assert f"{kernel}: guard" not in taken(one, newest_are_large)


def test_a_tile_whose_newest_keys_a_row_does_not_see_begins_unset():
    case = Case(group=8, seq=72, keys1=90, keys2=90, w1=8, w2=8, **BF16, **FORWARD)
    assert "tiles: guard of an unset row" not in taken(case)
    case = Case(group=1, seq=128, keys1=128, keys2=128, w1=70, w2=8, **BF16, **FORWARD)
    assert "tiles: guard of an unset row" not in taken(case)  # its own key is in the newest tile


def test_every_branch_has_a_name_that_is_asked_for():
    case = Case(group=8, seq=16, keys1=90, keys2=50, w1=64, w2=8, k2_bias=1.0, **BF16)
    found = {said for said in taken(case) if not said.startswith(("forward: ", "backward: "))}
    assert found <= set(BRANCHES)
    assert "narrow bias" in found


def test_too_few_cases_of_a_branch_are_named():
    tally = fuzz.Tally()
    tally.branches.update(dict.fromkeys(BRANCHES, 50))
    for form in FORMS:
        tally.features.update(dict.fromkeys(fuzz.features(Case(form=form)), 50))
    for layout in LAYOUTS:
        tally.features.update(dict.fromkeys(fuzz.features(Case(layout=layout)), 50))
    assert fuzz.too_few(tally, 50) == []
    tally.branches["heads: guard"] = 49
    tally.features["form determinant"] = 1
    assert fuzz.too_few(tally, 50) == ["heads: guard", "form determinant"]


def test_a_record_is_carried_on_over_the_same_sources_alone(tmp_path):
    record = tmp_path / "fuzz.json"
    tally = fuzz.Tally(passed=3, compiled={"kernel 1"})
    tally.branches["heads: guard"] = 2
    fuzz.write(record, tally)
    again = fuzz.read(record)
    assert (again.passed, again.branches, again.compiled) == (3, tally.branches, {"kernel 1"})
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sources": "others"}))
    with pytest.raises(typer.BadParameter, match="other sources"):
        fuzz.read(record)
