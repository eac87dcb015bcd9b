"""The bench: what it times, what it says of those it cannot time, and its JSON."""

import importlib.util
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from tools.bench import __main__ as bench
from tools.bench import aims, timing
from tools.bench.anchors import Job, NotRunError, einsum
from tools.bench.contest import COMPILED, OURS, Result, Row, field_of, measure
from tools.bench.peers import agreement, fbgemm, lucidrains
from tools.bench.timing import Times, time_in_turn
from tools.workloads import WORKLOADS, nominal_flops, useful_flops

CPU = torch.device("cpu")

app = typer.Typer()
app.command()(bench.main)


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_quick_cpu_bench_writes_json_and_a_plot(tmp_path):
    lines, picture = tmp_path / "figures.jsonl", tmp_path / "figures.png"
    result = run(
        "--device", "cpu", "--quick", "--workload", "cpu-short",
        "--json", str(lines), "--plot", str(picture),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert "no plot: " in result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    timed = {(r["direction"], r["contestant"]) for r in records if r["ms"] is not None}
    assert timed == {(d, c) for d in ("forward", "backward") for c in (OURS, "matmul", "einsum")}
    for record in records:
        assert record["torch"] == torch.__version__
        assert record["runs"] >= 3
        assert record["ms"] > 0
        assert {"device", "triton", "date", "threads"} <= set(record)
    ours = next(r for r in records if r["contestant"] == OURS)
    matmul = next(r for r in records if r["contestant"] == "matmul")
    ratio = ours["nominal_tflops"] / matmul["nominal_tflops"]
    assert ours["of"]["matmul"] == pytest.approx(ratio)


def test_rows_after_the_time_limit_say_so(tmp_path):
    lines = tmp_path / "figures.jsonl"
    result = run(
        "--device", "cpu", "--workload", "cpu-short", "--max-seconds", "0", "--json", str(lines)
    )
    assert result.exit_code == 1
    assert "no row of ours ran" in result.output
    notes = {json.loads(line)["note"] for line in lines.read_text().splitlines()}
    assert notes == {"not run: --max-seconds 0 is spent"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu", "--workload", "nameless"), "no workload nameless"),
        (("--device", "cpu", "--direction", "up"), "forward, backward or both"),
    ],
)
def test_bad_arguments_are_said(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said():
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert "sees no GPU" in result.output


@pytest.mark.gpu
def test_quick_gpu_bench_has_its_anchors(tmp_path):
    lines = tmp_path / "figures.jsonl"
    result = run("--device", "cuda", "--quick", "--workload", "mha", "--json", str(lines))
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    timed = {(r["direction"], r["contestant"]) for r in records if r["ms"] is not None}
    assert {(d, c) for d in ("forward", "backward") for c in (OURS, "matmul", "cudnn fwd")} <= timed
    assert ("backward", "cudnn bwd") in timed
    (peer,) = (r for r in records if r["contestant"] == "FBGEMM Triton")
    assert peer["note"] == "not run: give a checkout of pytorch/FBGEMM with --fbgemm"


def test_who_cannot_run_says_why_and_the_others_are_timed():
    def refuses(*_):
        raise NotRunError("it is Sunday")

    def breaks(*_):
        return Job(lambda: torch.ones(2) @ torch.ones(3), 1.0)

    def runs(*_):
        return Job(lambda: torch.ones(2), 4.0, "well")

    row = Row(WORKLOADS["cpu-short"], "forward")
    measure(row, {"a": refuses, "b": breaks, "c": runs}, CPU, seconds=0.0, least_rounds=3)
    assert row.results["a"].note == "not run: it is Sunday"
    assert row.results["b"].note.startswith("not run: RuntimeError: ")
    assert row.results["a"].rate is None
    assert row.results["c"].note == "well"
    assert (row.results["c"].rate or 0) > 0


def test_a_ratio_is_of_rates_not_of_times():
    row = Row(WORKLOADS["cpu"], "forward")
    row.results = {
        OURS: Result(flops=8e9, times=Times((1.0, 2.0, 4.0))),
        "matmul": Result(flops=2e9, times=Times((1.0,))),
        "einsum": Result(note="not run: why not"),
    }
    assert row.of(OURS, "matmul") == pytest.approx(2.0)
    assert row.of(OURS, "einsum") is None


def _row(name, rate, anchor=None):
    """Return a row that took as long as full windows take at a rate."""
    row = Row(WORKLOADS[name], "forward")
    flops = nominal_flops(row.workload)
    row.results = {OURS: Result(flops=flops, times=Times((flops / rate * 1e3,)))}
    if anchor is not None:
        row.results["cudnn fwd"] = Result(flops=anchor, times=Times((1e3,)))
    return row


def test_another_row_is_compared_by_time_per_visible_pair():
    rows = [
        _row(workload.name, nominal_flops(workload) / useful_flops(workload))
        for workload in (WORKLOADS["n4k"], WORKLOADS["n128k"])
    ]
    aim = bench.aim_in(rows[1], rows)
    assert aim is not None
    assert aim.reached == pytest.approx(1.0)


def test_an_aim_is_of_an_anchor_or_of_another_row():
    first, second = _row("llama-mqa", 9.0, 10.0), _row("mqa-fp16", 8.5)
    rows = [first, second]
    assert bench.aim_in(first, rows) == bench.Aim(1.0, "cudnn fwd", 0.9)
    assert bench.aim_in(first, rows).verdict == "1.00 of cudnn fwd, 0.90: NO"
    assert bench.aim_in(second, rows).verdict == "0.90 of llama-mqa, 0.94: yes"
    assert bench.aim_in(second, [second]).verdict == "0.90 of llama-mqa: ?"
    assert bench.aim_in(_row("mha", 1.0), rows) is None
    slow, fast = (_row("fp32", 1e12 * rate) for rate in (39.0, 41.0))
    assert bench.aim_in(slow, []).verdict == "40.00 of 1 TFLOP/s, 39.00: NO"
    assert bench.aim_in(fast, []).is_reached


def test_the_compiled_call_is_timed_where_it_is_asked_for(tmp_path):
    lines = tmp_path / "figures.jsonl"
    result = run(
        "--device", "cpu", "--quick", "--workload", "cpu-short", "--compiled", "--json", str(lines)
    )
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    compiled = [r for r in records if r["contestant"] == COMPILED]
    assert [r["direction"] for r in compiled] == ["forward", "backward"]
    assert all(r["ms"] > 0 for r in compiled), [r["note"] for r in compiled]


def test_runs_take_turns():
    order = []
    times = time_in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        CPU,
        seconds=0.0,
        least_rounds=10,
    )
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(rounds) == 10 + 2  # of warm-up
    assert all(sorted(round_) == ["a", "b"] for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) == 2  # nobody always comes first
    assert [len(t.ms) for t in times.values()] == [10, 10]


