"""The backward on Hopper: which kernels run for one problem, and why not the others.

It has two halves, the key-value gradients and dq. Where only one of them has a kernel here, the
other runs on the portable kernels.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from csrc_free.hopper import backward_narrow as narrow_side
from csrc_free.hopper import backward_query as query
from csrc_free.hopper import half_range
from csrc_free.hopper.backward_keys import backward_keys
from csrc_free.hopper.backward_wide import KEYS as WIDE_KEYS
from csrc_free.hopper.backward_wide import backward_wide
from csrc_free.hopper.key_plan import MOST_HEADS, Plan, plan_of, splits_of_wide, why_not_half
from csrc_free.hopper.ordered import columns_of, gradients_of, ordered
from csrc_free.hopper.spans import spans_of
from csrc_free.hopper.within_int32 import why_not_int32, within_int32
from csrc_free.portable import backward as portable
from csrc_free.portable.gradients import PairGradients, complete
from csrc_free.problem import Problem, block
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import parts_of_wide_keys
from csrc_free.traits import Traits

# Query heads of a key-value head: at 4 the portable dq took 7.5 ms for 8.0 (B4 N2048 H32 Hkv8;
# H100, 2026-11-25). With it a backward of determinants took 30.6 ms for 18.8 (B2 N2048 H32 Hkv8;
# H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30).
_SLOWER_UP_TO = 4
# From here on the portable kernels round k_wide∘k_narrow as `keys` does (trilinear, bfloat16).
_KEYS_FROM = 32


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which half runs here, and how; a string says why it does not."""

    keys: Plan | str  # all four key-value gradients
    # The wide pair's alone: how many programs share a tile. None: `keys` runs.
    wide: int | str | None
    query: query.Config | narrow_side.Config | str  # the latter fills the narrow pair's as well

    @property
    def reasons(self) -> dict[str, str]:
        """Return why each half that does not run here does not."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), str)
        }

    @property
    def has_kernels_here(self) -> bool:
        """Tell whether any half runs here."""
        is_of_keys = isinstance(self.keys, Plan) or isinstance(self.wide, int)
        return is_of_keys or not isinstance(self.query, str)

    @property
    def served_by(self) -> str:
        """Say which kernels run here, and why not what the portable ones are left with."""
        served, portable = [], []
        if isinstance(self.keys, Plan):
            served.append("keys")
        elif isinstance(self.wide, int):
            served.append("wide")
        else:
            reasons = dict.fromkeys(filter(None, (self.keys, self.wide)))
            portable.append(f"keys and values: {'; '.join(reasons)}")
        if isinstance(self.query, str):
            portable.append(f"dq: {self.query}")
        else:
            served.append("query" if isinstance(self.query, query.Config) else "narrow")
        parts = [f"hopper ({', '.join(served)})"] if served else []
        return ", ".join(parts + ([f"portable: {', '.join(portable)}"] if portable else []))


def choose(problem: Problem, dout: Tensor) -> Choice:
    """Choose the kernels of the backward; it reads shapes and strides alone."""
    reason = why_not_int32(problem)
    if reason is not None:
        return Choice(keys=reason, wide=reason, query=reason)
    traits = dataclasses.replace(problem.traits(dout), block_d=block(columns_of(problem)))
    keys, wide, both = (
        plan_of(problem, dout),
        splits_of_wide(problem, dout),
        _query_and_narrow(problem, traits),
    )
    may_round_keys = problem.group >= _KEYS_FROM and problem.form == "trilinear"
    if isinstance(wide, int) and not isinstance(both, str) and not may_round_keys:
        keys = "it rounds k1∘k2 where the forward rounded q∘k2; `wide` and `narrow` do not"
    if isinstance(keys, Plan):
        return Choice(keys=keys, wide=None, query=_query_alone(problem, traits))
    if isinstance(both, str) and problem.group > 2:
        return Choice(keys=keys, wide=wide, query=_query_alone(problem, traits))
    return Choice(keys=keys, wide=wide, query=both)


def _query_and_narrow(problem: Problem, traits: Traits) -> narrow_side.Config | str:
    """Choose the kernel of dq and the narrow pair's gradients, or say why it does not run."""
    reason = why_not_half(problem)
    if reason is not None:
        return reason
    if any(problem.biases()[:2]):
        return "a bias of the wide pair"
    config = narrow_side.choose(traits, problem.device, narrow_side.width_of(problem))
    if config is None:
        return (
            f"for 1 to {MOST_HEADS} heads, D and Dv of one size of tile, and a narrow "
            f"window of up to {narrow_side.WIDEST} keys"
        )
    if narrow_side.share_of(problem, config) is None:
        return "the parts of the narrow pair's gradients would take more memory than they may"
    return config


