"""What can be learned of the kernels from their compiled code, and under NVIDIA's checkers."""
