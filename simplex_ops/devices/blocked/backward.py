"""The backward in PyTorch operations: six products a tile, every sum in a fixed order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simplex_ops.contract.layout import empty_gradients
from simplex_ops.contract.scale import scale_of
from simplex_ops.devices.blocked import forms
from simplex_ops.devices.blocked.buffers import (
    Workspace,
    load_pairs,
    pack_queries,
    queries_to_fill,
    store_queries,
    unpack_rows,
)
from simplex_ops.devices.blocked.exponentials import shifted_exp_
from simplex_ops.devices.blocked.host import are_tame, is_known
from simplex_ops.devices.blocked.masks import Mask, make_mask, own_windows
from simplex_ops.devices.blocked.plan import Plan, make_plan
from simplex_ops.devices.blocked.tiles import Tile

LARGE_LSE = 1e5  # from here on its rounding alone may take exp(s - lse) above 1 by percents


def attn_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
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
    grad_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return (dq, dk1, dk2, dv1, dv2); see `torch.ops.simplex.attn_backward`."""
    inputs = (q, k1, k2, v1, v2)
    grads = empty_gradients(inputs, grad_mask)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0 or not any(grad_mask):
        return tuple(grad.zero_() for grad in grads)
    factor = scale_of(q, scale)
    plan = make_plan(q, k1, k2, w1, w2, is_causal, kv_bounds, q_start, rows=64, block=8)
    run = _Backward(plan, form, factor, inputs, (k2_bias, v2_bias), grads)
    run.load_gradients(dout, dlse, out, lse)
    for tile in plan.tiles():
        run.propagate(tile)
    run.store()
    return grads


