"""What the 2-simplicial layers of a model give the operator, recorded while it runs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simplex_ops import AttendedPairs, attended_pairs


@dataclass(frozen=True)
class Call:
    """What one layer gave the operator."""

    q: Tensor  # [B, H, N, D]
    k1: Tensor
    k2: Tensor
    window: tuple[int | None, int | None]
    options: dict[str, Any] = field(default_factory=dict)

    def pairs(self, *, top: int = 8) -> AttendedPairs:
        found = attended_pairs(
            self.q, self.k1, self.k2, window=self.window, top=top, **self.options
        )
        return AttendedPairs(*(t.cpu() for t in found))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.simplex.attn.default:
            q, k1, k2, _, _, *windows = args
            options = {k: v for k, v in (kwargs or {}).items() if k != "v2_bias"}
            w1 = options.pop("w1", None) if not windows else windows[0]
            w2 = options.pop("w2", None) if len(windows) < 2 else windows[1]
            q, k1, k2 = (t.detach().clone() for t in (q, k1, k2))
            self.calls.append(Call(q, k1, k2, (w1, w2), options))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def calls_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Call]:
    """Run a model, not compiled, and return what each of its 2-simplicial layers asked, in order.

    Raises:
        ValueError: it has no such layer, or what runs is compiled and calls something else.
    """
    with _Recorder() as recorder:
        model(*args, **kwargs)
    if not recorder.calls:
        raise ValueError(
            "model must call simplicial_attention, but torch.ops.simplex.attn was not reached: "
            "give the model itself, not what torch.compile made of it, with a 2-simplicial layer"
        )
    return recorder.calls
