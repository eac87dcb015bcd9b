"""The oracle: the reference in float64 and in the dtype of the inputs, and what is held to it."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from simplex_ops import reference
from simplex_ops.testing.budget import assert_within_budget
from simplex_ops.testing.case import Case

Attn = Callable[..., tuple[Tensor, Tensor]]
"""A function with the arguments and results of `torch.ops.simplex.attn`, autograd's included."""

INPUTS = ("q", "k1", "k2", "v1", "v2")
JUDGED_WHERE_THEY_ARE = {"cpu", "cuda"}  # others may have no float64: judged on the CPU
DRAWS = 3
# Up to 256 elements of out, or 64 rows, each of which has one delta: the largest of few draws is a
# matter of luck. A float16 dk1 of 24 rows was 1.2 of a budget of 3 draws, and 0.75 of one of 12.
DRAWS_OF_A_SMALL_PROBLEM = 12


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

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name: inputs, those of the options, dout and dlse."""
        named = {**dict(zip(INPUTS, self.inputs, strict=True)), **self.options}
        named |= {"dout": self.dout, "dlse": self.dlse}
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        """Return the same problem with every tensor changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            inputs=tuple(map(change, self.inputs)),
            options={name: changed(value) for name, value in self.options.items()},
            dout=changed(self.dout),
            dlse=changed(self.dlse),
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


def run_attn(attn: Attn, problem: Problem) -> dict[str, Tensor]:
    """Run an implementation forward and backward; return out, lse, dq, dk1, dk2, dv1, dv2.

    A gradient that was not asked for is not there; one that does not flow (to v1 from lse alone)
    is zero.

    Raises:
        TypeError: `attn` returned no pair of tensors.
    """
    leaves = tuple(
        t.detach().requires_grad_(needed)
        for t, needed in zip(problem.inputs, problem.grad_mask, strict=True)
    )
    results = attn(*leaves, *problem.windows, **problem.options)
    if not (
        isinstance(results, (tuple, list))
        and len(results) == 2
        and all(isinstance(t, Tensor) for t in results)
    ):
        raise TypeError(f"attn must return a pair of tensors (out, lse), got {type(results)}")
    out, lse = results
    asked = [t for t in leaves if t.requires_grad]
    given = [
        (t, g)
        for t, g in ((out, problem.dout), (lse, problem.dlse))
        if g is not None and t.requires_grad
    ]
    found: Sequence[Tensor] = [torch.zeros_like(t) for t in asked]
    if asked and given:
        found = torch.autograd.grad(
            [t for t, _ in given],
            asked,
            [g for _, g in given],
            allow_unused=True,
            materialize_grads=True,
        )
    names = [f"d{name}" for name, t in zip(INPUTS, leaves, strict=True) if t.requires_grad]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}


