"""The table of registers and spills: its rules, and that the kernels keep within it."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from csrc_free.measured import table
from tools.compiled import registers
from tools.compiled.registers import Usage, complaints, read_amdgcn, read_ptxas

ROOT = Path(__file__).parents[2]
TABLE = {"sm_90": {"kernel": Usage(registers=128, spills=8, shared=1000)}}


def test_no_more_than_the_table_is_well():
    assert complaints({"sm_90": {"kernel": Usage(128, 8, 2000)}}, TABLE) == []
    assert complaints({"sm_90": {"kernel": Usage(96, 0, 1000)}}, TABLE) == []


@pytest.mark.parametrize(
    ("usage", "complaint"),
    [
        (Usage(129, 0, 0), "sm_90 kernel: registers grew from 128 to 129"),
        (Usage(96, 12, 0), "sm_90 kernel: spills grew from 8 to 12"),
        (Usage(96, 0, 232_449), "sm_90 kernel: shared memory 232449 is over 232448"),
    ],
)
def test_growth_is_a_complaint(usage, complaint):
    assert complaints({"sm_90": {"kernel": usage}}, TABLE) == [complaint]


def test_kernels_and_lines_match_one_to_one():
    assert complaints({"sm_90": {"other": Usage(1, 0, 0)}}, TABLE) == [
        "sm_90 other: not in the table; accept it with --update",
        "sm_90 kernel: in the table, but no such kernel",
    ]


def test_what_the_assemblers_say_is_read():
    log = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
        16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
    ptxas info    : Used 255 registers, used 1 barriers"""
    assert read_ptxas(log) == (255, 24)
    assert read_amdgcn(".vgpr_count:     219\n.vgpr_spill_count: 3\n") == (219, 12)
    with pytest.raises(ValueError, match="no register count"):
        read_ptxas("ptxas fatal")


def test_quick_asks_for_a_part_of_the_table():
    assert complaints({"sm_90": {}}, TABLE, is_quick=True) == []


def test_updating_keeps_other_versions_and_targets(tmp_path, monkeypatch):
    monkeypatch.setattr(registers, "TABLE", tmp_path / "registers.json")
    old, new = Usage(1, 2, 3), Usage(4, 5, 6)
    registers.write_table("3.6", "same", {"sm_80": {"k": old}, "sm_90": {"k": old}})
    registers.write_table("3.7", "same", {"sm_80": {"k": old}})
    registers.write_table("3.6", "same", {"sm_90": {"k": new}})
    assert registers.read_table("3.6") == {"sm_80": {"k": old}, "sm_90": {"k": new}}
    assert registers.read_table("3.7") == {"sm_80": {"k": old}}
    assert registers.read_table("3.8") is None


def test_updating_after_a_change_drops_what_was_compiled_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(registers, "TABLE", tmp_path / "registers.json")
    registers.write_table("3.6", "before", {"sm_80": {"k": Usage(1, 2, 3)}})
    registers.write_table("3.6", "after", {"sm_90": {"k": Usage(4, 5, 6)}})
    assert registers.read_table("3.6") == {"sm_90": {"k": Usage(4, 5, 6)}}
    assert registers.read_digest("3.6") == "after"


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(tmp_path):
    journal = tmp_path / "out" / "journal.jsonl"
    every = {name: Usage(1, 2, 3) for name in registers.launches("sm_80")}
    for name, usage in every.items():
        registers._append_to_journal(journal, "sm_80", name, usage)
    registers._append_to_journal(journal, "sm_80", "gone", Usage(1, 2, 3))
    assert registers.measure(["sm_80"], journal=journal) == ({"sm_80": every}, [])


def _sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    (tmp_path / "kernel.py").write_text(text)
    monkeypatch.setattr(registers, "SOURCES", tmp_path)
    return registers.digest()


def test_the_digest_sees_code_and_no_comments(tmp_path, monkeypatch):
    before = _sources(tmp_path, monkeypatch, "def f(x):\n    return x + 1\n")
    commented = "# a reason\ndef f(x):\n\n    return x + 1  # another\n"
    assert _sources(tmp_path, monkeypatch, commented) == before
    assert _sources(tmp_path, monkeypatch, "def f(x):\n    return x + 2\n") != before
    # Triton's own key does not see the order of a NamedTuple's fields.
    pair = "class Pair(NamedTuple):\n    {}: tl.tensor\n    {}: tl.tensor\n"
    ordered = _sources(tmp_path, monkeypatch, pair.format("a", "b"))
    assert _sources(tmp_path, monkeypatch, pair.format("b", "a")) != ordered


def _pinned_triton() -> str:
    constraints = (ROOT / "tools/constraints.txt").read_text()
    pinned = re.search(r"^triton==([\d.]+)", constraints, re.MULTILINE)
    assert pinned is not None
    return pinned[1]


def test_the_table_has_the_pinned_triton_and_those_that_figures_are_quoted_for():
    expected = {_pinned_triton(): set(registers.TARGETS)}
    for name in registers.TARGETS:
        measured = table(name)
        if measured is not None:
            expected.setdefault(measured["versions"]["triton"], set()).add(name)
    for version, targets in expected.items():
        found = registers.read_table(version)
        assert found is not None, f"no table for triton {version}"
        assert set(found) >= targets


def test_the_table_was_compiled_from_these_sources():
    for version in json.loads(registers.TABLE.read_text()):
        assert registers.read_digest(version) == registers.digest(), (
            f"triton {version}: run python -m tools.compiled.registers --update"
        )


def test_the_table_has_every_kernel_that_the_workloads_reach_on_every_target():
    pytest.importorskip("triton")
    for target in registers.TARGETS:
        found = registers.read_table(_pinned_triton())
        assert found is not None
        assert set(found[target]) == set(registers.launches(target)), target


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_kernel_needs_more_than_the_table_says():
    version = metadata.version("triton")
    if registers.read_table(version) is None:
        pytest.skip(f"no table for triton {version}")
    # Another process: in this one triton.jit may have made interpreted functions.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    check = subprocess.run(
        [sys.executable, "-m", "tools.compiled.registers", "--check", "--quick"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
