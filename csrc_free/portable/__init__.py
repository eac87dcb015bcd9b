"""The portable kernels, in plain Triton, for any GPU that Triton serves."""
