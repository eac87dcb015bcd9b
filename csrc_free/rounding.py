"""Whole numbers on the host.

Triton's cdiv and next_power_of_2 serve kernels too, and cost a launcher, which calls them a dozen
times, more than they need.
"""


def ceil_div(count: int, size: int) -> int:
    """Return how many parts of a size hold so many; both may be symbols."""
    return (count + size - 1) // size


def next_power_of_2(count: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << int(count - 1).bit_length()
