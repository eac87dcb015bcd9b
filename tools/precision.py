"""How far the Hopper kernels and the portable ones are from float64, and why, by size of scores.

    python -m tools.precision                  # a table for each group size, and one of roundings
    python -m tools.precision --json out/precision.jsonl

An error is relative, in the 2-norm over a whole tensor. Two kernels of the same precision differ by
chance where scores are large: there a rounding makes another pair the first, in few rows.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import simplex_ops  # noqa: F401  (registers the operators)
from simplex_ops import reference
from simplex_ops.env import environment
from simplex_ops.testing import Case, Problem, run_attn
from tools.device import device_named

SCALES = (1.0, 8.0, 30.0, 100.0, 1000.0)
# Heads to a key-value head: how many of these, and queries. Each G has kernels or tiles of its own.
_SIZES = {64: (2, 96), 16: (4, 128), 8: (8, 128), 4: (22, 136), 1: (33, 136)}
PROBLEMS = {
    f"G {group}": Case(
        batch=2, kv_heads=kv_heads, group=group, seq=seq, head_dim=128, w1=80, w2=24,
        dtype=torch.bfloat16, layout="transposed", through="both",
    )
    for group, (kv_heads, seq) in _SIZES.items()
}  # fmt: skip
PROBLEMS |= {
    "G 64, strassen": replace(PROBLEMS["G 64"], form="strassen"),
    "G 64, float16": replace(PROBLEMS["G 64"], dtype=torch.float16),
    "G 64, determinant": replace(PROBLEMS["G 64"], form="determinant"),
    "G 8, D 64": replace(PROBLEMS["G 8"], head_dim=64),
    "G 8, 128 x 128": replace(PROBLEMS["G 8"], seq=160, kv_heads=2, w1=128, w2=128),
    "G 8, float16": replace(PROBLEMS["G 8"], kv_heads=2, dtype=torch.float16),
    "G 4, float16": replace(PROBLEMS["G 4"], kv_heads=4, dtype=torch.float16),
    "G 1, float16": replace(PROBLEMS["G 1"], kv_heads=8, dtype=torch.float16),
    "G 8, float16, biases": replace(
        PROBLEMS["G 8"], kv_heads=2, dtype=torch.float16, k2_bias=1.0, v2_bias=1.0
    ),
    "G 8, strassen": replace(PROBLEMS["G 8"], kv_heads=2, form="strassen"),
    "G 8, determinant": replace(PROBLEMS["G 8"], kv_heads=2, form="determinant"),
}


@dataclass(frozen=True)
class Errors:
    """Relative errors by tensor, and who served the forward and the backward."""

    of: dict[str, float]
    served_by: str


def relative(got: Tensor, exact: Tensor) -> float:
    """Return the error in the 2-norm, relative to the exact tensor's; both finite."""
    return (torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact)).item()


def exact(problem: Problem) -> dict[str, Tensor]:
    """Return out, lse and the gradients in float64, a key-value head at a time: they are large."""
    kv_heads = problem.inputs[1].shape[1]
    group = problem.inputs[0].shape[1] // kv_heads
    found: list[dict[str, Tensor]] = []
    for head in range(kv_heads):

        def cut(t: Tensor, head: int = head) -> Tensor:
            if not t.is_floating_point():
                return t  # bounds and starts, which all heads share
            return t[:, head * group : (head + 1) * group] if t.shape[1] != kv_heads else (
                t[:, head : head + 1]
            )  # fmt: skip

        found.append(run_attn(reference.attn, problem.mapped(cut).to(torch.float64)))
    return {name: torch.cat([f[name] for f in found], 1) for name in found[0]}


def errors(problem: Problem, truth: dict[str, Tensor]) -> Errors:
    """Run the operator, forward and backward, and return how far each tensor is from the truth."""
    got = run_attn(torch.ops.simplex.attn, problem)
    return Errors({name: relative(got[name], truth[name]) for name in truth}, _served_by(problem))


def both(problem: Problem) -> tuple[Errors, Errors]:
    """Return the errors of the kernels that serve best, and of the portable ones."""
    from csrc_free.attn import portable_alone

    truth = exact(problem)
    ours = errors(problem, truth)
    with portable_alone():
        return ours, errors(problem, truth)


