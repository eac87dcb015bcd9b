"""A test case: a whole problem in one frozen, printable value."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "fused", "strided", "expanded")
BOUNDS = ("none", "documents", "padding", "ranges", "wild")
STARTS = ("none", "end", "random")
THROUGH = ("out", "lse", "both")


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k1, k2, v1, v2."""


@dataclass(frozen=True)
class Case:
    """A problem for `torch.ops.simplex.attn` and its backward: sizes, options and a seed.

    Its repr is the Python expression that makes it again (with `import torch` and
    `from simplex_ops.testing import Case`), fields at their default left out.

    Attributes:
        batch: B.
        kv_heads: Hkv.
        group: G, query heads for each key-value head; H = G * Hkv.
        seq: N, queries.
        keys1: M1; None is N.
        keys2: M2; None is N.
        head_dim: D.
        value_dim: Dv; None is D.
        w1: window of (k1, v1), in keys; None is unbounded.
        w2: window of (k2, v2).
        bounds: what kv_bounds is: "none"; "documents" packed end to end; "padding" on either
            side of each row; "ranges", one for each query, some empty; "wild", also
            reversed and far outside [0, M].
        starts: what q_start is: "none"; "end", M - N said aloud; "random", also before the first
            key and after the last.
        layout: strides of the five inputs: "contiguous"; "transposed", seen through a transpose
            of [B, N, H, D]; "fused", slices of one [B, N, all heads, D]; "strided", steps of two
            along every dimension; "expanded", one batch row seen B times (stride 0).
        through: which outputs carry a gradient.
        grad_mask: which of q, k1, k2, v1, v2 ask for a gradient.
        amplitude: multiplies q, and so the logits.
        seed: of the values.
    """

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    seq: int = 8
    keys1: int | None = None
    keys2: int | None = None
    head_dim: int = 8
    value_dim: int | None = None
    w1: int | None = None
    w2: int | None = None
    scale: float | None = None
    is_causal: bool = True
    form: str = "trilinear"
    k2_bias: float = 0.0
    v2_bias: float = 0.0
    bounds: str = "none"
    starts: str = "none"
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    through: str = "out"
    grad_mask: tuple[bool, ...] = (True,) * 5
    amplitude: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("bounds", BOUNDS),
            ("starts", STARTS),
            ("layout", LAYOUTS),
            ("through", THROUGH),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    def __repr__(self) -> str:
        said = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"Case({', '.join(said)})"

    @property
    def m1(self) -> int:
        return self.seq if self.keys1 is None else self.keys1

    @property
    def m2(self) -> int:
        return self.seq if self.keys2 is None else self.keys2

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of q, k1, k2, v1, v2."""
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        heads = self.group * self.kv_heads
        return (
            (self.batch, heads, self.seq, self.head_dim),
            (self.batch, self.kv_heads, self.m1, self.head_dim),
            (self.batch, self.kv_heads, self.m2, self.head_dim),
            (self.batch, self.kv_heads, self.m1, value_dim),
            (self.batch, self.kv_heads, self.m2, value_dim),
        )

    @property
    def windows(self) -> tuple[int | None, int | None]:
        return self.w1, self.w2

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """Return q, k1, k2, v1, v2: normal, the same on every device, requiring no gradient."""
        generator = self.generator()
        values = [torch.randn(shape, generator=generator) for shape in self.shapes]
        values[0] *= self.amplitude
        laid = _lay_out(self.layout, [v.to(self.dtype) for v in values])
        q, k1, k2, v1, v2 = (_moved(t, device) for t in laid)
        return q, k1, k2, v1, v2

    def cotangents(self, device: torch.device | str = "cpu") -> tuple[Tensor | None, Tensor | None]:
        """Return dout [B, H, N, Dv] and dlse [B, H, N], None for an output without gradient."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        (batch, heads, seq, _), value_dim = self.shapes[0], self.shapes[3][3]
        dout = torch.randn(batch, heads, seq, value_dim, generator=generator).to(self.dtype)
        dlse = torch.randn(batch, heads, seq, generator=generator)
        dlse = dlse.double() if self.dtype == torch.float64 else dlse
        return (
            None if self.through == "lse" else dout.to(device),
            None if self.through == "out" else dlse.to(device),
        )

    def kv_bounds(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return the int32 [B, N, 2] that `bounds` asks for, or None."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        m, shape = max(self.m1, self.m2), (self.batch, self.seq)

        def draw(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, max(high, low + 1), size, generator=generator)

        if self.bounds == "none":
            return None
        if self.bounds == "documents":
            inner = draw(0, m + 1, self.batch, 2).sort(1).values  # three documents
            key = (torch.arange(self.seq) + m - self.seq).clamp(min=0).expand(shape)
            document = torch.searchsorted(inner, key.contiguous(), right=True)
            edges = torch.nn.functional.pad(inner, (1, 0), value=0)
            edges = torch.nn.functional.pad(edges, (0, 1), value=m)
            start, end = edges.gather(1, document), edges.gather(1, document + 1)
        elif self.bounds == "padding":
            edges = draw(0, m + 1, self.batch, 2).sort(1).values
            start, end = (edges[:, i : i + 1].expand(shape) for i in (0, 1))
        elif self.bounds == "ranges":
            start = draw(0, m + 1, *shape)
            end = (start + draw(0, m + 1, *shape)).clamp(max=m)
        else:
            start, end = draw(-2 * m - 2, 2 * m + 2, *shape), draw(-2 * m - 2, 2 * m + 2, *shape)
            far = torch.iinfo(torch.int32)
            start = torch.where(draw(0, 4, *shape) == 0, far.min, start)
            end = torch.where(draw(0, 4, *shape) == 0, far.max, end)
        return torch.stack((start, end), -1).to(device, torch.int32)

    def q_start(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return the int32 [B] that `starts` asks for, or None."""
        generator = torch.Generator().manual_seed(self.seed + 3)
        m = max(self.m1, self.m2)
        if self.starts == "none":
            return None
        if self.starts == "end":
            return torch.full((self.batch,), m - self.seq, dtype=torch.int32, device=device)
        low = -self.seq - 1
        return torch.randint(low, m + 2, (self.batch,), generator=generator).to(device, torch.int32)

    def options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the keyword arguments of the operator."""
        return {
            "scale": self.scale,
            "is_causal": self.is_causal,
            "form": self.form,
            "k2_bias": self.k2_bias,
            "v2_bias": self.v2_bias,
            "kv_bounds": self.kv_bounds(device),
            "q_start": self.q_start(device),
        }


def _lay_out(layout: str, values: list[Tensor]) -> list[Tensor]:
    """Return the same values in other strides; what lies between them is NaN."""
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return [v.transpose(1, 2).contiguous().transpose(1, 2) for v in values]
    if layout == "strided":
        laid = []
        for v in values:
            wide = v.new_full([2 * size for size in v.shape], torch.nan)
            wide[::2, ::2, ::2, ::2] = v
            laid.append(wide[::2, ::2, ::2, ::2])
        return laid
    if layout == "expanded":
        return [v[:1].expand(v.shape) for v in values]
    # fused: one buffer [B, rows, heads of all five, widest head] holds them all
    batch = values[0].shape[0]
    rows, width = max(v.shape[2] for v in values), max(v.shape[3] for v in values)
    fused = values[0].new_full((batch, rows, sum(v.shape[1] for v in values), width), torch.nan)
    laid, head = [], 0
    for v in values:
        view = fused[:, : v.shape[2], head : head + v.shape[1], : v.shape[3]].transpose(1, 2)
        view.copy_(v)
        laid.append(view)
        head += v.shape[1]
    return laid


def _moved(t: Tensor, device: torch.device | str) -> Tensor:
    """Return t on the device with the strides it has."""
    if t.device == torch.device(device):
        return t
    storage = t.untyped_storage()
    flat = torch.empty(0, dtype=t.dtype).set_(storage)  # type: ignore[call-overload]
    return flat.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
