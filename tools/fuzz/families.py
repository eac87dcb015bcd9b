"""Problems for the Hopper kernels from few compile-time constants, so that thousands can be run.

A `Family` fixes what a kernel is compiled for: heads to a key-value head, columns, dtype, form,
which arguments are there, the class of its windows. All else is drawn: lengths, windows within the
class, bounds, starts, strides, biases, values and their size.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from simplex_ops.testing import Case, cases
from simplex_ops.testing.case import BOUNDS, LAYOUTS_OF_ONE
from simplex_ops.testing.strategies import sizes_within

# Rows whose batch or head stride is 0 have no descriptor, and take the portable kernels.
LAYOUTS = ("contiguous", "transposed", "fused", "strided")
LAYOUTS_OF_GRADIENTS = tuple(layout for layout in LAYOUTS_OF_ONE if layout != "expanded")
# Of q, and so of the logits. Beyond, a rounding of q∘k2 or k1∘k2 moves a logit by its own size, and
# whether gradients keep to a budget of a few draws is luck: tests/kernels hold them otherwise.
AMPLITUDES = (1.0, 1.0, 1.0, 0.0, 8.0)
LARGE_AMPLITUDES = (30.0, 100.0)  # of the forward alone
NO_GRADIENT = (False,) * 5
_AMPLITUDES_OF_A_FAMILY = st.sampled_from(
    [(amplitude, True) for amplitude in AMPLITUDES * 2]
    + [(amplitude, False) for amplitude in LARGE_AMPLITUDES * 2]
)
GROUPS = (*range(1, 9), 10, 12, 13, 16, 20, 24, 28, 31, 32, 40, 48, 63, 64)
DIMS = st.sampled_from((40, 48, 64, 72, 80, 96, 104, 120, 128))


@dataclass(frozen=True)
class Family:
    """What is constant for a kernel, and ranges of what is not.

    Attributes:
        name: in the counts.
        group: query heads of a key-value head.
        dims: D and Dv.
        seq: range of N.
        wide_rows, wide: ranges of the wide pair's rows and window; no rows: as many as queries.
        narrow_rows, narrow: the same of the narrow pair; no rows: as many as queries.
        batch, kv_heads: a range of B, and Hkv.
        has_bias: k2 and v2 have biases.
        is_exchanged: k1 and v1 are the narrow pair, so that biases are the wide pair's.
        has_bounds, has_starts: kv_bounds and q_start are there.
        has_gradients: the backward has kernels here too.
        through: which outputs carry a gradient.
    """

    name: str
    group: int
    dims: tuple[int, int]
    seq: tuple[int, int]
    wide: tuple[int, int]
    narrow: tuple[int, int]
    wide_rows: tuple[int, int] | None = None
    narrow_rows: tuple[int, int] | None = None
    batch: tuple[int, int] = (1, 2)
    kv_heads: int = 1
    form: str = "trilinear"
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = True
    has_bias: bool = False
    is_exchanged: bool = False
    has_bounds: bool = False
    has_starts: bool = False
    has_gradients: bool = True
    through: str = "both"


# A narrow window's range is of one lag of the key side's warpgroups, or of one size of tiles where
# `wide` and `narrow` serve (16, 32 or 64 keys); every lag and every size is some family's.
# Programs that only prepare or add up are shared where families have columns and kv_heads alike,
# and so are parts of the narrow gradients that hold all narrow rows, or none of them.
FAMILIES = (
    Family("64 heads", 64, (128, 128), (1, 9), (40, 64), (8, 40), (60, 100), (8, 44)),
    Family(
        "64 heads, two-sided, bounds, starts", 64, (128, 128), (1, 4), (97, 128), (5, 30),
        (193, 256), (8, 40), is_causal=False, has_bounds=True, has_starts=True,
    ),
    Family(
        "64 heads, windows alike", 64, (128, 128), (1, 9), (56, 64), (48, 56), (60, 100), (60, 100),
    ),
    Family(
        "64 heads, two groups", 64, (128, 128), (1, 3), (385, 512), (8, 40), (490, 530), (20, 44),
    ),
    Family(
        "64 heads, strassen, biases", 64, (64, 64), (1, 8), (65, 128), (4, 7), (128, 140),
        (16, 40), form="strassen", has_bias=True, has_bounds=True,
    ),
    Family(
        "64 heads, float16", 64, (128, 128), (1, 6), (129, 192), (8, 36), (192, 200), (8, 40),
        dtype=torch.float16,
    ),
    Family(
        "8 heads, float16, biases", 8, (128, 128), (8, 20), (94, 101), (17, 31), (120, 140),
        (60, 80), dtype=torch.float16, has_bias=True,
    ),
    Family("8 heads, tail", 8, (128, 128), (74, 90), (58, 73), (17, 31)),
    Family("8 heads, long", 8, (128, 128), (8, 20), (378, 393), (17, 31), (393, 410), (60, 80)),
    Family(
        "8 heads, two-sided, bounds, starts", 8, (128, 128), (16, 24), (94, 101), (9, 16),
        (201, 240), (9, 16), is_causal=False, has_bounds=True, has_starts=True,
    ),
    Family(
        "8 heads, determinant", 8, (128, 128), (8, 20), (94, 101), (17, 31), (120, 140), (60, 80),
        form="determinant",
    ),
    Family(
        "12 heads, exchanged, biases", 12, (96, 80), (4, 30), (190, 205), (32, 40),
        (205, 220), (32, 40), has_bias=True, is_exchanged=True, kv_heads=2,
    ),
    Family(
        "32 heads, float16, strassen", 32, (128, 96), (2, 12), (128, 143), (4, 40), (143, 160),
        (4, 40), form="strassen", dtype=torch.float16, has_bias=True, has_gradients=False,
    ),
    Family(
        "4 heads, biases, starts", 4, (128, 128), (16, 40), (50, 65), (9, 16), (129, 150), (9, 24),
        has_bias=True, has_starts=True, through="out",
    ),
    Family(
        "1 head, bounds", 1, (128, 128), (64, 90), (66, 129), (33, 40), (129, 140), (40, 48),
        has_bounds=True,
    ),
)  # fmt: skip


@st.composite
def member(draw: st.DrawFn, family: Family) -> Case:
    """Draw a problem of a family."""

    def within(bounds: tuple[int, int]) -> int:
        """Draw one of a range, and often its end or a whole number of tiles."""
        low, high = bounds
        whole = [*range(-(-low // 64) * 64, high + 1, 64)]
        return draw(st.integers(low, high) | st.sampled_from([*whole, high]))

    seq = within(family.seq)
    wide = (seq if family.wide_rows is None else within(family.wide_rows), within(family.wide))
    narrow = (
        seq if family.narrow_rows is None else within(family.narrow_rows), within(family.narrow)
    )  # fmt: skip
    k2_bias = v2_bias = 0.0
    if family.has_bias:
        k2_bias = draw(st.sampled_from((1.0, -0.5)))
        v2_bias = draw(st.sampled_from((0.0, 1.0, -0.5)))
    asked = st.sampled_from([(True,) * 5] * 4 + [None]).flatmap(
        lambda usual: st.tuples(*[st.booleans()] * 5) if usual is None else st.just(usual)
    )
    amplitude, has_gradients = draw(_AMPLITUDES_OF_A_FAMILY)
    return replace(
        _case(family, within(family.batch), seq, wide, narrow),
        scale=draw(st.sampled_from((None, None, None, 0.1, -0.15))),
        k2_bias=k2_bias,
        v2_bias=v2_bias,
        bounds=draw(st.sampled_from(BOUNDS[1:])) if family.has_bounds else "none",
        starts=draw(st.sampled_from(("end", "random"))) if family.has_starts else "none",
        layout=draw(st.sampled_from(LAYOUTS)),
        grad_mask=draw(asked) if family.has_gradients and has_gradients else NO_GRADIENT,
        amplitude=amplitude,
        seed=draw(st.integers(0, 2**31 - 1)),
        layout_of_gradients=draw(st.sampled_from(LAYOUTS_OF_GRADIENTS)),
        layout_of_positions=draw(st.sampled_from(LAYOUTS_OF_ONE)),
    )


def largest_member(family: Family) -> Case:
    """Return the problem at the upper end of every range of a family."""
    seq = family.seq[1]
    wide = ((family.wide_rows or family.seq)[1], family.wide[1])
    narrow = ((family.narrow_rows or family.seq)[1], family.narrow[1])
    return replace(
        _case(family, family.batch[1], seq, wide, narrow),
        k2_bias=1.0 if family.has_bias else 0.0,
        bounds="ranges" if family.has_bounds else "none",
        starts="end" if family.has_starts else "none",
        grad_mask=(family.has_gradients,) * 5,
    )


def _case(
    family: Family, batch: int, seq: int, wide: tuple[int, int], narrow: tuple[int, int]
) -> Case:
    """Return a problem of a family; of each pair, how many rows and the window."""
    (keys1, w1), (keys2, w2) = (narrow, wide) if family.is_exchanged else (wide, narrow)
    return Case(
        batch=batch,
        kv_heads=family.kv_heads,
        group=family.group,
        seq=seq,
        keys1=None if keys1 == seq else keys1,
        keys2=None if keys2 == seq else keys2,
        head_dim=family.dims[0],
        value_dim=None if family.dims[0] == family.dims[1] else family.dims[1],
        w1=w1,
        w2=w2,
        is_causal=family.is_causal,
        form=family.form,
        dtype=family.dtype,
        through=family.through,
    )


@st.composite
def any_constants(draw: st.DrawFn, max_work: int) -> Case:
    """Draw a problem for the Hopper kernels, what they are compiled for included."""
    case = draw(
        cases(dtypes=(torch.bfloat16,) * 3 + (torch.float16,), layouts=LAYOUTS, max_seq=160)
    )
    group = draw(st.sampled_from(GROUPS))
    kv_heads = draw(st.integers(1, max(1, min(4, 64 // group))))
    batch = draw(st.integers(1, 3))
    head_dim, value_dim = draw(DIMS), draw(DIMS)
    # A tile of several positions serves where there are as many queries.
    fewest = 64 >> (group - 1).bit_length()
    seq = draw(st.integers(fewest, fewest + 60))
    keys1, keys2 = (draw(st.just(seq) | st.integers(4, 200)) for _ in range(2))
    seq, keys1, keys2 = sizes_within(
        max_work, batch * group * kv_heads, max(head_dim, value_dim), (seq, keys1, keys2),
        fewest=(fewest, 4, 4),
    )  # fmt: skip
    amplitude, has_gradients = draw(_AMPLITUDES_OF_A_FAMILY)
    # A forward is one compilation, gradients are three or four more.
    has_gradients &= draw(st.sampled_from((True, False)))
    return replace(
        case,
        grad_mask=case.grad_mask if has_gradients else NO_GRADIENT,
        batch=batch,
        group=group,
        kv_heads=kv_heads,
        seq=seq,
        keys1=None if keys1 == seq else keys1,
        keys2=None if keys2 == seq else keys2,
        head_dim=head_dim,
        value_dim=None if value_dim == head_dim else value_dim,
        amplitude=amplitude,
        scale=draw(st.sampled_from((None, None, 0.1, -0.15))),
        layout_of_gradients=draw(st.sampled_from(LAYOUTS_OF_GRADIENTS)),
    )
