"""Triton kernels of 2-simplicial attention and their launchers: tensors and numbers, no operators."""
