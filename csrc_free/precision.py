"""How matrix products multiply float32: by the dtype, the device, and what the user set."""

import torch

from csrc_free import tracing
from csrc_free.traits import Device

# Of more columns, operands in three parts take more shared memory than some devices have.
_MOST_COLUMNS_IN_PARTS = 128


def precision_of(dtype: torch.dtype, columns: int, device: Device) -> str | None:
    """Return PRECISION of `device.products`, for operands of so many columns.

    float16 keeps every bit in TF32. float32 keeps its own in three parts of bfloat16. One product
    of TF32 numbers, or IEEE arithmetic, is what PyTorch's setting asks for where a user made one:
    `torch.backends.cuda.matmul.fp32_precision`, which `torch.set_float32_matmul_precision` and
    `allow_tf32` write too.
    """
    if dtype == torch.bfloat16:
        return None
    if not device.has_tf32:
        return "ieee"
    if dtype == torch.float16:
        return "tf32"
    if not tracing.keeps_precision():
        tracing.leave("the precision of float32 products is a setting, read when the operator runs")
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting in ("ieee", "tf32"):
        return setting
    has_parts = device.backend == "cuda" and columns <= _MOST_COLUMNS_IN_PARTS
    return "bf16x6" if has_parts else "ieee"
