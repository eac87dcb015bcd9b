"""The table of registers and spills: its rules, and that the kernels keep within it."""

import importlib.util
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
    programs = {target: {"k": f"of {target}"} for target in ("sm_80", "sm_90")}
    registers.write_table("3.6", {"sm_80": {"k": old}, "sm_90": {"k": old}}, programs)
    registers.write_table("3.7", {"sm_80": {"k": old}}, programs)
    registers.write_table("3.6", {"sm_90": {"k": new}}, {"sm_90": {"k": "another"}})
    assert registers.read_table("3.6") == {"sm_80": {"k": old}, "sm_90": {"k": new}}
    assert registers.read_table("3.7") == {"sm_80": {"k": old}}
    assert registers.read_table("3.8") is None
    assert registers.read_fingerprints("3.6") == {
        "sm_80": {"k": "of sm_80"}, "sm_90": {"k": "another"},
    }  # fmt: skip
    assert '"k": {"program": "another", "registers": 4, ' in registers.TABLE.read_text()


def test_what_is_in_the_table_or_was_compiled_before_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(registers, "TABLE", tmp_path / "registers.json")
    journal = tmp_path / "out" / "journal.jsonl"
    programs = registers.fingerprints("sm_80")
    every = {name: Usage(number, 2, 3) for number, name in enumerate(programs)}
    first, *others = programs
    registers.write_table("3.6", {"sm_80": {first: every[first]}}, {"sm_80": programs})
    for name in others:
        registers._append(journal, "sm_80", programs[name], every[name])
    registers._append(journal, "sm_80", "a program that is gone", Usage(1, 2, 3))
    known = registers.known_of("3.6", journal)
    assert registers.measure(["sm_80"], known=known) == ({"sm_80": every}, [])


def test_a_quick_check_compiles_one_workload_and_what_the_table_does_not_know():
    pytest.importorskip("triton")
    programs = registers.fingerprints("sm_80")
    known = {("sm_80", program): Usage(1, 2, 3) for program in programs.values()}
    kept = registers.without_sample(known, ["sm_80"])
    compiled = {name for name, program in programs.items() if ("sm_80", program) not in kept}
    kernels = ("forward", "delta", "backward_wide", "backward_keys", "sum_parts")
    assert compiled == {f"{kernel}_kernel gqa8-2k" for kernel in kernels}


KERNEL = """
import triton
import triton.language as tl

STEP = tl.constexpr(1)


@triton.jit
def inner(x):
    return x + STEP


def on_the_host():
    return 1


@triton.jit
def kernel(pointer, SIZE: tl.constexpr):
    tl.store(pointer, inner(tl.load(pointer)) * SIZE)
"""


def test_a_formatted_string_is_one_token_on_every_python():
    fingerprint = pytest.importorskip("tools.compiled.fingerprint")
    text = 'x = f"a{b:{c}}"  # so\ny = (f"{x}"\n     "d")\n'
    found = fingerprint.code_of(text).split("\0")
    assert [token for token in found if token.strip()] == [
        "x", "=", 'f"a{b:{c}}"', "y", "=", "(", 'f"{x}"', '"d"', ")",
    ]  # fmt: skip


def _fingerprint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = KERNEL, **others: object
) -> str:
    """Return the fingerprint of a launch of `kernel` in a module of ours with this text."""
    fingerprint = pytest.importorskip("tools.compiled.fingerprint")
    launches = pytest.importorskip("tools.compiled.launches")
    path = folder / str(len(list(folder.iterdir()))) / "kernel_of_a_test.py"
    path.parent.mkdir()
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(fingerprint, "_OURS", (path.stem,))
    launch = {
        "signature": {"pointer": "*fp32", "SIZE": "constexpr"}, "constants": {"SIZE": 4},
        "divisible": (), "options": {"num_warps": 4},
    }  # fmt: skip
    return fingerprint.fingerprint(launches.Launch(module.kernel, **launch | others))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("* SIZE", "* SIZE * 2"),
        ("x + STEP", "x - STEP"),
        ("tl.constexpr(1)", "tl.constexpr(2)"),
        ("    return x + STEP", "    if x > 0:\n        x = x * 2\n    return x + STEP"),
    ],
)
def test_another_program_has_another_fingerprint(tmp_path, monkeypatch, before, after):
    assert before in KERNEL
    changed = KERNEL.replace(before, after)
    assert _fingerprint(tmp_path, monkeypatch, changed) != _fingerprint(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "others",
    [
        {"constants": {"SIZE": 8}},
        {"divisible": ("pointer",)},
        {"options": {"num_warps": 8}},
        {"signature": {"pointer": "*bf16", "SIZE": "constexpr"}},
    ],
    ids=str,
)
def test_what_a_launch_specialises_is_part_of_the_fingerprint(tmp_path, monkeypatch, others):
    plain = _fingerprint(tmp_path, monkeypatch)
    assert _fingerprint(tmp_path, monkeypatch, **others) != plain


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("    return x + STEP", "    # a reason\n    return x + STEP  # another"),
        ("    return 1", "    return 2"),
        ("(tl.load(pointer))", "(\n        tl.load(pointer)\n    )"),
    ],
)
def test_comments_spacing_and_the_host_are_no_part_of_it(tmp_path, monkeypatch, before, after):
    assert before in KERNEL
    changed = KERNEL.replace(before, after)
    assert _fingerprint(tmp_path, monkeypatch, changed) == _fingerprint(tmp_path, monkeypatch)


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
    """Every kernel that the workloads reach on every target is there, and no other."""
    pytest.importorskip("triton")
    for version in registers.versions():
        for target, programs in registers.read_fingerprints(version).items():
            assert programs == registers.fingerprints(target), (
                f"{target}, triton {version}: run python -m tools.compiled.registers --update"
            )


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
