"""The autocast rule of `scaled_dot_product_attention`: every input goes to the autocast dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simplex_ops.contract.schema import ATTN_OP


def autocast_kernel(device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the kernel of simplex::attn under autocast on a device type ("cpu", "cuda", "xpu").

    Floating-point inputs of that device are cast, float64 excepted, as PyTorch's own rule does.
    """
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")

    def cast(tensor: Tensor) -> Tensor:
        eligible = (
            tensor.is_floating_point()
            and tensor.device.type == device_type
            and tensor.dtype != torch.float64
        )
        return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor

    def attn(
        q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, *windows: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return ATTN_OP(*map(cast, (q, k1, k2, v1, v2)), *windows, **options)

    return attn
