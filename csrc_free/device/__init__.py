"""Jit code that all kernels share: forms, what the rows of a tile see, loads."""
