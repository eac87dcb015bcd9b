"""The backward in PyTorch operations: six products a tile, every sum in a fixed order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simplex_ops.blocked import forms
from simplex_ops.blocked.buffers import (
    Workspace,
    pack_queries,
    unpack_queries,
    unpack_rows,
)
from simplex_ops.blocked.forward import load_pairs
from simplex_ops.blocked.masks import hide_edges, hide_rows, hide_unseen
from simplex_ops.blocked.plan import Plan, Tile, make_plan
from simplex_ops.layout import empty_in_order_of


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
    grads = tuple(
        empty_in_order_of(x, x.shape[3]) if wanted else x.new_empty(0)
        for x, wanted in zip(inputs, grad_mask, strict=True)
    )
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0 or not any(grad_mask):
        return tuple(grad.zero_() for grad in grads)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    plan = make_plan(q, k1, k2, w1, w2, is_causal, kv_bounds, q_start, rows=64, block=8)
    run = _Backward(plan, form, scale, inputs, (k2_bias, v2_bias), grad_mask)
    run.load_gradients(dout, dlse, out, lse)
    for tile in plan.tiles():
        run.propagate(tile)
    return run.store(grads)


class _Backward:
    """The buffers of one call, and what is done with each tile."""

    def __init__(
        self,
        plan: Plan,
        form: str,
        scale: float,
        inputs: tuple[Tensor, ...],
        biases: tuple[float, float],
        grad_mask: Sequence[bool],
    ) -> None:
        self.plan, self.form, self.scale = plan, form, scale
        q, k1, k2, v1, v2 = inputs
        self.narrow_k, self.narrow_v, self.wide_k, self.wide_v = load_pairs(
            plan, form, (k1, v1), (k2, v2), biases
        )
        self.q = forms.to_components(form, pack_queries(plan, q)).mul_(scale)
        self.space = Workspace(self.q)
        wants_dq, wants_k1, wants_k2, wants_v1, wants_v2 = grad_mask
        if plan.exchanged:
            wants_k1, wants_k2, wants_v1, wants_v2 = wants_k2, wants_k1, wants_v2, wants_v1

        def accumulator(like: Tensor, wanted: bool) -> Tensor | None:
            return torch.zeros_like(like) if wanted else None

        self.dq = accumulator(self.q, wants_dq)
        self.dnarrow_k = accumulator(self.narrow_k, wants_k2)
        self.dnarrow_v = accumulator(self.narrow_v, wants_v2)
        self.dwide_k = accumulator(self.wide_k, wants_k1)
        self.dwide_v = accumulator(self.wide_v, wants_v1)

    def load_gradients(
        self, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> None:
        """Pack dout, lse and Δ = sum over d of dout · out - dlse; all zero where lse is -inf."""
        sees_none = pack_queries(self.plan, lse) == -torch.inf
        self.lse = pack_queries(self.plan, lse).masked_fill_(sees_none, 0)
        self.delta = torch.zeros_like(self.lse)
        if dout is None:
            self.dout = self.q.new_zeros(*self.lse.shape, out.shape[3])
        else:
            self.dout = pack_queries(self.plan, dout).masked_fill_(sees_none[..., None], 0)
            self.delta = (self.dout * pack_queries(self.plan, out)).sum(-1)
        if dlse is not None:
            self.delta = self.delta - pack_queries(self.plan, dlse).to(self.delta.dtype)
        self.delta.masked_fill_(sees_none, 0)

    def propagate(self, tile: Tile) -> None:
        """Add what the tile's queries contribute to every gradient."""
        plan = self.plan
        narrow = tile.span(plan.narrow, per_query=True)
        wide = tile.span(plan.wide, per_query=False)
        for columns in narrow.steps(plan.narrow_step):
            k2, v2, unseen = hide_rows(
                tile, plan.narrow, columns, self.narrow_k, self.narrow_v, narrow.is_masked
            )
            q = tile.of(self.q)[:, :, :, None]  # [blocks, C, G, 1, D]
            dout = tile.of(self.dout)[:, :, :, None]
            rows = (*q.shape[:3], k2.shape[3])
            virtual = forms.virtual_query(
                self.form, q, k2, self.scale, self.space.take("virtual", *rows, q.shape[4])
            )
            dvalues = torch.mul(dout, v2, out=self.space.take("dvalues", *rows, v2.shape[4]))
            shift = tile.of(self.lse)[..., None]
            constant = forms.row_constant(self.form, q, k2)
            shift = shift.expand(rows) if constant is None else shift - constant
            dvirtual = sigma = values = None
            for wide_columns in wide.steps(plan.wide_step):
                p, ds = self._step(
                    tile, virtual, dvalues, shift, wide_columns, wide.is_masked, unseen
                )
                if ds is not None and (self.dq is not None or self.dnarrow_k is not None):
                    k1 = tile.windows(plan.wide, self.wide_k, *wide_columns, per_query=False)
                    dvirtual = self._add_product("dvirtual", dvirtual, ds, k1, virtual)
                    if self.form == "strassen":
                        some = ds.sum(-1).view(rows)
                        sigma = some if sigma is None else sigma + some
                if self.dnarrow_v is not None:
                    v1 = tile.windows(plan.wide, self.wide_v, *wide_columns, per_query=False)
                    values = self._add_product("values", values, p, v1, dvalues)
            scratch = virtual
            if self.dq is not None and dvirtual is not None:
                tile.of(self.dq).add_(forms.query_gradient(self.form, dvirtual, sigma, k2, scratch))
            if self.dnarrow_k is not None and dvirtual is not None:
                dk2 = forms.second_key_gradient(self.form, dvirtual, sigma, q, self.scale, scratch)
                tile.add_to_windows_of_queries(plan.narrow, self.dnarrow_k, columns[0], dk2)
            if self.dnarrow_v is not None and values is not None:
                dv2 = values.mul_(dout).sum(2)
                tile.add_to_windows_of_queries(plan.narrow, self.dnarrow_v, columns[0], dv2)

    def _step(
        self,
        tile: Tile,
        virtual: Tensor,
        dvalues: Tensor,
        shift: Tensor,
        columns: tuple[int, int],
        is_masked: bool,
        unseen: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return P and dS [blocks, C·G·R, columns], and add to the wide side's gradients."""
        side = self.plan.wide
        k1 = tile.windows(side, self.wide_k, *columns, per_query=False)
        v1 = tile.windows(side, self.wide_v, *columns, per_query=False)
        grid = (*virtual.shape[:4], k1.shape[1])
        virtual, dvalues = virtual.flatten(1, 3), dvalues.flatten(1, 3)
        shape = (*virtual.shape[:2], k1.shape[1])

        def hide(x: Tensor, value: float) -> None:
            if side.slides and not is_masked:
                hide_edges(x.view(grid), value)
            hide_unseen(tile, side, columns, x.view(grid), is_masked, unseen, value)

        p = torch.bmm(virtual, k1.mT, out=self.space.take("p", *shape))
        p.view(grid).sub_(shift[..., None])
        hide(p, -torch.inf)
        p.exp_()
        if self.dwide_v is not None:
            dv1 = self.space.take("drows", shape[0], shape[2], v1.shape[2])
            torch.bmm(p.mT, dvalues, out=dv1)
            tile.add_to_windows(side, self.dwide_v, columns[0], dv1)
        if self.dq is None and self.dnarrow_k is None and self.dwide_k is None:
            return p, None
        ds = torch.bmm(dvalues, v1.mT, out=self.space.take("ds", *shape))
        delta = tile.of(self.delta)[..., None, None]
        ds.view(grid).sub_(delta)
        ds.mul_(p)
        hide(ds, 0.0)
        if self.dwide_k is not None:
            dk1 = self.space.take("drows", shape[0], shape[2], k1.shape[2])
            torch.bmm(ds.mT, virtual, out=dk1)
            tile.add_to_windows(side, self.dwide_k, columns[0], dk1)
        return p, ds

    def _add_product(
        self, name: str, total: Tensor | None, a: Tensor, b: Tensor, like: Tensor
    ) -> Tensor:
        """Return total + a @ b in the shape of `like`."""
        if total is None:
            total = self.space.take(name, *like.shape)
            torch.bmm(a, b, out=total.flatten(1, 3))
        else:
            total.flatten(1, 3).baddbmm_(a, b)
        return total

    def store(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Undo the packing, the scale and the exchange of roles, into `grads`."""
        plan = self.plan
        dq, dk1, dk2, dv1, dv2 = grads
        if self.dq is not None:
            unpack_queries(plan, forms.from_components(self.form, self.dq.mul_(self.scale)), dq)
        if plan.exchanged:
            if self.dnarrow_k is not None:
                self.dnarrow_k = forms.negate_vectors(self.form, self.dnarrow_k)
            dk1, dk2, dv1, dv2 = dk2, dk1, dv2, dv1
        for side, packed, grad in (
            (plan.wide, self.dwide_k, dk1),
            (plan.narrow, self.dnarrow_k, dk2),
        ):
            if packed is not None:
                unpack_rows(plan, side, forms.from_components(self.form, packed), grad)
        for side, packed, grad in (
            (plan.wide, self.dwide_v, dv1),
            (plan.narrow, self.dnarrow_v, dv2),
        ):
            if packed is not None:
                unpack_rows(plan, side, packed, grad)
        return grads
