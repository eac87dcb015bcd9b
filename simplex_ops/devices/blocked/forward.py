"""The forward in PyTorch operations: flash attention over virtual queries, one tile at a time."""

import torch
from torch import Tensor

from simplex_ops.contract.layout import empty_outputs
from simplex_ops.contract.scale import scale_of
from simplex_ops.devices.blocked import forms
from simplex_ops.devices.blocked.buffers import (
    Workspace,
    load_pairs,
    pack_queries,
    queries_to_fill,
    store_queries,
)
from simplex_ops.devices.blocked.exponentials import plain_exp_, shifted_exp_
from simplex_ops.devices.blocked.host import are_moderate, are_tame, is_known
from simplex_ops.devices.blocked.masks import Mask, make_mask, own_windows
from simplex_ops.devices.blocked.plan import Plan, make_plan
from simplex_ops.devices.blocked.tiles import Tile

# Exponentials that no maximum was taken from are good where the sum of every query lies in this
# range: its largest logit is then between some -30 and 40, far from both ends of float32.
TRUSTED_SUM = (1e-13, 1e17)


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
    out, lse = empty_outputs(q, v1)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    factor = scale_of(q, scale)
    plan = make_plan(q, k1, k2, w1, w2, is_causal, kv_bounds, q_start, rows=16, block=1)
    run = _Forward(plan, form, factor, (q, k1, k2, v1, v2), (k2_bias, v2_bias), out, lse)
    for tile in plan.tiles():
        run.attend(tile)
    return run.finish(out, lse)


class _Forward:
    """The buffers of one call, and what is done with each tile."""

    def __init__(
        self,
        plan: Plan,
        form: str,
        scale: float,
        inputs: tuple[Tensor, ...],
        biases: tuple[float, float],
        out: Tensor,
        lse: Tensor,
    ) -> None:
        self.plan, self.form, self.scale = plan, form, scale
        q, k1, k2, v1, v2 = inputs
        self.narrow_k, self.narrow_v, wide_k, self.wide_v = load_pairs(
            plan, form, (k1, v1), (k2, v2), biases
        )
        self.q = forms.to_components(form, pack_queries(plan, q))
        # Stored as [D, rows], products with few rows are 8% faster (Sapphire Rapids, torch 2.13).
        self.wide_k = (wide_k.mT.contiguous() * scale).mT
        # What each query gathered so far: the largest logit (or 0 where that is near enough), and
        # the sum, plain and weighted with values, of exp(logit - top).
        self.values, self.total = queries_to_fill(plan, out), queries_to_fill(plan, lse)
        self.top = torch.full_like(self.total, -torch.inf)
        self.space = Workspace(self.q)
        self.is_tame = are_tame(self.q, self.narrow_k, self.wide_k, terms=q.shape[3])
        self.may_trust = self.is_tame and are_moderate(self.narrow_v, self.wide_v)

    def attend(self, tile: Tile) -> None:
        """Gather what the tile's queries see."""
        plan = self.plan
        narrow = tile.span(plan.narrow, per_query=True)
        wide = tile.span(plan.wide, per_query=False)
        is_first = True
        for columns in narrow.steps(plan.narrow_step):
            k2, v2, unseen = own_windows(
                tile, plan.narrow, columns, self.narrow_k, self.narrow_v, narrow
            )
            q = tile.of(self.q)[:, :, :, None]  # [blocks, C, G, 1, D]
            rows = (*q.shape[:3], k2.shape[3])
            virtual = self.space.take("virtual", *rows, q.shape[4])
            forms.virtual_query(self.form, q, k2, virtual)
            constant = forms.row_constant(self.form, self.scale, q, k2)
            for wide_columns in wide.steps(plan.wide_step):
                k1, v1 = (
                    tile.windows(plan.wide, x, *wide_columns, per_query=False)
                    for x in (self.wide_k, self.wide_v)
                )
                mask = make_mask(tile, plan.wide, wide_columns, unseen, wide)
                p, top, total = self._exponentials(virtual, constant, k1, mask)
                weighted = self.space.take("weighted", *rows, v1.shape[2])
                torch.bmm(p, v1, out=weighted.flatten(1, 3))
                values = weighted.mul_(v2).sum(3)
                self._gather(tile, top, total, values, is_first=is_first)
                is_first = False

    def _exponentials(
        self, virtual: Tensor, constant: Tensor | None, k1: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return exp(logit - top) [blocks, C·G·R, columns], top and sums [blocks, C, G]."""
        grid = (*virtual.shape[:4], k1.shape[1])
        logits = self.space.take("logits", *grid)
        rows = logits.flatten(1, 3)
        queries = logits.flatten(3, 4)  # [blocks, C, G, R·columns]

        def make_logits() -> None:
            torch.bmm(virtual.flatten(1, 3), k1.mT, out=rows)
            if constant is not None:
                logits.add_(constant[..., None])
            mask.hide(logits, -torch.inf, is_tame=self.is_tame)

        make_logits()
        if self.may_trust:
            sees_none = mask.sees_none()
            total = plain_exp_(queries, is_masked=sees_none is not None).sum(-1)
            top = torch.zeros_like(total)
            seen = total
            if sees_none is not None:
                top.masked_fill_(sees_none[..., None], -torch.inf)
                seen = total.masked_fill(sees_none[..., None], 1)
            least, most = seen.aminmax()
            if TRUSTED_SUM[0] <= least.item() and most.item() <= TRUSTED_SUM[1]:
                return rows, top, total
            self.may_trust = False
            make_logits()
        top = queries.amax(-1)
        shifted_exp_(queries, top.masked_fill(top == -torch.inf, 0)[..., None])
        return rows, top, queries.sum(-1)

    def _gather(
        self, tile: Tile, top: Tensor, total: Tensor, values: Tensor, *, is_first: bool
    ) -> None:
        """Merge what one step found into what the tile's queries gathered before."""
        old_top, old_total, old_values = (tile.of(x) for x in (self.top, self.total, self.values))
        if is_first:
            old_top.copy_(top)
            old_total.copy_(total)
            old_values.copy_(values)
            return
        new_top = torch.maximum(old_top, top)
        shift = new_top.masked_fill(new_top == -torch.inf, 0)
        keep, take = torch.exp(old_top - shift), torch.exp(top - shift)
        old_total.mul_(keep).addcmul_(total, take)
        old_values.mul_(keep[..., None]).addcmul_(values, take[..., None])
        old_top.copy_(new_top)

    def finish(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Divide by the sums, and return what every query gathered as out and lse."""
        sees_none = self.top == -torch.inf
        self.values.div_(self.total[..., None])
        if not is_known(~sees_none.any()):
            self.values.masked_fill_(sees_none[..., None], 0)
        self.total.log_().add_(self.top)
        store_queries(self.plan, self.values, out)
        store_queries(self.plan, self.total, lse)
        return out, lse
