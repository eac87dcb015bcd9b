"""The bench's report: what it makes of JSON lines, in RESULTS.md and in README."""

import json

import pytest

from tools.bench import report
from tools.bench.contest import COMPILED, OURS, Result, Row
from tools.bench.report import BEGIN, CUDNN, END, Run
from tools.bench.timing import Times
from tools.workloads import WORKLOADS, nominal_flops

FACTS = {
    "device": "X100", "torch": "9.0", "triton": "8.0", "cudnn": "1", "driver": "2",
    "date": "2026-01-02T03:04Z",
}  # fmt: skip


def lines(name, direction, rates, *, note="hopper", workspace=2**20):
    """Return the bench's own lines of a row, of rates in TFLOP/s."""
    from tools.bench.__main__ import records

    workload = WORKLOADS[name]
    flops = nominal_flops(workload, direction)
    results = {
        who: Result(
            flops, Times((ms := flops / rate / 1e9,) * 3, "median", (ms,)),
            note if who == OURS else "", workspace,
        )
        for who, rate in rates.items()
    }  # fmt: skip
    return list(records(Row(workload, direction, results), FACTS))


def written(folder, **runs):
    folder.mkdir(exist_ok=True)
    for name, read in runs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in read))
    return folder


NAMED = [
    *lines("llama-mqa", "forward", {OURS: 640, CUDNN: 600, "matmul": 700}),
    *lines("llama-mqa", "backward", {OURS: 400, CUDNN: 600}),
    *lines("mqa-1024x32", "forward", {OURS: 512, CUDNN: 600}),
    *lines("gqa4", "forward", {OURS: 420, CUDNN: 600}, note="portable: a reason"),
]


def test_a_workload_is_a_row_with_its_ratios_and_aims(tmp_path):
    found = report.text(written(tmp_path / "results", named=NAMED)).splitlines()
    row = next(line for line in found if line.startswith("| llama-mqa"))
    assert row == (
        "| llama-mqa: B4 N4096 H64 Hkv1 | 640 | 1.07 (1) | 400 | 0.67 (0.62) | 1.07, 0.67 |  | "
        "1, 1 |  |"
    )
    row = next(line for line in found if line.startswith("| mqa-1024x32"))
    assert "H64 Hkv1 1024 x 32 | 512 | 0.85 |" in row
    assert "0.75 (0.85, missed) of llama-mqa" in row
    row = next(line for line in found if line.startswith("| gqa4"))
    assert "0.70 (0.75, missed)" in row
    assert "forward: portable: a reason" in row
    assert (
        "X100, torch 9.0, triton 8.0; cudnn 1; driver 2; 2026-01-02; cudnn fwd 600 to 600; "
        "matmul 700 to 700." in found
    )


def test_a_step_is_both_directions(tmp_path):
    found = report.text(written(tmp_path / "results", named=NAMED))
    flops = nominal_flops(WORKLOADS["llama-mqa"])
    ms = flops / 640e9 + 2.5 * flops / 400e9
    assert f"| llama-mqa: B4 N4096 H64 Hkv1 | {ms:.2f} | {3.5 * flops / ms / 1e9:.0f} |" in found


def test_compiled_rows_are_judged_by_eager_ones_of_their_run(tmp_path):
    compiled = lines("gqa8", "forward", {OURS: 500, COMPILED: 480, CUDNN: 600})
    found = report.text(written(tmp_path / "results", named=NAMED, compiled=compiled))
    assert "| gqa8: B4 N4096 H64 Hkv8 | forward | 500 | 480 | 0.96 (0.97, missed) |" in found


def test_peers_are_beside_ours_with_what_was_worked_around(tmp_path):
    peers = lines("llama-mqa", "forward", {OURS: 640, "FBGEMM Triton": 320, "flash fwd": 400})
    peers[1]["note"] = "agrees with ours to 2e-03"
    found = report.text(written(tmp_path / "results", named=[*NAMED, *peers]))
    row = "| llama-mqa: B4 N4096 H64 Hkv1 | forward | FBGEMM Triton | 320 | 640 | 2.00 | agrees"
    assert row in found
    assert "| flash fwd (equal FLOPs, dense) | 400 | 640 | 1.60 |" in found


def test_sweeps_are_a_run_of_their_own_with_a_picture(tmp_path):
    swept = [
        dict(line, workload="sweep-g2", date="2026-03-04T00:00Z")
        for direction, rate in (("forward", 500), ("backward", 300))
        for line in lines("gqa8", direction, {OURS: rate, CUDNN: 600, "matmul": 700})
    ]
    folder = written(tmp_path / "results", named=NAMED, sweeps=swept)
    found = report.text(folder)
    head, _, tail = found.partition("## Sweeps")
    assert "sweep-g2" not in head
    assert "2026-03-04" in tail
    assert "![rates of the sweeps](sweeps.png)" in tail
    assert "| sweep-g2: B4 N4096 H64 Hkv8 | 500 |" in tail
    document = tmp_path / "README.md"
    document.write_text(f"{BEGIN}{END}")
    report.main(folder, document)
    assert "sweeps.png" in document.read_text()
    assert (tmp_path / "sweeps.png").stat().st_size > 1000


def test_a_row_that_did_not_run_is_no_row(tmp_path):
    none = [dict(line, ms=None, nominal_tflops=None) for line in NAMED if "gqa4" in str(line)]
    run = Run.read(written(tmp_path / "results", named=[*NAMED, *none]) / "named.jsonl")
    assert run.names() == ["llama-mqa", "mqa-1024x32"]


def test_readme_has_the_main_rows_and_what_is_missed_of_all(tmp_path):
    compiled = lines("gqa8", "forward", {OURS: 500, COMPILED: 490})
    peers = lines("mha", "backward", {OURS: 300, "FBGEMM Triton": 54, CUDNN: 600})
    folder = written(tmp_path / "results", named=[*NAMED, *peers], compiled=compiled)
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    report.main(folder, document)
    found = document.read_text()
    assert found.startswith(f"before\n{BEGIN}\nX100")
    assert found.endswith(f"{END}\nafter\n")
    assert "| llama-mqa" in found
    assert "| mqa-1024x32" not in found
    assert "Aims reached: 2 of 4; not: gqa4 forward 0.70 (0.75), mqa-1024x32 forward 0.75" in found
    assert "Through `torch.compile`: 0.98 to 0.98 of eager." in found
    assert "Peers, TFLOP/s: FBGEMM Triton 54 backward at mha (ours 300)." in found
    assert "sweeps.png" not in found
    assert (tmp_path / "RESULTS.md").read_text().startswith("# What the bench gave")
    with pytest.raises(ValueError, match="no place for the rows"):
        report.placed("rows", "no marks")


def test_what_is_not_usual_of_a_workload_is_said(tmp_path):
    odd = lines("odd", "forward", {OURS: 100}) + lines("fp32", "forward", {OURS: 10})
    found = report.text(written(tmp_path / "results", named=odd))
    assert "| odd: B2 N2000 H12 Hkv4 D80 Dv96 300 x 20 | 100 |" in found
    assert "| fp32: B1 N2048 H8 Hkv2 D64 128 x 16, float32 | 10 (40, missed) |" in found
