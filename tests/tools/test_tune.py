"""The tuner, on the host: which lines it finds, what it tries, and what it writes."""

import json

import pytest
import torch

pytest.importorskip("triton")

from csrc_free import measured
from csrc_free.portable import backward, forward
from csrc_free.traits import DEVICES, Traits
from tools import tune
from tools.bench.timing import Times
from tools.tune import CURRENT, Line, Tuned
from tools.workloads import WORKLOADS

HOPPER = DEVICES["sm_90"]
FACTS = {"device": "X100", "torch": "9", "triton": "8", "date": "2026-01-02T03:04Z"}
TRAITS = Traits(8, 128, 128, torch.bfloat16, "trilinear", True, True)


@pytest.fixture
def table():
    found = measured.table("sm_90")
    assert found is not None
    return found


def line(kernel="forward", number=1):
    return Line(kernel, number, WORKLOADS["gqa8"], "forward")


def test_every_line_of_the_table_is_reached_by_a_named_workload(table):
    found = {(one.kernel, one.number) for one in tune.lines_of(table, HOPPER, list(tune.SPACES))}
    lines = {(k, n) for k in table["lines"] for n in range(len(table["lines"][k]))}
    # No named workload has so many heads that are no multiple of 64, nor float32 at more than 64
    # columns, or at so many heads that `keys`, or `query` without parts, serves.
    assert lines - found == {
        ("pairs", 1), ("forward", 5), ("keys", 1),
        ("query", 1), ("query", 2), ("query_with_parts", 2),
    }  # fmt: skip


def test_neighbours_differ_in_one_field_by_a_step():
    space = {"a": (1, 2, 4), "b": (8, 16)}
    assert list(tune.neighbours({"a": 2, "b": 16}, space)) == [
        {"a": 1, "b": 16}, {"a": 4, "b": 16}, {"a": 2, "b": 8}
    ]  # fmt: skip


def test_a_table_decides_inside_and_is_forgotten_outside(table):
    before = forward.choose(TRAITS, HOPPER), backward.choose(TRAITS, HOPPER)
    changed = line().changed(table, {**line().config_in(table), "num_stages": 4})
    changed = line("wide", 0).changed(
        changed, {**table["lines"]["wide"][0]["config"], "block_q": 16}
    )
    with tune.deciding(changed):
        assert forward.choose(TRAITS, HOPPER).num_stages == 4
        assert backward.choose(TRAITS, HOPPER).wide.block_q == 16
    assert (forward.choose(TRAITS, HOPPER), backward.choose(TRAITS, HOPPER)) == before
    assert line().config_in(table)["num_stages"] != 4, "the table itself is as it was"


@pytest.fixture
def timed(monkeypatch):
    """Stand for the kernels and the clock: a run's answer and its time, by its number of stages."""
    answers, times = {}, {}

    def run():
        stages = forward.choose(TRAITS, HOPPER).num_stages
        if isinstance(answers.get(stages), Exception):
            raise answers[stages]
        return [torch.full((2,), answers.get(stages, 1.0))]

    monkeypatch.setattr(tune, "ours", lambda *_: type("Job", (), {"run": staticmethod(run)}))
    monkeypatch.setattr(
        tune, "time_in_turn",
        lambda functions, device, seconds: {n: Times((times.get(n, 10.0),)) for n in functions},
    )  # fmt: skip
    return answers, times


def test_what_is_faster_by_the_margin_stands(table, timed):
    _, times = timed
    times["num_stages 2"] = 9.7
    tuned = tune.tune(line(), table, torch.device("cpu"), 1.0)
    assert (tuned.winner, tuned.config["num_stages"]) == ("num_stages 2", 2)
    times["num_stages 2"] = 9.9
    tuned = tune.tune(line(), table, torch.device("cpu"), 1.0)
    assert (tuned.winner, tuned.config) == (CURRENT, line().config_in(table))


def test_what_errs_or_gives_another_answer_is_left_out(table, timed):
    answers, times = timed
    times["num_stages 2"] = times["num_stages 4"] = 1.0
    answers[2], answers[4] = RuntimeError("too large"), 2.0
    tuned = tune.tune(line(), table, torch.device("cpu"), 1.0)
    assert tuned.winner == CURRENT
    assert tuned.left_out["num_stages 2"] == "RuntimeError: too large"
    assert tuned.left_out["num_stages 4"].startswith("WRONG")


def test_a_written_table_says_what_was_measured_when_and_with_what(table):
    config = {**line().config_in(table), "num_stages": 4}
    times = {CURRENT: Times((20.0,)), "num_stages 4": Times((10.0,)), "cudnn fwd": Times((5.0,))}
    one = Tuned(line(), times, {}, "num_stages 4", config)
    found = json.loads(tune.text_of(tune.written(table, [one], FACTS)))
    assert set(found) == {"device", "versions", "date", "figures", *measured.CHOOSING}
    assert line().config_in(found) == config
    assert (found["device"], found["date"]) == ("X100", "2026-01-02")
    assert found["versions"] == {"torch": "9", "triton": "8"}
    assert found["figures"][-1]["value"] == round(one.rate("num_stages 4"))
    assert found["figures"][-1]["cudnn fwd"] == round(one.rate("cudnn fwd"))
    again = tune.written(found, [one], FACTS)
    assert again == found, "a line has one figure"


def test_figures_that_are_kept_say_of_what_device_and_day_they_are(table):
    here = {"device": "another", "date": "2026-01-01"}
    table = {**table, "figures": [{"value": 1}, {"value": 2, **here}]}
    first, second = tune.written(table, [], FACTS)["figures"]
    assert first == {name: table[name] for name in ("device", "versions", "date")} | {"value": 1}
    assert second == {"value": 2, "versions": table["versions"], **here}


def test_a_table_is_written_as_it_is_kept():
    text = (measured.ROOT / "sm_90.json").read_text()
    assert json.loads(tune.text_of(json.loads(text))) == json.loads(text)