def test_on_a_gpu_the_second_half_of_each_block_counts(monkeypatch):
    """What runs first meets the clock that another function left."""
    blocks = []

    def rounds_of(functions, _device, runs, rounds):
        blocks.append((dict(runs), rounds))
        return {name: [50.0, 9.0, 2.0, 3.0][: runs[name]] * rounds for name in functions}

    monkeypatch.setattr(timing, "_cuda_rounds", rounds_of)
    times = time_in_turn({"a": list, "b": list}, torch.device("cuda"), seconds=1.3, least_rounds=2)
    assert blocks == [({"a": 1, "b": 1}, 1)] * 2 + [({"a": 4, "b": 4}, 3)]
    assert times["a"].ms == (2.0, 3.0) * 3
    assert times["a"].first == (50.0,) * 3
    row = Row(WORKLOADS["cpu"], "forward")
    row.results = {OURS: Result(8e9, times["a"]), "cudnn fwd": Result(4e9, Times((5.0,)))}
    assert row.of(OURS, "cudnn fwd") == pytest.approx(4.0)
    assert row.first_of(OURS, "cudnn fwd") is None


def test_einsum_refuses_what_does_not_fit():
    with pytest.raises(NotRunError, match=r"logits alone take 256\.0 GiB"):
        einsum(WORKLOADS["cpu"], "forward", CPU)


def test_aims_and_peers_name_rows_that_exist():
    rows = {(w.name, d) for w in WORKLOADS.values() for d in w.directions}
    assert set(aims.AIMS) | set(aims.RATES) <= rows
    for name, (other, *_least) in aims.RELATIVE_AIMS.items():
        assert WORKLOADS[name].directions == WORKLOADS[other].directions
    assert set(fbgemm.ROSTER) | set(lucidrains.ROSTER) <= rows


def test_a_peer_that_is_not_there_says_so():
    workload = WORKLOADS["mha"]
    with pytest.raises(NotRunError, match="--fbgemm"):
        fbgemm.build(workload, "backward", CPU, None)
    builds = field_of(workload, "backward", torch.device("cuda"), None)
    assert {OURS, "cudnn fwd", "FBGEMM Triton"} <= set(builds)


def test_anchors_of_one_rate_are_timed_on_a_few_workloads():
    few = field_of(WORKLOADS["llama-mqa"], "backward", torch.device("cuda"), None)
    assert list(few) == [OURS, "matmul", "cudnn fwd", "cudnn bwd", "flash bwd"]
    others = field_of(WORKLOADS["gqa4"], "backward", torch.device("cuda"), None)
    assert list(others) == [OURS, "cudnn fwd"]
    assert list(field_of(WORKLOADS["cpu"], "forward", CPU, None)) == [OURS, "matmul"]


def test_a_peer_with_other_results_is_called_wrong():
    one = torch.ones(4)
    assert agreement([one, one], [one, one]).startswith("agrees")
    assert agreement([one, 2 * one], [one, one]) == "WRONG by 1e+00"
    assert agreement([one * torch.nan], [one]).startswith("WRONG")
