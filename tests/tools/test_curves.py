"""Plots of sweeps: what they make of the bench's lines."""

import json

import pytest
from typer.testing import CliRunner

from tools.bench import __main__ as bench
from tools.bench import curves
from tools.bench.curves import Point
from tools.workloads import SWEEPS, WORKLOADS, Workload, useful_flops

FACTS = {"device": "X", "torch": "1", "triton": "2", "date": "3", curves.BANDWIDTH: 4000}


def line(sweep, size, direction, who, ms=1.0, rate=100.0):
    name = SWEEPS[sweep][size].name
    said = {"workload": name, "direction": direction, "contestant": who, "ms": ms}
    return {**said, "nominal_tflops": rate, "useful_tflops": rate, **FACTS}


def test_a_step_is_forward_and_backward_over_the_sum_of_their_times():
    lines = [line("G", 8, "forward", "simplex", 2.0), line("G", 8, "backward", "simplex", 5.0)]
    rate = 3.5 * useful_flops(SWEEPS["G"][8]) / 7e-3 / 1e12
    assert list(curves.points(lines)) == [
        Point("G", 8, "forward", 100.0),
        Point("G", 8, "backward", 100.0),
        Point("G", 8, "step", pytest.approx(rate)),
    ]


def test_one_direction_alone_is_no_step_and_other_lines_are_left_out():
    lines = [
        line("N", 4096, "forward", "cudnn fwd", rate=600.0),
        line("N", 4096, "backward", "cudnn fwd", rate=1.0),
        line("N", 4096, "forward", "simplex", ms=None, rate=None),
        {**line("N", 4096, "forward", "simplex"), "workload": "gqa8"},
    ]
    assert list(curves.points(lines)) == [Point("N", 4096, "cudnn fwd", 600.0)]


def test_intensity_counts_each_tensor_once():
    workload = Workload("x", 1, 2, 1, 3, 4, 2, 1)  # bfloat16
    elements = 2 * 3 * (4 + 4) + 2 * 3 * (4 + 4)  # q and out, two pairs
    assert curves.intensity(workload) == useful_flops(workload) / (2 * elements + 4 * 2 * 3)
    backward = 2 * 2 * elements + 4 * 2 * 3
    assert curves.intensity(workload, is_backward=True) == (
        useful_flops(workload, "backward") / backward
    )


def test_a_workload_of_two_sweeps_is_a_point_of_both():
    lines = [line("G", 64, "forward", "simplex")]
    assert list(curves.points(lines)) == [
        Point("G", 64, "forward", 100.0), Point("w1", 512, "forward", 100.0)
    ]  # fmt: skip


def test_sweeps_change_what_they_say_and_share_names_with_named_workloads_alone():
    swept = {w for rows in SWEEPS.values() for w in rows.values()}
    assert len({w.name for w in swept}) == len(swept)
    assert all(WORKLOADS.get(w.name, w) == w for w in swept)
    assert {(w.batch * w.seq, w.seq == n) for n, w in SWEEPS["N"].items()} == {(131072, True)}
    assert all(w.heads // w.kv_heads == g for g, w in SWEEPS["G"].items())
    assert all(w.w1 == w1 for w1, w in SWEEPS["w1"].items())


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        line(sweep, size, direction, who)
        for sweep, rows in SWEEPS.items()
        for size in rows
        for direction in ("forward", "backward")
        for who in ("simplex", "cudnn fwd", "matmul")
    ]
    file, picture = tmp_path / "lines.jsonl", tmp_path / "sweeps.png"
    file.write_text("".join(json.dumps(said) + "\n" for said in lines))
    curves.main([file], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_sweep_is_said():
    result = CliRunner().invoke(_app(), ["--device", "cpu", "--sweep", "H"])
    assert result.exit_code == 2
    assert "no sweep H" in " ".join(result.output.replace("│", "").split())


def _app():
    import typer

    app = typer.Typer()
    app.command()(bench.main)
    return app
