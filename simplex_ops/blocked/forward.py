"""The forward in PyTorch operations: flash attention over virtual queries, one tile at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from simplex_ops.blocked import forms
from simplex_ops.blocked.buffers import (
    Workspace,
    computing_dtype,
    pack_queries,
    pack_rows,
    unpack_queries,
)
from simplex_ops.blocked.masks import hide_edges, hide_rows, hide_unseen
from simplex_ops.blocked.plan import Plan, Tile, make_plan
from simplex_ops.layout import empty_in_order_of, lse_dtype

# Unshifted exponentials are taken as they are where every row's sum lies in this range: its
# largest logit is then between some -40 and 60, far from both ends of float32.
TRUSTED_SUM = (1e-17, 1e26)


@dataclass
class Statistics:
    """What a block's queries gathered so far: maximum, sum and weighted values of exp(s - top)."""

    top: Tensor  # [blocks, C, G]; -inf where nothing was seen
    total: Tensor  # [blocks, C, G]
    values: Tensor  # [blocks, C, G, Dv]

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both sets of pairs."""
        top = torch.maximum(self.top, other.top)
        shift = top.masked_fill(top == -torch.inf, 0)
        mine, its = torch.exp(self.top - shift), torch.exp(other.top - shift)
        return Statistics(
            top,
            self.total * mine + other.total * its,
            self.values * mine[..., None] + other.values * its[..., None],
        )


def attn_forward(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int | None,
    w2: int | None,
    *,
    scale: float | None,
    is_causal: bool,
    form: str,
    k2_bias: float,
    v2_bias: float,
    kv_bounds: Tensor | None,
    q_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, H, N, Dv], lse [B, H, N]); see `torch.ops.simplex.attn`."""
    out = empty_in_order_of(q, v1.shape[3])
    lse = torch.empty(q.shape[:3], dtype=lse_dtype(q.dtype), device=q.device)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    plan = make_plan(q, k1, k2, w1, w2, is_causal, kv_bounds, q_start, rows=64, block=1)
    run = _Forward(plan, form, scale, q, (k1, v1), (k2, v2), (k2_bias, v2_bias))
    for tile in plan.tiles():
        run.attend(tile)
    return unpack_queries(plan, run.out, out), unpack_queries(plan, run.lse, lse)