def _query_alone(problem: Problem, traits: Traits) -> query.Config | str:
    """Choose the kernel of dq alone, or say why it does not run."""
    reason = why_not_half(problem)
    if reason is not None:
        return reason
    config = query.choose(traits, problem.device)
    if config is None:
        return "for D and Dv of one size of tile, and 3 to 64 heads"
    if problem.group <= _SLOWER_UP_TO and problem.form != "determinant":
        return f"for more than {_SLOWER_UP_TO} heads: up to there the portable kernel is faster"
    return config


def write_gradients(
    problem: Problem, statistics: Statistics, choice: Choice,
    dq: Tensor | None, wide: PairGradients, narrow: PairGradients,
) -> None:  # fmt: skip
    """Write the gradients that have a tensor: dq, and those of the wide pair and the narrow one."""
    nothing: PairGradients = (None, None)
    near = within_int32(problem)
    if choice.has_kernels_here:
        near = ordered(near)
    ranges = None
    if choice.has_kernels_here and problem.q.dtype == torch.float16:
        ranges = half_range.ranges_of(near, statistics)
    if isinstance(choice.keys, Plan) and any(grad is not None for grad in (*wide, *narrow)):
        dk_wide, dv_wide = complete(wide, problem.k_wide, problem.v_wide)
        dk_narrow, dv_narrow = complete(narrow, problem.k_narrow, problem.v_narrow)
        with gradients_of(problem, dk_wide, dk_narrow) as (dk_wide, dk_narrow):
            grads = dk_wide, dv_wide, dk_narrow, dv_narrow
            _run_keys(near, statistics, choice.keys, grads, ranges)
        wide, narrow = nothing, nothing
    elif isinstance(choice.wide, int) and any(grad is not None for grad in wide):
        dk_wide, dv_wide = complete(wide, problem.k_wide, problem.v_wide)
        spans = spans_of(near, WIDE_KEYS)
        with gradients_of(problem, dk_wide) as (dk_wide,):
            backward_wide(
                near, statistics, dk_wide, dv_wide, spans, choice.wide,
                _scaled(near, statistics, ranges),
            )  # fmt: skip
        wide = nothing
    fills_narrow = isinstance(choice.query, narrow_side.Config)
    if fills_narrow and any(grad is not None for grad in (dq, *narrow)):
        dq = torch.empty_like(problem.q) if dq is None else dq
        dk_narrow, dv_narrow = complete(narrow, problem.k_narrow, problem.v_narrow)
        with gradients_of(problem, dq, dk_narrow) as (dq, dk_narrow):
            _run_narrow(near, statistics, choice.query, (dq, dk_narrow, dv_narrow), ranges)
        dq, narrow = None, nothing
    # A portable kernel that fills the narrow pair's gradients may write dq on its way.
    is_beside = all(grad is None for grad in narrow) or portable.pairs_serve(problem, statistics)
    if isinstance(choice.query, query.Config) and dq is not None and is_beside:
        scaled = _scaled(near, statistics, ranges, is_by_row=True)
        with gradients_of(problem, dq) as (place,):
            query.backward_query(near, statistics, place, choice.query, scaled)
        dq = None
    portable.write_gradients(problem, statistics, dq, wide, narrow)


