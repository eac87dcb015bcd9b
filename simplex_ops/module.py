"""SimplicialAttention: a self-attention layer that starts as ordinary attention."""

import torch
from torch import Tensor, nn

from simplex_ops.contract.checks import check_form, check_numbers, check_window
from simplex_ops.functional import Window, simplicial_attention, window_pair


class SimplicialAttention(nn.Module):
    """2-simplicial self-attention, [B, N, embed_dim] -> [B, N, embed_dim].

    Five projections make q, k1, v1, and the second pair k2, v2; `simplicial_attention` joins
    them, with k2 + k2_bias and v2 + v2_bias in place of k2 and v2; a sixth projection returns to
    embed_dim. k2 and v2 are zero at first, so with the biases at 1 the trilinear layer starts as
    ordinary attention through window w1 over (q, k1, v1), and learns how far to leave it. (The
    strassen form starts there with k2_bias = 0.0; the determinant form has no such start.)

    Args:
        embed_dim: size of the input's and output's last dimension.
        num_heads: query heads, H.
        num_kv_heads: key-value heads, a divisor of H; None is H.
        head_dim: D; None is embed_dim / num_heads.
        window: (w1, w2) in keys, the query's own position included; None is unbounded.
        form: "trilinear", "determinant" or "strassen".
        is_causal: whether a query sees only keys at its own position and before.
        scale: multiplies the logits; None is 1 / sqrt(D).
        bias: whether the projections have a bias.
        qk_norm: whether to RMS-normalise q, k1 and k2 over head_dim. k2 is a factor of a
            trilinear logit just as q and k1 are, so that norms on two of three would leave the
            logit unbounded. The norm's weight is then what starts at zero for k2, and not its
            projection: a norm has slope 1 / sqrt(eps) at zero, and would take the first step of
            a zero projection to full size.
        rope_theta: base of the rotary embedding of q and k1, first half of head_dim paired with
            second half; None is no rotary embedding. k2 is not rotated: a trilinear logit is a
            function of distances alone only as far as k2 is equal within each rotated pair, as
            it is at the start.
        k2_bias: added to k2 inside the operator, in float32.
        v2_bias: added to v2 inside the operator, in float32.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        ValueError: a size below 1, sizes that do not divide, an odd head_dim with a rotary
            embedding, a rope_theta that is not positive, a window below 1 or an unknown form.
        TypeError: a scale or bias that requires a gradient, which none goes to.

    Example::

        layer = SimplicialAttention(256, 8, num_kv_heads=2, window=(512, 32), rope_theta=10000.0)
        y = layer(torch.randn(4, 1024, 256))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: Window = (512, 32),
        form: str = "trilinear",
        is_causal: bool = True,
        scale: float | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float | None = None,
        k2_bias: float = 1.0,
        v2_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                "embed_dim must be a multiple of num_heads where head_dim is not given, "
                f"got {embed_dim} and {num_heads}"
            )
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        _check_sizes(head_dim=head_dim)
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"head_dim must be even for a rotary embedding, got {head_dim}")
        if rope_theta is not None and not rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        w1, w2 = window_pair(window)
        check_window("w1", w1)
        check_window("w2", w2)
        check_form(form)
        check_numbers(scale=scale, k2_bias=k2_bias, v2_bias=v2_bias)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = w1, w2
        self.form = form
        self.is_causal = is_causal
        self.scale = scale
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.k2_bias = k2_bias
        self.v2_bias = v2_bias

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm() -> nn.Module:
            return nn.RMSNorm(head_dim, device=device, dtype=dtype) if qk_norm else nn.Identity()

        self.q_proj = linear(embed_dim, num_heads * head_dim)
        self.k1_proj = linear(embed_dim, num_kv_heads * head_dim)
        self.v1_proj = linear(embed_dim, num_kv_heads * head_dim)
        self.k2_proj = linear(embed_dim, num_kv_heads * head_dim)
        self.v2_proj = linear(embed_dim, num_kv_heads * head_dim)
        self.out_proj = linear(num_heads * head_dim, embed_dim)
        self.q_norm, self.k1_norm, self.k2_norm = norm(), norm(), norm()
        self._start_as_ordinary_attention()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, k2 and v2 to start at zero."""
        for child in self.children():
            if isinstance(child, (nn.Linear, nn.RMSNorm)):
                child.reset_parameters()
        self._start_as_ordinary_attention()

    def _start_as_ordinary_attention(self) -> None:
        zeroed = (self.k2_norm if self.qk_norm else self.k2_proj, self.v2_proj)
        for parameter in (p for layer in zeroed for p in layer.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        *,
        kv_bounds: Tensor | None = None,
        position_offset: int | Tensor = 0,
    ) -> Tensor:
        """Attend within each row of x.

        Args:
            x: [B, N, embed_dim].
            kv_bounds: int32 [B, N, 2], range of positions that each token may see, for packed
                documents and padding: `simplex_ops.bounds` makes it.
            position_offset: position of the first token, for the rotary embedding: an int, or
                [B] for one in each row. A shift of all positions leaves scores of (q, k1) as
                they are.

        Returns:
            [B, N, embed_dim].

        Raises:
            ValueError: x or position_offset of another shape.
            TypeError, ValueError, RuntimeError: kv_bounds, as `simplicial_attention` does.
        """
        _check_input(x, self.embed_dim, position_offset)
        # [B, N, heads, head_dim] until the operator, so that its output flattens as a view.
        q, k1, k2, v1, v2 = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k1_proj, self.k2_proj, self.v1_proj, self.v2_proj)
        )
        q, k1, k2 = self.q_norm(q), self.k1_norm(k1), self.k2_norm(k2)
        if self.rope_theta is not None:
            cos, sin = _rotation(x, self.head_dim, self.rope_theta, position_offset)
            q, k1 = _rotate(q, cos, sin), _rotate(k1, cos, sin)
        out = simplicial_attention(
            *(t.transpose(1, 2) for t in (q, k1, k2, v1, v2)),
            window=self.window,
            scale=self.scale,
            is_causal=self.is_causal,
            form=self.form,
            k2_bias=self.k2_bias,
            v2_bias=self.v2_bias,
            kv_bounds=kv_bounds,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Return what the sub-modules do not show."""
        shown = ["num_heads", "num_kv_heads", "head_dim", "window", "form", "is_causal"]
        shown += ["k2_bias", "v2_bias"]
        shown += [name for name in ("scale", "rope_theta") if getattr(self, name) is not None]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


@torch.fx.wrap  # else `torch.fx.symbolic_trace` would have to decide
def _check_input(x: Tensor, embed_dim: int, position_offset: int | Tensor) -> None:
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ValueError(f"x must have shape [batch, seq, {embed_dim}], got {list(x.shape)}")
    if isinstance(position_offset, Tensor) and position_offset.shape != x.shape[:1]:
        raise ValueError(
            f"position_offset must be an int or have shape [x's batch] = {list(x.shape[:1])}, "
            f"got {list(position_offset.shape)}"
        )


def _rotation(
    x: Tensor, head_dim: int, theta: float, position_offset: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B or 1, N, 1, head_dim / 2] in float32: bfloat16 has no position 257."""
    position = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    if isinstance(position_offset, Tensor):
        position = position + position_offset[:, None]
    else:
        position = (position + position_offset)[None]  # [B or 1, N]
    pair = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32)
    angle = (position[..., None] * theta ** (-pair / head_dim))[:, :, None]
    return angle.cos(), angle.sin()


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate t [B, N, heads, head_dim], element d with element d + head_dim / 2."""
    a, b = t.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(t.dtype)
