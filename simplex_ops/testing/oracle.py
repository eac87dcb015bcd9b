"""The oracle: the reference run in float64 and in the inputs' dtype, and an implementation held to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from simplex_ops import reference
from simplex_ops.testing.budget import assert_within_budget
from simplex_ops.testing.case import Case

Attn = Callable[..., tuple[Tensor, Tensor]]
"""A function with the arguments and results of `torch.ops.simplex.attn`, autograd's included."""

INPUTS = ("q", "k1", "k2", "v1", "v2")
RESULTS = ("out", "lse", "dq", "dk1", "dk2", "dv1", "dv2")


@dataclass(frozen=True)
class Problem:
    """What an implementation is given: five inputs, windows, options, and what comes back.

    Attributes:
        inputs: q, k1, k2, v1, v2, requiring no gradient.
        windows: w1, w2.
        options: keyword arguments of the operator.
        dout: gradient of out, or None.
        dlse: gradient of lse, or None. It is not used where a query sees nothing.
        grad_mask: which inputs ask for a gradient.
    """

    inputs: tuple[Tensor, ...]
    windows: tuple[int | None, int | None] = (None, None)
    options: dict[str, Any] = field(default_factory=dict)
    dout: Tensor | None = None
    dlse: Tensor | None = None
    grad_mask: tuple[bool, ...] = (True,) * 5

    @classmethod
    def of(cls, case: Case, device: torch.device | str = "cpu") -> "Problem":
        """Return the problem that a case describes."""
        dout, dlse = case.cotangents(device)
        return cls(
            case.inputs(device), case.windows, case.options(device), dout, dlse, case.grad_mask
        )

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same problem in another dtype, contiguous."""
        wide = torch.promote_types(dtype, torch.float32)
        return Problem(
            tuple(t.to(dtype).contiguous() for t in self.inputs),
            self.windows,
            self.options,
            None if self.dout is None else self.dout.to(dtype),
            None if self.dlse is None else self.dlse.to(wide),
            self.grad_mask,
        )


def run_attn(attn: Attn, problem: Problem) -> dict[str, Tensor | None]:
    """Run an implementation forward and backward; return out, lse, dq, dk1, dk2, dv1, dv2.

    None stands where no gradient was asked for, zeros where none flows (to v1 from lse alone).
    """
    leaves = tuple(
        t.detach().requires_grad_(needed)
        for t, needed in zip(problem.inputs, problem.grad_mask, strict=True)
    )
    out, lse = attn(*leaves, *problem.windows, **problem.options)
    asked = [t for t in leaves if t.requires_grad]
    given = [
        (t, g)
        for t, g in ((out, problem.dout), (lse, problem.dlse))
        if g is not None and t.requires_grad
    ]
    found = [torch.zeros_like(t) for t in asked]
    if asked and given:
        found = torch.autograd.grad(
            [t for t, _ in given],
            asked,
            [g for _, g in given],
            allow_unused=True,
            materialize_grads=True,
        )
    gradients = iter(found)
    grads = [next(gradients) if t.requires_grad else None for t in leaves]
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *grads), strict=True))


def judge(problem: Problem) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Return (exact, rounded): the reference's results in float64, and in the inputs' dtype.

    Two things are added to `rounded`, which is the error that plain PyTorch makes:

    - A backward that was given out has it rounded to its dtype, and so has delta = dout·out. It
      moves the gradients as a gradient of lse of eps * Σ|dout out| would. Where the exact gradient
      is a small difference of large terms (a single visible pair: zero), this is all the error.
    - float64 has no wider dtype to be judged in: the error of float32 stands for it, scaled down
      by the ratio of the rounding steps, so that `exact` may err as much.
    """
    dtype = problem.inputs[0].dtype
    exact = run_attn(reference.attn, problem.to(torch.float64))
    plain = torch.float32 if dtype == torch.float64 else dtype
    shrink = torch.finfo(dtype).eps / torch.finfo(plain).eps
    rounded = run_attn(reference.attn, problem.to(plain))
    saved = _moved_by_rounding_out(problem, exact, torch.finfo(dtype).eps)
    for name, value in rounded.items():
        truth = exact[name]
        if value is not None and truth is not None:
            error = (value.double() - truth).abs() * shrink
            rounded[name] = torch.where(
                truth.isfinite(), truth + error + saved.get(name, 0.0), truth
            )
    return exact, rounded


def assert_matches_reference(
    case: Case | Problem,
    attn: Attn | None = None,
    *,
    device: torch.device | str = "cpu",
    slack: float = 2.0,
) -> dict[str, Tensor | None]:
    """Run `attn` on a case and hold everything it returns to the contract; return its results.

    Held are values (out, lse and the gradients asked for, to the error budget), shapes, dtypes,
    that no gradient comes where none was asked for, and that the inputs are left as they were.

    Args:
        case: what to run.
        attn: the implementation; None is `torch.ops.simplex.attn`.
        device: where to run it.
        slack: see `assert_within_budget`.

    Raises:
        AssertionError: with the case's expression at the end.
    """
    problem = Problem.of(case, device) if isinstance(case, Case) else case
    attn = torch.ops.simplex.attn if attn is None else attn
    before = [t.clone() for t in problem.inputs]
    try:
        got = run_attn(attn, problem)
        for name, old, new in zip(INPUTS, before, problem.inputs, strict=True):
            assert torch.equal(old, new), f"{name} was written to"
        assert_results(problem, got, slack=slack)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"reproduce with: {case!r}")
        raise
    return got


def assert_results(
    problem: Problem, got: dict[str, Tensor | None], *, slack: float = 2.0
) -> None:
    """Hold results to shapes, dtypes, presence, and the budget that `judge` gives them."""
    exact, rounded = judge(problem)
    dtype = problem.inputs[0].dtype
    for name, value in got.items():
        truth, error = exact[name], rounded[name]
        if truth is None or error is None:
            assert value is None, f"{name} came though it was not asked for"
            continue
        assert value is not None, f"{name} is missing"
        wanted = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        assert value.dtype == wanted, f"{name} is {value.dtype}, not {wanted}"
        assert_within_budget(name, value, truth, error, slack=slack)


def _moved_by_rounding_out(
    problem: Problem, exact: dict[str, Tensor | None], eps: float
) -> dict[str, Tensor]:
    """Return by how much each gradient moves when out is off by a rounding step, signs at random."""
    if problem.dout is None or not any(problem.grad_mask):
        return {}
    out = exact["out"]
    assert out is not None
    size = eps * (problem.dout.double() * out).abs().sum(-1)  # [B, H, N]
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, size.shape, generator=generator).to(size) * 2 - 1
    wide = problem.to(torch.float64)
    moved: dict[str, Tensor] = {}
    for dlse in (size, size * sign):
        step = Problem(
            wide.inputs, wide.windows, wide.options, None, dlse, problem.grad_mask
        )
        for name, grad in run_attn(reference.attn, step).items():
            if name.startswith("d") and grad is not None:
                moved[name] = torch.maximum(moved.get(name, grad.abs()), grad.abs())
    return moved