class _Forward:
    """The buffers of one call, and what is done with each tile."""

    def __init__(
        self,
        plan: Plan,
        form: str,
        scale: float,
        q: Tensor,
        pair1: tuple[Tensor, Tensor],
        pair2: tuple[Tensor, Tensor],
        biases: tuple[float, float],
    ) -> None:
        self.plan, self.form, self.scale = plan, form, scale
        self.narrow_k, self.narrow_v, self.wide_k, self.wide_v = load_pairs(
            plan, form, pair1, pair2, biases
        )
        self.q = forms.to_components(form, pack_queries(plan, q)).mul_(scale)
        self.narrow_v, self.narrow_unit = _into_unit_range(self.narrow_v)
        self.wide_v, self.wide_unit = _into_unit_range(self.wide_v)
        heads, padded, group, _ = self.q.shape
        self.out = self.q.new_zeros(heads, padded, group, self.wide_v.shape[2])
        self.lse = self.q.new_full((heads, padded, group), -torch.inf)
        self.space = Workspace(self.q)
        self.may_trust = q.device.type == "cpu"  # elsewhere looking at a sum would synchronise

    def attend(self, tile: Tile) -> None:
        """Write out and lse of the tile's queries."""
        plan = self.plan
        narrow = tile.span(plan.narrow, per_query=True)
        wide = tile.span(plan.wide, per_query=False)
        found = None
        for columns in narrow.steps(plan.narrow_step):
            k2, v2, unseen = hide_rows(
                tile, plan.narrow, columns, self.narrow_k, self.narrow_v, narrow.is_masked
            )
            q = tile.of(self.q)[:, :, :, None]  # [blocks, C, G, 1, D]
            shape = (*q.shape[:3], k2.shape[3], q.shape[4])
            virtual = forms.virtual_query(
                self.form, q, k2, self.scale, self.space.take("virtual", *shape)
            )
            constant = forms.row_constant(self.form, q, k2)
            for wide_columns in wide.steps(plan.wide_step):
                some = self._step(tile, virtual, constant, v2, wide_columns, wide.is_masked, unseen)
                found = some if found is None else found.merge(some)
        if found is None:
            return
        sees_none = found.total == 0
        out = (found.values / found.total[..., None]).masked_fill_(sees_none[..., None], 0)
        tile.of(self.out).copy_(_out_of_unit_range(tile, out, self.wide_unit, self.narrow_unit))
        top = found.top.masked_fill(sees_none, 0)
        tile.of(self.lse).copy_(top + found.total.log())

    def _step(
        self,
        tile: Tile,
        virtual: Tensor,
        constant: Tensor | None,
        v2: Tensor,
        columns: tuple[int, int],
        is_masked: bool,
        unseen: Tensor | None,
    ) -> Statistics:
        side = self.plan.wide
        k1 = tile.windows(side, self.wide_k, *columns, per_query=False)
        v1 = tile.windows(side, self.wide_v, *columns, per_query=False)
        blocks, block, group, offsets, _ = virtual.shape
        grid = (blocks, block, group, offsets, k1.shape[1])
        logits = self.space.take("logits", blocks, block * group * offsets, k1.shape[1])

        def make_logits() -> None:
            torch.bmm(virtual.flatten(1, 3), k1.mT, out=logits)
            if constant is not None:
                logits.view(grid).add_(constant[..., None])

        def row_sums() -> Tensor:
            return logits.view(blocks, block, group, -1).sum(-1)

        make_logits()
        has_edges = side.slides and not is_masked
        total = top = None
        if self.may_trust and not is_masked and unseen is None:
            logits.exp_()
            if has_edges:
                hide_edges(logits.view(grid), 0.0)
            total = row_sums()
            least, most = total.aminmax()
            if TRUSTED_SUM[0] <= least.item() and most.item() <= TRUSTED_SUM[1]:
                top = torch.zeros_like(total)
            else:
                self.may_trust = False
                make_logits()
        if top is None:
            if has_edges:
                hide_edges(logits.view(grid), -torch.inf)
            hide_unseen(tile, side, columns, logits.view(grid), is_masked, unseen, -torch.inf)
            top = logits.view(blocks, block, group, -1).amax(-1)
            shift = top.masked_fill(top == -torch.inf, 0)
            logits.view(blocks, block, group, -1).sub_(shift[..., None]).exp_()
            total = row_sums()
        assert total is not None
        weighted = self.space.take("weighted", *grid[:4], v1.shape[2])
        torch.bmm(logits, v1, out=weighted.flatten(1, 3))
        return Statistics(top, total, weighted.mul_(v2).sum(3))


def load_pairs(
    plan: Plan,
    form: str,
    pair1: tuple[Tensor, Tensor],
    pair2: tuple[Tensor, Tensor],
    biases: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows of (narrow k, narrow v, wide k, wide v), biases added, roles exchanged."""
    side1, side2 = (plan.narrow, plan.wide) if plan.exchanged else (plan.wide, plan.narrow)
    k1, v1 = (pack_rows(plan, side1, x) for x in pair1)
    k2, v2 = (
        pack_rows(plan, side2, x.to(computing_dtype(x.dtype)) + bias if bias else x)
        for x, bias in zip(pair2, biases, strict=True)
    )
    k1, k2 = (forms.to_components(form, k) for k in (k1, k2))
    if plan.exchanged:
        return forms.negate_vectors(form, k1), v1, k2, v2
    return k2, v2, k1, v1


def _into_unit_range(v: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the values of each kv head by a power of two near their largest, and return it.

    Sums of products then neither overflow nor vanish, whatever the values' own range.
    """
    largest = v.abs().amax((1, 2), keepdim=True)
    largest = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    unit = torch.exp2(torch.log2(largest).floor())
    return v / unit, unit


def _out_of_unit_range(tile: Tile, out: Tensor, *units: Tensor) -> Tensor:
    blocks = tile.blocks.stop - tile.blocks.start
    for unit in units:
        out = out * unit[tile.heads].repeat_interleave(blocks, 0)[..., None]
    return out
