"""What this project tests itself with, for those who fuzz their own models, backends and hardware.

    from hypothesis import given
    from simplex_ops.testing import assert_matches_reference, cases

    @given(cases())
    def test_my_backend(case):
        assert_matches_reference(case, my_attn, device="cuda")

`assert_matches_reference` holds out, lse and the five gradients of any differentiable function
with the arguments of `torch.ops.simplex.attn` to an error budget against float64. A case prints as
the Python expression that makes it again. `cases` needs hypothesis (the extra `testing`).
"""

from typing import TYPE_CHECKING, Any

from simplex_ops.testing.budget import assert_within_budget
from simplex_ops.testing.case import Case
from simplex_ops.testing.oracle import Problem, assert_matches_reference, judge, run_attn

if TYPE_CHECKING:
    from simplex_ops.testing.strategies import cases

__all__ = [
    "Case",
    "Problem",
    "assert_matches_reference",
    "assert_within_budget",
    "cases",
    "judge",
    "run_attn",
]


def __getattr__(name: str) -> Any:
    if name == "cases":
        from simplex_ops.testing.strategies import cases

        return cases
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
