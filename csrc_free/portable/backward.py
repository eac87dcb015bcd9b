"""The portable backward: which kernels run, on which buffers. No atomics; repeatable bit for bit.

The wide pair's gradients come from one kernel, dq and the narrow pair's from another; where groups
are large, all four key-value gradients come from one kernel and dq from another.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from csrc_free.portable import keys, pairs, query, wide
from csrc_free.portable.gradients import PairGradients
from csrc_free.problem import Problem
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Config, Device, Traits


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernels the backward runs, and how."""

    wide: wide.Config  # the wide pair's gradients
    query: query.Config  # dq alone
    keys: keys.Config  # dq and the narrow pair's gradients, narrow key by narrow key
    tiles_of_a_part: int  # of `keys`
    # The same offset by offset; None: take `keys`.
    query_with_parts: query.Config | None  # pyright: ignore[reportInvalidTypeForm]
    pairs: pairs.Config | None  # all four key-value gradients at once; None: the others

    @property
    def configs(self) -> tuple[Config, ...]:
        """Return the configs of all kernels that may run."""
        all_of_them = (self.wide, self.query, self.keys, self.query_with_parts, self.pairs)
        return tuple(config for config in all_of_them if config is not None)


@functools.cache
def choose(traits: Traits, device: Device) -> Choice:
    """Choose the backward's kernels and their tiles."""
    return Choice(
        wide=wide.choose(traits, device),
        query=query.choose(traits, device),
        keys=keys.choose(traits, device),
        tiles_of_a_part=keys.tiles_of_a_part(traits, device),
        query_with_parts=query.choose_with_parts(traits, device),
        pairs=pairs.choose(traits, device),
    )


def write_gradients(
    problem: Problem, statistics: Statistics, dq: Tensor | None,
    wide_pair: PairGradients, narrow_pair: PairGradients,
) -> None:  # fmt: skip
    """Write the gradients that have a tensor: dq, and those of the wide pair and the narrow one."""
    choice = choose(problem.traits(statistics.dout), problem.device)
    given = problem, statistics
    needs_narrow = any(grad is not None for grad in narrow_pair)
    needs_wide = any(grad is not None for grad in wide_pair)
    if (
        needs_narrow
        and choice.pairs is not None
        and pairs.write_pairs(*given, choice.pairs, wide_pair, narrow_pair)
    ):
        needs_narrow = needs_wide = False
    if needs_wide:
        wide.write_wide(*given, choice.wide, wide_pair)
    if not needs_narrow:
        if dq is not None:
            query.write_query(*given, choice.query, dq)
        return
    dq = torch.empty_like(problem.q) if dq is None else dq
    config = choice.query_with_parts
    if config is None or not query.write_query_and_narrow(*given, config, dq, narrow_pair):
        keys.write_query_and_narrow(*given, choice.keys, choice.tiles_of_a_part, dq, narrow_pair)


def pairs_serve(problem: Problem, statistics: Statistics) -> bool:
    """Tell whether the narrow pair's gradients come from a kernel that leaves dq to another."""
    return choose(problem.traits(statistics.dout), problem.device).pairs is not None
