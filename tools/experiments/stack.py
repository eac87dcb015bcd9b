"""Several models of one shape as one: a row of the batch passes through the weights of its run.

Small models leave a GPU idle, and one after another they cost its time again and again. Here the
leaves that hold weights are replaced by ones that hold those of all runs, [runs, ...] each; what
has none, `simplex::attn` among it, takes rows as they come. No sum crosses runs, so that all train
as they would alone, up to rounding.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.experiments.model import Model


def stacked(models: Sequence[Model]) -> Model:
    """Return one model of rows [runs * B, N, fields], those of the first run first.

    Of one model that is itself.
    """
    if len(models) == 1:
        return models[0]
    together = copy.deepcopy(models[0])
    for name, leaf in list(together.named_modules()):
        if next(leaf.children(), None) is None and next(leaf.parameters(), None) is not None:
            leaves = [model.get_submodule(name) for model in models]
            parent, _, last = name.rpartition(".")
            setattr(together.get_submodule(parent), last, _KINDS[type(leaf)](leaves))
    return together


def keep(model: Model, runs: Tensor) -> None:
    """Leave in a stack those of its runs alone, by their places."""
    for leaf in model.modules():
        if isinstance(leaf, _Leaf):
            for name, values in list(leaf.named_parameters()):
                kept = nn.Parameter(values.detach()[runs], requires_grad=values.requires_grad)
                leaf.register_parameter(name, kept)


class _Leaf(nn.Module):
    """The parameters of a leaf, [runs, ...], frozen where the leaf's are."""

    def __init__(self, leaves: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, first in leaves[0].named_parameters():
            values = torch.stack([leaf.get_parameter(name).detach() for leaf in leaves])
            self.register_parameter(name, nn.Parameter(values, requires_grad=first.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(0, (len(self.get_parameter("weight")), -1))
        return self.of_runs(rows).flatten(0, 1)

    def of_runs(self, x: Tensor) -> Tensor:
        """Return what the leaf gives, for x [runs, B, ...]."""
        raise NotImplementedError


class _Linear(_Leaf):
    weight: Tensor  # [runs, outputs, inputs]
    bias: Tensor | None  # [runs, outputs]

    def __init__(self, leaves: Sequence[nn.Module]) -> None:
        super().__init__(leaves)
        if "bias" not in self._parameters:
            self.bias = None

    def of_runs(self, x: Tensor) -> Tensor:
        rows, turned = x.flatten(1, -2), self.weight.mT
        if self.bias is None:
            return torch.bmm(rows, turned).view(*x.shape[:-1], -1)
        return torch.baddbmm(self.bias[:, None], rows, turned).view(*x.shape[:-1], -1)


class _LayerNorm(_Leaf):
    weight: Tensor  # [runs, width]
    bias: Tensor  # [runs, width]

    def __init__(self, leaves: Sequence[nn.Module]) -> None:
        super().__init__(leaves)
        assert isinstance(leaves[0], nn.LayerNorm)
        self.eps = leaves[0].eps

    def of_runs(self, x: Tensor) -> Tensor:
        unit = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], unit, self.weight[:, None, None])


class _Embedding(_Leaf):
    """A product with rows of one 1: its gradient needs no sorting of tokens."""

    weight: Tensor  # [runs, values, width]

    def of_runs(self, x: Tensor) -> Tensor:
        values = torch.arange(self.weight.shape[1], device=x.device)
        chosen = (x.flatten(1)[..., None] == values).to(self.weight.dtype)
        return torch.bmm(chosen, self.weight).view(*x.shape, -1)


_KINDS: dict[type[nn.Module], type[_Leaf]] = {
    nn.Linear: _Linear,
    nn.LayerNorm: _LayerNorm,
    nn.Embedding: _Embedding,
}
