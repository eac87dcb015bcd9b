"""Virtual queries: every form is a dot product of k1 with q̃(q, k2), plus a row constant.

The functions here know no scale: it is part of k1. They take rows whose dimensions are in component
order (`to_components`), where a cross product is six products of contiguous slices.
Shapes: q [..., C, G, 1, D], k2 [..., C, 1, R, D], q̃ [..., C, G, R, D] for C queries, G heads and
R second keys each.
"""

import torch
from torch import Tensor


def to_components(form: str, x: Tensor) -> Tensor:
    """Order the last dimension x0 x1 .. y0 y1 .. z0 z1 .. rest, for the determinant alone."""
    third = x.shape[-1] // 3
    if form != "determinant" or third == 0:
        return x
    vectors = x[..., : 3 * third].unflatten(-1, (third, 3))
    return torch.cat((vectors.transpose(-1, -2).flatten(-2), x[..., 3 * third :]), dim=-1)


def from_components(form: str, x: Tensor) -> Tensor:
    """Undo `to_components`."""
    third = x.shape[-1] // 3
    if form != "determinant" or third == 0:
        return x
    vectors = x[..., : 3 * third].unflatten(-1, (3, third))
    return torch.cat((vectors.transpose(-1, -2).flatten(-2), x[..., 3 * third :]), dim=-1)


def negate_vectors(form: str, k: Tensor) -> Tensor:
    """Return k', for which form(q, k1, k2) = form(q, k2, k1'), in component order.

    det[q, k1, k2] = -det[q, k2, k1]: the exchange of the roles negates the 3-vectors only.
    """
    if form != "determinant":
        return k
    vectors = k.shape[-1] // 3 * 3
    return torch.cat((-k[..., :vectors], k[..., vectors:]), dim=-1)


def virtual_query(form: str, q: Tensor, k2: Tensor, out: Tensor) -> Tensor:
    """Write q̃ into `out`."""
    if form == "trilinear":
        return torch.mul(q, k2, out=out)
    if form == "strassen":
        return torch.add(q, k2, out=out)
    vectors = q.shape[-1] // 3 * 3
    torch.mul(q[..., vectors:], k2[..., vectors:], out=out[..., vectors:])
    _cross(k2, q, out)
    return out


def row_constant(form: str, scale: float, q: Tensor, k2: Tensor) -> Tensor | None:
    """Return b [..., C, G, R], which each logit of a row has beside q̃ · k1, or None for zero."""
    if form != "strassen":
        return None
    return q.squeeze(-2) @ k2.squeeze(-3).mT * scale


def query_gradient(
    form: str, dvirtual: Tensor, sigma: Tensor | None, k2: Tensor, out: Tensor
) -> Tensor:
    """Return dq [..., C, G, D], given dq̃ and, for strassen, σ = scale · sum of dS.

    `out` is scratch of the shape of dq̃.
    """
    if form == "strassen":
        assert sigma is not None
        return dvirtual.sum(-2).add_(sigma @ k2.squeeze(-3))
    if form == "trilinear":
        return torch.mul(dvirtual, k2, out=out).sum(-2)
    vectors = dvirtual.shape[-1] // 3 * 3
    torch.mul(dvirtual[..., vectors:], k2[..., vectors:], out=out[..., vectors:])
    _cross(dvirtual, k2, out)
    return out.sum(-2)


def second_key_gradient(
    form: str, dvirtual: Tensor, sigma: Tensor | None, q: Tensor, out: Tensor
) -> Tensor:
    """Return dk2 [..., C, R, D]: of the second keys of each query, summed over its heads.

    `out` is scratch of the shape of dq̃.
    """
    if form == "strassen":
        assert sigma is not None
        return dvirtual.sum(-3).add_(sigma.transpose(-1, -2) @ q.squeeze(-2))
    if form == "trilinear":
        return torch.mul(dvirtual, q, out=out).sum(-3)
    vectors = dvirtual.shape[-1] // 3 * 3
    torch.mul(dvirtual[..., vectors:], q[..., vectors:], out=out[..., vectors:])
    _cross(q, dvirtual, out)
    return out.sum(-3)


def _cross(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the cross products of the 3-vectors of a and b, in component order."""
    third = a.shape[-1] // 3
    ax, ay, az = (a[..., c * third : (c + 1) * third] for c in range(3))
    bx, by, bz = (b[..., c * third : (c + 1) * third] for c in range(3))
    for c, (left1, right1, left2, right2) in enumerate(
        ((ay, bz, az, by), (az, bx, ax, bz), (ax, by, ay, bx))
    ):
        component = out[..., c * third : (c + 1) * third]
        torch.mul(left1, right1, out=component)
        component.addcmul_(left2, right2, value=-1)
