"""A 2-simplicial attention problem as the kernels see it: a narrow pair, a wide pair, and numbers.

The narrow pair is virtualised: a query attends, for every key of its narrow window, to the whole
wide window. Which of (k1, v1) and (k2, v2) is narrow follows from the windows alone.
"""

import dataclasses
import functools
import math
from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import tracing
from csrc_free.device.descriptors import are_rows_aligned, can_describe, describe
from csrc_free.device.forms import CODES
from csrc_free.precision import precision_of
from csrc_free.rounding import next_power_of_2
from csrc_free.traits import Device, Traits, device_of

_SMALLEST_DOT = 16
Pair = TypeVar("Pair")

# Sizes that change from call to call: one compiled kernel serves them all.
NOT_SPECIALIZED = (
    "seq", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "q_start_default",
    "slots", "part_rows", "part_shift",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """The two pairs in their roles, and the numbers that every kernel takes."""

    q: Tensor  # [B, H, N, D]
    k_wide: Tensor  # [B, Hkv, M_wide, D]
    v_wide: Tensor  # [B, Hkv, M_wide, Dv]
    k_narrow: Tensor  # [B, Hkv, M_narrow, D]
    v_narrow: Tensor  # [B, Hkv, M_narrow, Dv]
    wide_reach: tuple[int, int]
    narrow_reach: tuple[int, int]
    is_exchanged: bool  # (k1, v1) is the narrow pair
    scale: float
    form: str
    k2_bias: float
    v2_bias: float
    kv_bounds: Tensor | None
    q_start: Tensor | None
    device: Device
    precision: str | None  # of matrix products, as `precision_of` says
    wide_parts: tuple[Tensor, Tensor] | None = None  # what is read for k_wide and v_wide, if any

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k_wide.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the five inputs as they are read, the wide pair before the narrow one."""
        return self.q, *self._wide, self.k_narrow, self.v_narrow

    @property
    def _wide(self) -> tuple[Tensor, Tensor]:
        return self.wide_parts or (self.k_wide, self.v_wide)

    @property
    def log2_scale(self) -> float:
        """Return the factor that takes a logit to the exponent of a power of two."""
        return self.scale * math.log2(math.e)

    def strides(self) -> tuple[int, ...]:
        """Return the strides of batch, heads and rows of the five inputs."""
        return tuple(s for t in self.tensors for s in t.stride()[:3])

    def by_role(self, first: Pair, second: Pair) -> tuple[Pair, Pair]:
        """Return what is of the wide pair and of the narrow one; the call back is the same."""
        return by_role(self.is_exchanged, first, second)

    def described(self, block_n: int) -> tuple[Tensor | TensorDescriptor, ...]:
        """Return the five inputs, the wide pair through descriptors of `block_n` rows."""
        wide = (describe(t, block_n, block(t.shape[3])) for t in self._wide)
        return self.q, *wide, self.k_narrow, self.v_narrow

    def traits(self, dout: Tensor | None = None) -> Traits:
        """Return what launch choices depend on; those of the backward depend on dout too."""
        rows = () if dout is None else (self.q, dout)
        # Parts are read by pointers: 0.21 ms, by descriptors 0.30 (B1 N2048 H8 Hkv2 D64, 128 x 16,
        # forward; H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30).
        is_whole = self.precision != "bf16x6"
        return Traits(
            group=self.group,
            block_d=block(self.q.shape[3]),
            block_dv=block(self.v_wide.shape[3]),
            dtype=self.q.dtype,
            form=self.form,
            is_describable=is_whole and can_describe(self.k_wide) and can_describe(self.v_wide),
            are_rows_describable=all(map(can_describe, rows)),
            are_keys_aligned=are_rows_aligned(self.k_wide) and are_rows_aligned(self.v_wide),
            precision=self.precision,
        )

    @functools.cached_property
    def keys(self) -> int:
        """Return M, the number of key positions."""
        return torch.sym_max(self.k_wide.shape[2], self.k_narrow.shape[2])

    @property
    def narrow_width(self) -> int:
        """Return how many narrow keys a query sees at most."""
        return min(sum(self.narrow_reach) + 1, self.k_narrow.shape[2])

    @property
    def wide_first(self) -> int:
        """Return the key position of the wide pair's first row."""
        return self.keys - self.k_wide.shape[2]

    @property
    def narrow_first(self) -> int:
        """Return the key position of the narrow pair's first row."""
        return self.keys - self.k_narrow.shape[2]

    def sizes(self) -> tuple[int, ...]:
        """Return kv_heads, seq, rows of each pair, reaches up to 2^30 and the default q_start."""
        seq, wide_rows, narrow_rows = (t.shape[2] for t in (self.q, self.k_wide, self.k_narrow))
        reaches = (min(r, 2**30) for r in (*self.wide_reach, *self.narrow_reach))
        return self.k_wide.shape[1], seq, wide_rows, narrow_rows, *reaches, self.keys - seq

    def numbers(self) -> tuple[int, ...]:
        """Return kv_heads, seq, rows of each pair, lowered reaches and the default q_start.

        A reach is lowered by 2^31 for `device.tiles.window_of`: so what is unbounded is an int32,
        and one compiled kernel serves it too.
        """
        seq, wide_rows, narrow_rows = (t.shape[2] for t in (self.q, self.k_wide, self.k_narrow))
        reaches = (min(r, 2**32 - 1) - 2**31 for r in (*self.wide_reach, *self.narrow_reach))
        return self.k_wide.shape[1], seq, wide_rows, narrow_rows, *reaches, self.keys - seq

    def biases(self) -> tuple[float, ...]:
        """Return the biases of k_wide, v_wide, k_narrow and v_narrow."""
        wide, narrow = self.by_role((0.0, 0.0), (self.k2_bias, self.v2_bias))
        return wide + narrow

    def constants(self, *others: Tensor | None) -> dict[str, object]:
        """Return the compile-time constants that every kernel takes.

        Offsets are of 64 bits where an input, or one of the kernel's other tensors, needs them.
        """
        is_near = self._are_inputs_near and all(
            _is_within_int32(t) for t in others if t is not None
        )
        has_bias = self.k2_bias != 0.0 or self.v2_bias != 0.0
        head_dim, value_dim = self.q.shape[3], self.v_wide.shape[3]
        return {
            "FORM": CODES[self.form],
            "SIGN": -1 if self.is_exchanged else 1,
            "GROUP": self.group,
            "INDEX": tl.int32 if is_near else tl.int64,
            "HAS_BOUNDS": self.kv_bounds is not None,
            "HAS_Q_START": self.q_start is not None,
            "HAS_WIDE_BIAS": has_bias and self.is_exchanged,
            "HAS_NARROW_BIAS": has_bias and not self.is_exchanged,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": block(head_dim),
            "BLOCK_DV": block(value_dim),
            "DOT_DTYPE": tl.bfloat16 if self.q.dtype == torch.bfloat16 else tl.float32,
            "PRECISION": self.precision,
        }

    @functools.cached_property
    def _are_inputs_near(self) -> bool:
        return all(map(_is_within_int32, self.tensors))


@functools.cache
def block(dim: int) -> int:
    """Return the power of two that holds `dim` columns of a matrix product."""
    return max(_SMALLEST_DOT, next_power_of_2(dim))


def problem_of(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor,
    reach1: tuple[int, int], reach2: tuple[int, int],
    scale: float, form: str, k2_bias: float, v2_bias: float,
    kv_bounds: Tensor | None, q_start: Tensor | None,
) -> Problem:  # fmt: skip
    """Give each pair its role, and copy only what no kernel can read in place.

    A reach is the (left, right) of a window: how many keys before the query and after it.
    """
    q, k1, k2, v1, v2 = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k1, k2, v1, v2))
    is_exchanged = _is_narrower(reach1, reach2, k1.shape[2], k2.shape[2])
    wide, narrow = by_role(is_exchanged, (k1, v1, reach1), (k2, v2, reach2))
    device = device_of(q.device)
    columns = block(max(q.shape[3], v1.shape[3]))
    return Problem(
        q, wide[0], wide[1], narrow[0], narrow[1], wide[2], narrow[2], is_exchanged,
        scale, form, k2_bias, v2_bias,
        None if kv_bounds is None else kv_bounds.contiguous(),
        None if q_start is None else q_start.contiguous(),
        device, precision_of(q.dtype, columns, device),
    )  # fmt: skip


def by_role(is_exchanged: bool, first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Return (wide, narrow): the first pair is the wide one, unless they are exchanged."""
    return (second, first) if is_exchanged else (first, second)


def _is_within_int32(tensor: Tensor) -> bool:
    """Tell whether a tensor's last element is within 2^31 elements of its first."""
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tracing.holds(extent < 2**31)


def _is_narrower(reach: tuple[int, int], than: tuple[int, int], rows: int, others: int) -> bool:
    """Tell whether a window over so many rows is narrower than another over its own.

    Where both have as many, their number does not matter: a trace then serves any.
    """
    width, other = reach[0] + reach[1] + 1, than[0] + than[1] + 1
    if tracing.holds(rows == others):
        return tracing.holds(width < other)
    return tracing.holds(torch.sym_min(width, rows) < torch.sym_min(other, others))
