"""The error budget: an implementation may err as plain PyTorch in its dtype errs, times `slack`."""

import torch
from torch import Tensor


def assert_within_budget(
    name: str, got: Tensor, exact: Tensor, rounded: Tensor, *, slack: float = 2.0
) -> None:
    """Hold `got` to `slack` times the error that plain PyTorch makes in the same dtype.

    The budget is one number for the whole tensor, slack * (max |rounded - exact| + one rounding
    step of the largest exact value), so that no judgement rests on the smallest elements.
    Where `exact` is infinite (the lse of a query that sees nothing), `got` must be equal to it.

    Args:
        name: what is judged, for the message.
        got: of any dtype.
        exact: the reference computed in float64.
        rounded: the reference computed in the dtype of the inputs that `got` was computed from.
        slack: how many times plain PyTorch's error is allowed.

    Raises:
        AssertionError: another shape, a value that is not finite, or an error over the budget.
        ValueError: `rounded` is not finite where `exact` is, so that there is no budget.
    """
    reason = _wrong(got, exact, rounded, name, slack)
    if reason is not None:  # from one line, so that hypothesis takes all for one failure
        raise AssertionError(f"{name}: {reason}")


def _wrong(got: Tensor, exact: Tensor, rounded: Tensor, name: str, slack: float) -> str | None:
    if got.shape != exact.shape:
        return f"shape {list(got.shape)}, not {list(exact.shape)}"
    if exact.numel() == 0:
        return None
    got, exact, rounded, eps = (
        got.detach(),
        exact.detach().double(),
        rounded.detach().double(),
        torch.finfo(got.dtype).eps,
    )
    finite = exact.isfinite()
    wrong = got.isnan() | (got.isfinite() != finite)
    if wrong.any():
        return f"{_first(wrong, got)} where exact is {exact[wrong][0].item()}"
    if (got[~finite] != exact[~finite]).any():
        return "another infinity"
    if not finite.any():
        return None
    got, exact, rounded = got.double()[finite], exact[finite], rounded[finite]
    if not rounded.isfinite().all():
        raise ValueError(f"{name}: plain PyTorch in this dtype overflows here: there is no budget")
    errors = (got - exact).abs()
    step = eps * exact.abs().max().item()
    budget = slack * ((rounded - exact).abs().max().item() + step)
    error = errors.max().item()
    if error <= budget:
        return None
    return (
        f"error {error:.2e} is over its budget {budget:.2e} "
        f"({got[errors.argmax()].item():.6g} where exact is {exact[errors.argmax()].item():.6g})"
    )


def _first(where: Tensor, values: Tensor) -> str:
    index = where.nonzero()[0].tolist()
    return f"{values[tuple(index)].item()} at {index} (one of {int(where.sum())})"
