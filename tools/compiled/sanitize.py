"""Run every GPU kernel on small problems under NVIDIA's compute-sanitizer.

    python -m tools.compiled.sanitize    # memcheck, then racecheck
    python -m tools.compiled.sanitize --check initcheck --workers 8 --logs out/sanitize

It needs compute-sanitizer on the PATH, or --program. Each small problem runs in processes of its
own, one after the other for each check, several problems at once. It ends with exit code 1 where
one found an error or a hazard, did not end in time, or failed.
"""

import contextlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

import simplex_ops  # noqa: F401  (registers the operators)
from simplex_ops.testing import Case, Problem, run_attn

BF16 = {"dtype": torch.bfloat16, "layout": "transposed", "through": "both"}
# Every kernel on Hopper, reading by descriptors and by pointers, at each dtype and form.
CASES = (
    Case(2, 2, 1, 70, head_dim=128, w1=40, w2=5, **BF16),
    Case(4, 17, 1, 40, head_dim=64, w1=20, w2=4, **BF16),
    Case(2, 2, 8, 70, head_dim=128, w1=40, w2=5, **BF16),
    Case(1, 1, 64, 40, head_dim=128, w1=36, w2=4, **BF16),
    Case(1, 1, 32, 40, head_dim=64, value_dim=128, w1=36, w2=4, bounds="padding", **BF16),
    Case(1, 1, 40, 30, head_dim=64, w1=20, w2=4, starts="random", **BF16),
    Case(2, 2, 3, 70, head_dim=48, w1=9, w2=30, bounds="documents", k2_bias=1.0, **BF16),
    Case(1, 2, 1, 50, head_dim=33, w1=20, w2=5, is_causal=False, **BF16),
    Case(1, 2, 12, 50, keys1=60, head_dim=33, w1=20, w2=5, **BF16),
    Case(2, 1, 1, 40, head_dim=64, w1=20, w2=4, dtype=torch.bfloat16, layout="expanded"),
    Case(1, 2, 2, 40, head_dim=64, w1=20, w2=5, form="determinant", **BF16),
    Case(1, 2, 2, 40, head_dim=64, w1=20, w2=5, form="strassen", **BF16),
    Case(1, 2, 8, 70, head_dim=80, w1=40, w2=5, form="determinant", **BF16),
    Case(1, 1, 4, 40, head_dim=64, w1=20, w2=5, dtype=torch.float16, through="both"),
    Case(1, 1, 64, 40, head_dim=128, w1=36, w2=4, dtype=torch.float16, through="both"),
    Case(1, 1, 4, 40, head_dim=64, w1=20, w2=5, dtype=torch.float32, through="both"),
)


def run_case(number: int) -> None:
    """Run the operator forward and backward on one case, and wait for it."""
    for implementation in implementations():
        with implementation:
            found = run_attn(torch.ops.simplex.attn, Problem.of(CASES[number], "cuda"))
        torch.cuda.synchronize()
        print(f"ran {CASES[number]!r}: {', '.join(found)}", flush=True)  # noqa: T201


def implementations() -> tuple[contextlib.AbstractContextManager[object], ...]:
    """Return contexts for the kernels of large problems, and for the portable ones alone."""
    from csrc_free.attn import portable_alone
    from csrc_free.hopper import least_work

    return mock.patch.object(least_work, "LEAST", 0), portable_alone()


def result_of(tool: str, number: int, program: str, seconds: float, logs: Path | None) -> str:
    """Run a problem under a tool; return "ok", or what is wrong as the tool's last line says it."""
    bare = [sys.executable, "-m", "tools.compiled.sanitize", "--bare", str(number)]
    try:
        ended = subprocess.run(
            [program, "--tool", tool, "--error-exitcode", "1", *bare],
            check=False, text=True, timeout=seconds, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        said, code = output.decode() if isinstance(output, bytes) else output, None
    else:
        said, code = ended.stdout, ended.returncode
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{tool}-{number}.txt").write_text(said)
    if code is None:
        return f"no end within {seconds:.0f} s"
    lines = [line for line in said.splitlines() if line.strip()]
    return "ok" if code == 0 else f"exit {code}: {lines[-1] if lines else 'no output'}"


def main(
    check: Annotated[
        list[str] | None, typer.Option(help="a tool of compute-sanitizer, again for more")
    ] = None,
    program: Annotated[str, typer.Option(help="where compute-sanitizer is")] = "",
    workers: Annotated[int, typer.Option(help="processes at once")] = 4,
    seconds: Annotated[float, typer.Option(help="that one process may take")] = 900.0,
    logs: Annotated[Path | None, typer.Option(help="a folder for what each process says")] = None,
    only: Annotated[
        list[int] | None, typer.Option(help="the number of a problem, again for more")
    ] = None,
    bare: Annotated[int, typer.Option(help="only run the problem of this number")] = -1,
) -> None:
    """Run every GPU kernel on small problems under NVIDIA's compute-sanitizer."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no GPU")
    strangers = [number for number in only or () if number not in range(len(CASES))]
    if strangers:
        raise typer.BadParameter(f"--only: problems are 0 to {len(CASES) - 1}, got {strangers}")
    if bare >= 0:
        run_case(bare)
        return
    found = program or shutil.which("compute-sanitizer")
    if found is None:
        raise typer.BadParameter("compute-sanitizer is not on the PATH")
    numbers = only or range(len(CASES))
    failed = 0

    def results(number: int) -> list[tuple[str, str]]:
        tools = check or ["memcheck", "racecheck"]
        return [(tool, result_of(tool, number, found, seconds, logs)) for tool in tools]

    with ThreadPoolExecutor(workers) as pool:
        for number, of_tools in zip(numbers, pool.map(results, numbers), strict=True):
            for tool, result in of_tools:
                typer.echo(f"{tool} {result}: {CASES[number]!r}")
                failed += result != "ok"
    typer.echo(f"{failed} failed")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