class _Backward:
    """The buffers of one call, and what is done with each tile."""

    def __init__(
        self,
        plan: Plan,
        form: str,
        scale: float,
        inputs: tuple[Tensor, ...],
        biases: tuple[float, float],
        grads: tuple[Tensor, ...],
    ) -> None:
        self.plan, self.form, self.scale, self.grads = plan, form, scale, grads
        q, k1, k2, v1, v2 = inputs
        self.narrow_k, self.narrow_v, wide_k, self.wide_v = load_pairs(
            plan, form, (k1, v1), (k2, v2), biases
        )
        self.q = forms.to_components(form, pack_queries(plan, q))
        self.wide_k = wide_k * scale
        self.space = Workspace(self.q)
        wants_dq, wants_dk1, wants_dk2, wants_dv1, wants_dv2 = (x.dim() == 4 for x in grads)
        wants_wide, wants_narrow = plan.by_role((wants_dk1, wants_dv1), (wants_dk2, wants_dv2))

        def accumulator(like: Tensor, wanted: bool) -> Tensor | None:
            return torch.zeros_like(like) if wanted else None

        self.dq = queries_to_fill(plan, grads[0]) if wants_dq else None
        self.dwide_k, self.dwide_v = map(accumulator, (self.wide_k, self.wide_v), wants_wide)
        self.dnarrow_k, self.dnarrow_v = map(
            accumulator, (self.narrow_k, self.narrow_v), wants_narrow
        )

    def load_gradients(
        self, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> None:
        """Pack dout, lse and Δ = sum over d of dout · out - dlse; all zero where lse is -inf."""
        lse = pack_queries(self.plan, lse)
        sees_none = lse == -torch.inf
        all_see = is_known(~sees_none.any())
        self.lse = lse if all_see else lse.masked_fill(sees_none, 0)
        self.is_capped = not is_known(self.lse.abs().amax() < LARGE_LSE)
        if dout is None:
            self.dout = self.q.new_zeros(*lse.shape, out.shape[3])
            self.delta = torch.zeros_like(lse)
        else:
            dout = pack_queries(self.plan, dout)
            self.dout = dout if all_see else dout.masked_fill(sees_none[..., None], 0)
            self.delta = (self.dout * pack_queries(self.plan, out)).sum(-1)
        if dlse is not None:
            self.delta -= pack_queries(self.plan, dlse).masked_fill(sees_none, 0)
        terms = max(self.q.shape[3], self.dout.shape[3])
        self.is_tame = are_tame(self.q, self.narrow_k, self.wide_k, terms=terms)
        self.is_tame &= are_tame(self.dout, self.narrow_v, self.wide_v, terms=terms)

    def propagate(self, tile: Tile) -> None:
        """Add what the tile's queries contribute to every gradient."""
        plan = self.plan
        narrow = tile.span(plan.narrow, per_query=True)
        wide = tile.span(plan.wide, per_query=False)
        q, dout = (tile.of(x)[:, :, :, None] for x in (self.q, self.dout))  # [blocks, C, G, 1, D]
        wants_dvirtual = self.dq is not None or self.dnarrow_k is not None
        for columns in narrow.steps(plan.narrow_step):
            k2, v2, unseen = own_windows(
                tile, plan.narrow, columns, self.narrow_k, self.narrow_v, narrow
            )
            rows = (*q.shape[:3], k2.shape[3])
            virtual = self.space.take("virtual", *rows, q.shape[4])
            forms.virtual_query(self.form, q, k2, virtual)
            dvalues = torch.mul(dout, v2, out=self.space.take("dvalues", *rows, v2.shape[4]))
            shift = tile.of(self.lse)[..., None]
            constant = forms.row_constant(self.form, self.scale, q, k2)
            if constant is not None:
                shift = shift - constant
            dvirtual = sigma = values = None
            for wide_columns in wide.steps(plan.wide_step):
                k1, v1 = (
                    tile.windows(plan.wide, x, *wide_columns, per_query=False)
                    for x in (self.wide_k, self.wide_v)
                )
                mask = make_mask(tile, plan.wide, wide_columns, unseen, wide)
                p = self._probabilities(virtual, shift, k1, mask)
                if self.dwide_v is not None:
                    dv1 = self._to_columns(p, dvalues)
                    tile.add_to_windows(plan.wide, self.dwide_v, wide_columns[0], dv1)
                if self.dnarrow_v is not None:
                    values = self._add_to_rows("values", values, p, v1)
                if not wants_dvirtual and self.dwide_k is None:
                    continue
                ds = self._logit_gradients(tile, dvalues, v1, p, mask)
                if self.dwide_k is not None:
                    dk1 = self._to_columns(ds, virtual)
                    tile.add_to_windows(plan.wide, self.dwide_k, wide_columns[0], dk1)
                if wants_dvirtual:
                    dvirtual = self._add_to_rows("dvirtual", dvirtual, ds, k1)
                    if self.form == "strassen":
                        some = ds.sum(-1).mul_(self.scale)
                        sigma = some if sigma is None else sigma + some
            if dvirtual is not None:
                scratch = virtual
                if self.dq is not None:
                    tile.of(self.dq).add_(
                        forms.query_gradient(self.form, dvirtual, sigma, k2, scratch)
                    )
                if self.dnarrow_k is not None:
                    dk2 = forms.second_key_gradient(self.form, dvirtual, sigma, q, scratch)
                    tile.add_to_windows_of_queries(plan.narrow, self.dnarrow_k, columns[0], dk2)
            if values is not None and self.dnarrow_v is not None:
                dv2 = values.mul_(dout).sum(2)
                tile.add_to_windows_of_queries(plan.narrow, self.dnarrow_v, columns[0], dv2)

    def _probabilities(self, virtual: Tensor, shift: Tensor, k1: Tensor, mask: Mask) -> Tensor:
        """Return P [blocks, C, G, R, columns]."""
        p = self.space.take("p", *virtual.shape[:4], k1.shape[1])
        torch.bmm(virtual.flatten(1, 3), k1.mT, out=p.flatten(1, 3))
        mask.hide(p, -torch.inf, is_tame=self.is_tame)
        return shifted_exp_(p, shift[..., None], is_capped=self.is_capped)

    def _logit_gradients(
        self, tile: Tile, dvalues: Tensor, v1: Tensor, p: Tensor, mask: Mask
    ) -> Tensor:
        """Return dS [blocks, C, G, R, columns]."""
        ds = self.space.take("ds", *p.shape)
        torch.bmm(dvalues.flatten(1, 3), v1.mT, out=ds.flatten(1, 3))
        ds.sub_(tile.of(self.delta)[..., None, None]).mul_(p)
        if not self.is_tame:
            mask.hide(ds, 0.0, is_tame=False)
        return ds

    def _to_columns(self, a: Tensor, rows: Tensor) -> Tensor:
        """Return aᵀ @ rows: [blocks, columns, D]."""
        out = self.space.take("columns", a.shape[0], a.shape[4], rows.shape[4])
        return torch.bmm(a.flatten(1, 3).mT, rows.flatten(1, 3), out=out)

    def _add_to_rows(self, name: str, total: Tensor | None, a: Tensor, columns: Tensor) -> Tensor:
        """Return total + a @ columns: [blocks, C, G, R, D]."""
        if total is None:
            total = self.space.take(name, *a.shape[:4], columns.shape[2])
            torch.bmm(a.flatten(1, 3), columns, out=total.flatten(1, 3))
        else:
            total.flatten(1, 3).baddbmm_(a.flatten(1, 3), columns)
        return total

    def store(self) -> None:
        """Undo the packing and the exchange of roles."""
        plan, form = self.plan, self.form
        dq, dk1, dk2, dv1, dv2 = self.grads
        (wide_dk, wide_dv), (narrow_dk, narrow_dv) = plan.by_role((dk1, dv1), (dk2, dv2))
        if self.dq is not None:
            store_queries(plan, forms.from_components(form, self.dq), dq)
        if self.dwide_k is not None:
            unpack_rows(
                plan, plan.wide, forms.from_components(form, self.dwide_k.mul_(self.scale)), wide_dk
            )
        if self.dnarrow_k is not None:
            dk = self.dnarrow_k
            if plan.is_exchanged:
                dk = forms.negate_vectors(form, dk)
            unpack_rows(plan, plan.narrow, forms.from_components(form, dk), narrow_dk)
        if self.dwide_v is not None:
            unpack_rows(plan, plan.wide, self.dwide_v, wide_dv)
        if self.dnarrow_v is not None:
            unpack_rows(plan, plan.narrow, self.dnarrow_v, narrow_dv)
