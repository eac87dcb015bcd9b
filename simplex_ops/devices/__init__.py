"""The implementations: the blocked path of the CPU, and any device that has kernels."""