def _run_keys(
    problem: Problem, statistics: Statistics, plan: Plan, grads: tuple[Tensor, ...],
    ranges: half_range.Ranges | None,
) -> None:  # fmt: skip
    """Write the key-value gradients, some key-value heads at a time: all in the same memory."""
    grads = (*grads, *(ranges or ()))
    for some, given, (dk_wide, dv_wide, dk_narrow, dv_narrow, *some_ranges) in _some_heads(
        problem, statistics, grads, (plan.batch, plan.kv_heads)
    ):
        parts = parts_of_wide_keys(some, plan.keys * plan.tiles)
        assert parts is not None, "the plan holds them to less than the limit"
        scaled = _scaled(some, given, some_ranges, is_of_keys=True)
        spans = spans_of(some, plan.keys)
        backward_keys(some, given, plan, parts, dk_wide, dv_wide, spans, scaled)
        parts.sum_into(dk_narrow, dv_narrow, some, scaled and scaled.of_parts)
        del parts


def _run_narrow(
    problem: Problem, statistics: Statistics, config: narrow_side.Config,
    grads: tuple[Tensor, ...], ranges: half_range.Ranges | None,
) -> None:  # fmt: skip
    """Write dq and the narrow pair's gradients, some key-value heads at a time."""
    share = narrow_side.share_of(problem, config)
    assert share is not None, "the choice holds them to what they may take"
    grads = (*grads, *(ranges or ()))
    for some, given, (dq, dk, dv, *some_ranges) in _some_heads(problem, statistics, grads, share):
        scaled = _scaled(some, given, some_ranges, is_by_row=True)
        narrow_side.write_query_and_narrow(some, given, (dq, dk, dv), config, scaled)


def _scaled(
    problem: Problem, statistics: Statistics, ranges: Sequence[Tensor] | None, *,
    is_of_keys: bool = False, is_by_row: bool = False,
) -> half_range.Scaled | None:  # fmt: skip
    """Return what a kernel takes for float16; where there are no ranges, nothing."""
    if not ranges:
        return None
    ranges = half_range.Ranges(*ranges)
    return half_range.scaled(
        problem, statistics, ranges, is_of_keys=is_of_keys, is_by_row=is_by_row
    )


def _some_heads(
    problem: Problem, statistics: Statistics, grads: tuple[Tensor, ...], share: tuple[int, int]
) -> Iterator[tuple[Problem, Statistics, tuple[Tensor, ...]]]:
    """Split a problem, `share` (batch rows, key-value heads) at a time."""
    batch, kv_heads = problem.k_wide.shape[:2]
    if share == (batch, kv_heads):
        yield problem, statistics, grads
        return
    some_batch, some_heads = share
    for b in range(0, batch, some_batch):
        for h in range(0, kv_heads, some_heads):
            rows, heads = slice(b, b + some_batch), slice(h, h + some_heads)
            q_heads = slice(h * problem.group, (h + some_heads) * problem.group)

            def cut(
                tensor: Tensor, rows: slice = rows, heads: slice = heads, q_heads: slice = q_heads
            ) -> Tensor:
                return tensor[rows, heads if tensor.shape[1] == kv_heads else q_heads]

            def cut_rows(tensor: Tensor | None, rows: slice = rows) -> Tensor | None:
                return None if tensor is None else tensor[rows]

            some = dataclasses.replace(
                problem,
                q=problem.q[rows, q_heads],
                k_wide=cut(problem.k_wide),
                v_wide=cut(problem.v_wide),
                k_narrow=cut(problem.k_narrow),
                v_narrow=cut(problem.v_narrow),
                kv_bounds=cut_rows(problem.kv_bounds),
                q_start=cut_rows(problem.q_start),
            )
            given = Statistics(
                statistics.dout[rows, q_heads],
                cut(statistics.delta),
                cut(statistics.lse2),
                cut(statistics.has_huge).contiguous(),
            )
            yield some, given, tuple(map(cut, grads))
