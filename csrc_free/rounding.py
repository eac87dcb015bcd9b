"""Whole numbers on the host.

Triton has functions of these names, which kernels may call too: a launcher pays 5 us a call there.
"""


def ceil_div(count: int, size: int) -> int:
    """Return how many parts of a size hold so many; both may be symbols."""
    return (count + size - 1) // size


def next_power_of_2(count: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << int(count - 1).bit_length()
