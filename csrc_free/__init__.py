"""Triton kernels of 2-simplicial attention, and their launchers.

This floor knows tensors and numbers, not operators.
"""
