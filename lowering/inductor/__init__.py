"""Inductor lowerings of both operators: their Triton kernels become nodes of the compiled graph."""
