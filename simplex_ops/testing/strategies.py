"""Hypothesis strategies over the whole contract: `cases` draws a `Case`, its seed included."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from simplex_ops.contract.checks import FORMS
from simplex_ops.testing.case import BOUNDS, LAYOUTS, LAYOUTS_OF_ONE, STARTS, THROUGH, Case

GROUPS = (1, 2, 3, 6, 7)
LARGE_GROUPS = (8, 12, 16, 32, 64)
HEAD_DIMS = (8, 16, 24, 33, 48, 64, 65, 80, 96, 128, 192, 255, 256)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    forms: Sequence[str] = FORMS,
    layouts: Sequence[str] = LAYOUTS,
    max_batch: int = 3,
    max_heads: int = 64,
    max_seq: int = 24,
    max_head_dim: int = 256,
    max_work: int = 1_000_000,
) -> Case:
    """Draw a problem: every option of the operator, bounds, starts, and strides of every tensor.

    Args:
        draw: hypothesis gives it.
        dtypes: of the inputs.
        forms: of the logit.
        layouts: kinds of strides of the five inputs, of `simplex_ops.testing.case.LAYOUTS`.
        max_batch: largest B.
        max_heads: largest H.
        max_seq: largest N, M1 and M2; windows reach beyond it.
        max_head_dim: largest D and Dv; sizes up to 20 are the rule.
        max_work: bound on B * H * N * M1 * (M2 + D), the elements that the reference stores:
            N and the keys are cut until it holds.
    """
    batch = draw(_mostly(st.integers(1, max_batch), st.just(0)))
    group = draw(_groups(max_heads))
    kv_heads = draw(st.integers(1, max(1, min(4, max_heads // group))))
    head_dim = draw(_head_dims(max_head_dim))
    value_dim = draw(st.none() | _head_dims(max_head_dim))
    sizes = [draw(_mostly(st.integers(1, max_seq), st.just(0)))]
    for _ in range(2):
        sizes.append(draw(_mostly(st.just(sizes[0]), st.integers(0, max_seq), often=2)))
    widest = max(head_dim, value_dim or 0)
    seq, keys1, keys2 = sizes_within(max_work, batch * group * kv_heads, widest, sizes)
    return Case(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        seq=seq,
        keys1=None if keys1 == seq else keys1,
        keys2=None if keys2 == seq else keys2,
        head_dim=head_dim,
        value_dim=None if value_dim == head_dim else value_dim,
        w1=draw(_windows(max_seq)),
        w2=draw(_windows(max_seq)),
        scale=draw(_mostly(st.none(), st.sampled_from((1.0, 0.25, 0.0, -0.3)))),
        is_causal=draw(st.booleans()),
        form=draw(st.sampled_from(forms)),
        k2_bias=draw(st.sampled_from((0.0, 1.0, -0.5))),
        v2_bias=draw(st.sampled_from((0.0, 1.0, -0.5))),
        bounds=draw(_mostly(st.just("none"), st.sampled_from(BOUNDS), often=1)),
        starts=draw(_mostly(st.just("none"), st.sampled_from(STARTS), often=2)),
        layout=draw(st.sampled_from(layouts)),
        dtype=draw(st.sampled_from(dtypes)),
        through=draw(st.sampled_from(THROUGH[::-1])),
        grad_mask=draw(_mostly(st.just((True,) * 5), st.tuples(*[st.booleans()] * 5))),
        amplitude=draw(_mostly(st.just(1.0), st.sampled_from((4.0, 0.0)))),
        seed=draw(st.integers(0, 2**31 - 1)),
        layout_of_gradients=draw(st.sampled_from(LAYOUTS_OF_ONE)),
        layout_of_positions=draw(st.sampled_from(LAYOUTS_OF_ONE)),
    )


def sizes_within(
    max_work: int, rows: int, columns: int, sizes: Sequence[int], fewest: Sequence[int] = (1, 1, 1)
) -> tuple[int, ...]:
    """Cut (N, M1, M2) by thirds until the reference stores at most `max_work` elements.

    It stores rows · N · M1 · (M2 + columns), for B · H rows. No size goes below its `fewest`.
    """
    seq, keys1, keys2 = sizes
    while rows * seq * keys1 * (keys2 + columns) > max_work:
        before = seq, keys1, keys2
        seq, keys1, keys2 = (
            min(size, max(least, size * 2 // 3)) for size, least in zip(before, fewest, strict=True)
        )
        if (seq, keys1, keys2) == before:
            break
    return seq, keys1, keys2


def _mostly(usual: st.SearchStrategy, rare: st.SearchStrategy, often: int = 5) -> st.SearchStrategy:
    """Draw `usual` `often` times for one `rare`."""
    return st.sampled_from([usual] * often + [rare]).flatmap(lambda strategy: strategy)


def _groups(most: int) -> st.SearchStrategy[int]:
    small, large = ([g for g in groups if g <= most] for groups in (GROUPS, LARGE_GROUPS))
    return _mostly(st.sampled_from(small), st.sampled_from(large or small), often=2)


def _head_dims(most: int) -> st.SearchStrategy[int]:
    large = [size for size in HEAD_DIMS if size <= most]
    return _mostly(st.integers(1, min(20, most)), st.sampled_from(large or [most]), often=2)


def _windows(max_seq: int) -> st.SearchStrategy[int | None]:
    beyond = st.sampled_from((max_seq + 7, 10**6, 2**31 - 1, 2**40))
    return _mostly(st.integers(1, max_seq) | st.none(), beyond)
