"""A test case: a whole problem in one frozen, printable value."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "fused", "strided", "expanded")
LAYOUTS_OF_ONE = ("contiguous", "transposed", "strided", "expanded")  # no others to fuse it with
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
        layout_of_gradients: strides of dout and dlse: "contiguous"; "transposed", as where out is
            seen through a transpose; "strided"; "expanded", one number everywhere (stride 0), as
            out.sum() gives.
        layout_of_positions: strides of kv_bounds and q_start: "contiguous", "transposed",
            "strided", or "expanded", one batch row seen B times.
        through: which outputs carry a gradient.
        grad_mask: which of q, k1, k2, v1, v2 ask for a gradient.
        amplitude: multiplies q, and so the logits.
        seed: of the values.

    Raises:
        ValueError: a kind that is none of those named, a size below 0, a grad_mask of other length.
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
    layout_of_gradients: str = "contiguous"
    layout_of_positions: str = "contiguous"
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
            ("layout_of_gradients", LAYOUTS_OF_ONE),
            ("layout_of_positions", LAYOUTS_OF_ONE),
            ("through", THROUGH),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        sizes = {"batch": self.batch, "group": self.group, "seq": self.seq}
        sizes |= {"keys1": self.m1, "keys2": self.m2}
        for name, size in sizes.items():
            if size < 0:
                raise ValueError(f"{name} must be at least 0, got {size}")
        if len(self.grad_mask) != 5:
            raise ValueError(
                f"grad_mask must have 5 entries, for q, k1, k2, v1 and v2, got {self.grad_mask}"
            )

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
        return torch.Generator("cpu").manual_seed(self.seed)

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """Return q, k1, k2, v1, v2: normal, the same on every device, requiring no gradient."""
        generator = self.generator()
        values = [_normal(shape, generator) for shape in self.shapes]
        values[0] *= self.amplitude
        laid = _lay_out(self.layout, [v.to(self.dtype) for v in values])
        q, k1, k2, v1, v2 = (_moved(t, device) for t in laid)
        return q, k1, k2, v1, v2

    def cotangents(self, device: torch.device | str = "cpu") -> tuple[Tensor | None, Tensor | None]:
        """Return dout [B, H, N, Dv] and dlse [B, H, N], None for an output without gradient."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)
        (batch, heads, seq, _), value_dim = self.shapes[0], self.shapes[3][3]
        dout = _normal((batch, heads, seq, value_dim), generator).to(self.dtype)
        dlse = _normal((batch, heads, seq), generator)
        dlse = dlse.double() if self.dtype == torch.float64 else dlse

        def laid(t: Tensor) -> Tensor:
            if self.layout_of_gradients == "expanded" and t.numel():
                return _moved(t.flatten()[0].expand(t.shape), device)
            return _moved(_lay_out(self.layout_of_gradients, [t])[0], device)

        return (
            None if self.through == "lse" else laid(dout),
            None if self.through == "out" else laid(dlse),
        )

    def kv_bounds(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return the int32 [B, N, 2] that `bounds` asks for, or None."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 2)
        m, shape = max(self.m1, self.m2), (self.batch, self.seq)

        def draw(low: int, high: int, *size: int) -> Tensor:
            return _integers(low, max(high, low + 1), size, generator)

        if self.bounds == "none":
            return None
        if self.bounds == "documents":
            inner = draw(0, m + 1, self.batch, 2).sort(1).values  # three documents
            key = (torch.arange(self.seq, device="cpu") + m - self.seq).clamp(min=0).expand(shape)
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
        return self._laid_positions(torch.stack((start, end), -1), device)

    def q_start(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return the int32 [B] that `starts` asks for, or None."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 3)
        m = max(self.m1, self.m2)
        if self.starts == "none":
            return None
        if self.starts == "end":
            start = torch.full((self.batch,), m - self.seq, device="cpu")
        else:
            start = _integers(-self.seq - 1, m + 2, (self.batch,), generator)
        return self._laid_positions(start, device)

    def _laid_positions(self, t: Tensor, device: torch.device | str) -> Tensor:
        return _moved(_lay_out(self.layout_of_positions, [t.to(torch.int32)])[0], device)

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
    """Return the same values in other strides; NaN, or the largest integer, lies between them."""
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return [
            v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() > 2 else v for v in values
        ]
    if layout == "strided":
        laid = []
        for v in values:
            between = torch.nan if v.is_floating_point() else torch.iinfo(v.dtype).max
            wide = v.new_full([2 * size for size in v.shape], between)
            view = wide[(slice(None, None, 2),) * v.dim()]
            laid.append(view.copy_(v))
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


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device="cpu")


def _moved(t: Tensor, device: torch.device | str) -> Tensor:
    """Return t on the device with the strides it has."""
    if t.device == torch.device(device):
        return t
    storage = t.untyped_storage()
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage)  # type: ignore[call-overload]
    return flat.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
