"""The shared memory that the portable kernels need, by arithmetic: bounds, held by a test.

They were held against what Triton 3.7.1 reports for every choice in tools/compiled/registers.json.
"""

from csrc_free.traits import Device, Traits

_RESERVE = 2048  # bytes: barriers, reductions over rows, row statistics


def forward_bytes(rows: int, block_n: int, stages: int, traits: Traits, device: Device) -> int:
    """Return a bound for `rows` virtual queries that meet `block_n` wide keys at a time."""
    size = traits.operand_bytes
    if device.backend == "hip":
        return _amd_bytes(rows, block_n, stages, traits)
    virtual_queries = size * rows * traits.block_d
    # Keys and values that are not loaded ahead take turns in one place.
    columns = traits.columns if stages == 1 else stages * (traits.block_d + traits.block_dv)
    weights = (4 + size) * rows * block_n
    merging = 4 * rows * traits.block_dv  # after the loop, in the same place
    return max(virtual_queries + size * block_n * columns + weights, merging) + _RESERVE


def backward_bytes(kept: int, streamed: int, stages: int, traits: Traits, device: Device) -> int:
    """Return a bound for `kept` rows of two tensors that meet `streamed` rows of two others."""
    if device.backend == "hip":
        return _amd_bytes(kept, streamed, stages, traits)
    operands = traits.operand_bytes * (traits.block_d + traits.block_dv)
    converted = 4 * max(kept, streamed) * traits.columns
    return operands * (kept + stages * streamed) + converted + _RESERVE


def _amd_bytes(rows: int, others: int, stages: int, traits: Traits) -> int:
    """Return a bound where operands stay in registers, and two tiles at most change layout."""
    return (1 + stages) * traits.operand_bytes * max(rows, others) * traits.columns + _RESERVE