def judge(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (exact, rounded): the reference's results in float64, and in the inputs' dtype.

    They are on the problem's device where that is known to have float64, else on the CPU.

    The error of `rounded` is the error that plain PyTorch makes. In float64, which has no wider
    dtype to be judged in, it is that of float32 scaled down, twice: `exact` errs as well. On a
    small problem it is a matter of luck. So to it is added what a few roundings do, found by
    running the reference in float64 a few times with these moved, up or down at random, and
    keeping the largest change:

    - Every input and incoming gradient, by a step of the dtype: what an algorithm may cost that
      is stable on an ill-conditioned problem. It counts twice in float32 and float64, where every
      operation rounds; half in float16 and bfloat16, where products are summed in float32 and
      only what stands between two products is rounded.
    - Every row of the inputs, as a whole, by sqrt(D) / 6 steps of the dtype that products are
      summed in: how far D additions in a chain, each rounded to nearest, move a sum (one standard
      deviation, the sum growing evenly).
    - The sum that lse is the logarithm of, by a step: lse by eps, however near 0 it is.
    - Out and lse, which a backward is given, by a step of their dtypes: plain PyTorch keeps all the
      probabilities instead. Out moves the gradients by way of delta = dout·out, itself a chain
      (all the error where a single pair is visible: the exact dq is 0). Lse moves the probabilities
      P = exp(s - lse) of its row by a factor eps * (1 + |lse|), all rows alike (the constant that
      goes from e to 2 as base), or each its own way; and by sqrt(D) / 6 as much again, since s is
      summed a second time.
    """
    if problem.inputs[0].device.type not in JUDGED_WHERE_THEY_ARE:
        problem = problem.mapped(Tensor.cpu)
    dtype = problem.inputs[0].dtype
    exact = run_attn(reference.attn, problem.to(torch.float64))
    plain = torch.float32 if dtype == torch.float64 else dtype
    roundings = 0.5 if plain.itemsize == 2 else 2.0
    shrink = 1.0 if plain == dtype else 2.0 * torch.finfo(dtype).eps / torch.finfo(plain).eps
    rounded = run_attn(reference.attn, problem.to(plain))
    wide = problem.to(torch.float64)
    is_small = exact["out"].numel() <= 256 or exact["lse"].numel() <= 64
    draws = DRAWS_OF_A_SMALL_PROBLEM if is_small else DRAWS
    signs = _Signs.of(wide, exact, draws)
    moved = [
        run_attn(reference.attn, _moved(wide, plain, exact, signs, alike=draw == 0))
        for draw in range(draws)
    ]
    for name, value in rounded.items():
        truth = exact[name]
        error = (value.double() - truth).abs()
        error += roundings * torch.stack([(other[name] - truth).abs() for other in moved]).amax(0)
        if name == "lse":
            error += torch.finfo(value.dtype).eps
        rounded[name] = torch.where(truth.isfinite(), truth + shrink * error, truth)
    return exact, rounded


def assert_matches_reference(
    case: Case | Problem,
    attn: Attn | None = None,
    *,
    device: torch.device | str = "cpu",
    slack: float = 2.0,
) -> dict[str, Tensor]:
    """Run `attn` on a case and hold everything it returns to the contract; return its results.

    Held are values (out, lse and the gradients asked for, to the error budget), shapes, dtypes,
    that no gradient comes where none was asked for, and that every tensor that was given, dout,
    dlse, kv_bounds and q_start included, is left as it was.

    Args:
        case: what to run.
        attn: the implementation; None is `torch.ops.simplex.attn`. Where it is what
            `torch.compile` returned, Dynamo is reset first: after its recompile limit (8) the
            other cases would run eager.
        device: where to run it.
        slack: see `assert_within_budget`.

    Raises:
        AssertionError: with the case's expression at the end.
        RuntimeError: compiled code inside `attn` came to Dynamo's recompile limit.
    """
    problem = Problem.of(case, device) if isinstance(case, Case) else case
    try:
        got = run_leaving(problem, torch.ops.simplex.attn if attn is None else attn)
        assert_results(problem, got, slack=slack)
    except Exception as error:
        if isinstance(case, Case):
            error.add_note(f"reproduce with: {case!r}")
        raise
    return got


def run_leaving(problem: Problem, attn: Attn) -> dict[str, Tensor]:
    """Do as `run_attn`; raise where anything that was given does not hold what it held."""
    before = problem.mapped(Tensor.clone).tensors()
    with _never_eager_for_compiled(attn):
        got = run_attn(attn, problem)
    written = differing(before, problem.tensors())
    assert not written, f"{', '.join(written)} written to, and must be left as given"
    return got


def assert_results(problem: Problem, got: dict[str, Tensor], *, slack: float = 2.0) -> None:
    """Hold results to shapes, dtypes, presence, and the budget that `judge` gives them."""
    exact, rounded = judge(problem)
    dtype = problem.inputs[0].dtype
    assert got.keys() == exact.keys(), f"{list(got)} came, not {list(exact)}"
    judged = zip(got, *(_on_cpu(list(of.values())) for of in (got, exact, rounded)), strict=True)
    for name, value, truth, error in judged:
        wanted = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        assert value.dtype == wanted, f"{name} is {value.dtype}, not {wanted}"
        assert_within_budget(name, value, truth, error, slack=slack)


def differing(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose shapes or values differ, a NaN being the same as a NaN."""
    alike = [name for name, t in old.items() if t.shape == new[name].shape]
    same = [((old[n] == new[n]) | (old[n].isnan() & new[n].isnan())).all() for n in alike]
    found = dict(zip(alike, torch.stack(same).tolist(), strict=True)) if same else {}
    return [name for name in old if not found.get(name, False)]


def _on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Return them on the CPU by one copy: on a GPU each waits for whoever else uses it, too."""
    if tensors[0].device.type != "cuda":
        return [t.cpu() for t in tensors]
    flat = torch.cat([t.double().flatten() for t in tensors]).cpu()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


@contextmanager
def _never_eager_for_compiled(attn: Attn) -> Iterator[None]:
    """Raise where Dynamo would run eager what it compiled too often; first forget earlier cases."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and it takes seconds to import
        yield
        return
    import torch._dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit

    if hasattr(attn, "_torchdynamo_orig_callable") or hasattr(attn, "_orig_mod"):
        torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise RuntimeError(
            "attn must be compiled for every case, and Dynamo's recompile limit "
            f"({torch._dynamo.config.recompile_limit}) is reached: cases after it would run "
            "eager. Give what torch.compile returned as attn, which is reset for each case, or "
            "call torch._dynamo.reset() before each"
        ) from error


@dataclass
class _Signs:
    """Signs at random, the same on every device: drawn on the CPU, copied at once, and taken."""

    left: Tensor

    @classmethod
    def of(cls, exact: Problem, results: dict[str, Tensor], draws: int) -> "_Signs":
        """Draw what so many calls of `_moved` take."""
        inputs = sum(t.numel() + t[..., 0].numel() for t in exact.inputs)
        count = draws * (inputs + 2 * sum(results[name].numel() for name in ("out", "lse")))
        generator = torch.Generator("cpu").manual_seed(0)
        bits = torch.randint(0, 2, (count,), generator=generator, device="cpu", dtype=torch.int8)
        return cls(bits.to(exact.inputs[0].device))

    def __call__(self, like: Tensor) -> Tensor:
        taken, self.left = self.left.tensor_split([like.numel()])
        return taken.view(like.shape).to(like.dtype) * 2 - 1


def _moved(
    exact: Problem, dtype: torch.dtype, results: dict[str, Tensor], signs: _Signs, *, alike: bool
) -> Problem:
    """Return a float64 problem with all that is rounded to `dtype` moved, signs at random."""
    out, lse = results["out"], results["lse"]
    eps = torch.finfo(dtype).eps
    eps_of_lse = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    inputs = tuple(
        t * (1 + eps * signs(t) + eps_of_lse * _chain(t) * signs(t[..., :1])) for t in exact.inputs
    )
    size = 1 + lse.masked_fill(lse.isneginf(), 0.0).abs()
    step = eps_of_lse * (1 + _chain(inputs[0])) * size
    factor = 1 + (step if alike else step * signs(lse))  # of P, [B, H, N]
    dout = dlse = None
    shift = torch.zeros_like(lse)
    if exact.dout is not None:
        dout = exact.dout * (1 + eps * signs(out)) * factor[..., None]
        terms = exact.dout * out
        shift = eps * (terms * signs(out)).sum(-1)
        shift += eps_of_lse * _chain(out) * terms.sum(-1) * signs(lse)
    if exact.dlse is not None:
        dlse = exact.dlse * factor
    if exact.dout is not None:
        dlse = shift if dlse is None else dlse + shift
    return Problem(inputs, exact.windows, exact.options, dout, dlse, exact.grad_mask)


def _chain(rows: Tensor) -> float:
    """Return how many rounding steps the sum of a row's elements is off, if added one by one."""
    return rows.shape[-1] ** 0.5 / 6