def rounded_queries(problem: Problem) -> Tensor:
    """Return out in float64 but for one thing: q∘k2 is rounded to the dtype of q."""
    q, k1, k2, v1, v2 = problem.inputs
    w1, w2 = problem.windows
    assert w1 is not None
    assert w2 is not None
    group, seq = q.shape[1] // k1.shape[1], q.shape[2]
    found = []
    for head in range(q.shape[1]):
        of = head // group
        virtual = (q[:, head, :, None].float() * k2[:, of, None].float()).to(q.dtype)
        s = torch.einsum("bikd,bjd->bijk", virtual.double(), k1[:, of].double())
        s *= q.shape[3] ** -0.5
        distance = torch.arange(seq, device=q.device)[:, None] - torch.arange(seq, device=q.device)
        sees1, sees2 = ((distance >= 0) & (distance < w) for w in (w1, w2))
        s = s.masked_fill(~(sees1[:, :, None] & sees2[:, None]), -torch.inf)
        p = s.flatten(2).softmax(-1).unflatten(2, (seq, seq))
        found.append(
            torch.einsum("bijk,bjd,bkd->bid", p, v1[:, of].double(), v2[:, of].double())
        )  # fmt: skip
    return torch.stack(found, 1)


def _served_by(problem: Problem) -> str:
    if problem.inputs[0].device.type != "cuda":
        return "cpu, cpu"
    from csrc_free import attn
    from simplex_ops.devices.gpu import kernel_arguments

    q, k1, k2, v1, v2 = problem.inputs
    arguments = kernel_arguments(*problem.windows, q, problem.options)
    forward = attn.forward_served_by(q, k1, k2, v1, v2, **arguments)
    assert problem.dout is not None
    backward = attn.backward_served_by(problem.dout, q, k1, k2, v1, v2, **arguments)
    return f"{forward.split(':')[0]}, {backward.split(':')[0]}"


def tables(
    names: list[str], device: str, say: Callable[[Table], None]
) -> Iterator[dict[str, object]]:
    """Measure the problems by score scale; yield a line for each, and say a table for each."""
    for name in names:
        table = Table(title=f"{name}: error, and its ratio to the portable kernels'")
        for heading in ("q times", "out", "lse", "dq", "dk1", "dk2", "dv1", "dv2", "served by"):
            table.add_column(heading, justify="right", no_wrap=True)
        for scale in SCALES:
            problem = Problem.of(replace(PROBLEMS[name], amplitude=scale), device)
            ours, portable = both(problem)
            ratios = {tensor: ours.of[tensor] / portable.of[tensor] for tensor in ours.of}
            cells = (f"{ours.of[t]:.1e} {ratios[t]:.2f}" for t in ours.of)
            table.add_row(f"{scale:g}", *cells, ours.served_by)
            yield {
                "problem": name, "scale": scale, "errors": ours.of, "portable": portable.of,
                "ratios": ratios, "served_by": ours.served_by,
            }  # fmt: skip
        say(table)


def roundings(name: str, device: str, say: Callable[[Table], None]) -> Iterator[dict[str, object]]:
    """Measure what rounding q∘k2 alone does to out, beside the error of the whole."""
    table = Table(title=f"{name}: error of out, and that of rounding q∘k2 alone")
    for heading in ("q times", "a score's deviation", "rounding alone", "Hopper", "portable"):
        table.add_column(heading, justify="right", no_wrap=True)
    for scale in SCALES:
        case = replace(PROBLEMS[name], kv_heads=1, batch=1, amplitude=scale)
        problem = Problem.of(case, device)
        truth = exact(problem)["out"]
        alone = relative(rounded_queries(problem), truth)
        ours, portable = both(problem)
        cells = (scale, alone, ours.of["out"], portable.of["out"])
        table.add_row(f"{scale:g}", f"{scale:g}", *(f"{cell:.1e}" for cell in cells[1:]))
        yield {
            "problem": name, "scale": scale, "rounding of q∘k2": alone,
            "out": ours.of["out"], "portable out": portable.of["out"],
        }  # fmt: skip
    say(table)


def main(
    problem: Annotated[list[str] | None, typer.Option(help="by name; default: all")] = None,
    device: Annotated[str, typer.Option(help="a GPU")] = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json", help="append JSON lines")] = None,
) -> None:
    """Print how far the kernels are from float64, by group and by score scale."""
    console = Console(width=150)
    facts = environment(device_named(device, kinds=("cuda",)))
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), soft_wrap=True)
    names = problem or list(PROBLEMS)
    unknown = set(names) - set(PROBLEMS)
    if unknown:
        raise typer.BadParameter(f"no problem {unknown}; there are: {', '.join(PROBLEMS)}")
    _serve_all()
    lines = list(tables(names, device, console.print))
    for name in ("G 64", "G 64, float16"):
        if name in names:
            lines += roundings(name, device, console.print)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with json_file.open("a") as stream:
            stream.writelines(json.dumps({**line, **facts}) + "\n" for line in lines)


def _serve_all() -> None:
    with contextlib.suppress(ImportError):  # no triton, and so no such kernels
        from tools.fuzz.hopper import serve_all

        serve_all()


if __name__ == "__main__":
    typer.run(main)
