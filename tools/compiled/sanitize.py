"""Run every GPU kernel on small problems under NVIDIA's compute-sanitizer.

    python -m tools.compiled.sanitize    # memcheck, then racecheck
    python -m tools.compiled.sanitize --check initcheck

It needs compute-sanitizer on the PATH, runs it on `python -m tools.compiled.sanitize --bare`, which
is the small problems alone, and ends with exit code 1 where it found an error or a hazard.
"""

import contextlib
import shutil
import subprocess
import sys
from typing import Annotated

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
    Case(1, 1, 4, 40, head_dim=64, w1=20, w2=5, dtype=torch.float16, through="both"),
    Case(1, 1, 4, 40, head_dim=64, w1=20, w2=5, dtype=torch.float32, through="both"),
)


def run_cases() -> None:
    """Run the operator forward and backward on each case, and wait for it."""
    for case in CASES:
        for implementation in implementations():
            with implementation:
                found = run_attn(torch.ops.simplex.attn, Problem.of(case, "cuda"))
            torch.cuda.synchronize()
            print(f"ran {case!r}: {', '.join(found)}", flush=True)  # noqa: T201


def implementations() -> tuple[contextlib.AbstractContextManager[None], ...]:
    """Return contexts for the kernels that serve best, and for the portable ones alone."""
    from csrc_free.attn import portable_alone

    return contextlib.nullcontext(), portable_alone()


def main(
    check: Annotated[
        list[str] | None, typer.Option(help="a tool of compute-sanitizer, again for more")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="only run the small problems")] = False,
) -> None:
    """Run every GPU kernel on small problems under NVIDIA's compute-sanitizer."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this PyTorch sees no GPU")
    if bare:
        run_cases()
        return
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise typer.BadParameter("compute-sanitizer is not on the PATH")
    failed = []
    for tool in check or ["memcheck", "racecheck"]:
        options = ["--tool", tool, "--error-exitcode", "1"]
        here = [sys.executable, "-m", "tools.compiled.sanitize", "--bare"]
        if subprocess.run([program, *options, *here], check=False).returncode:
            failed.append(tool)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
