"""One rule of the operators a file: fake kernels, autograd, autocast, FLOPs, the caches' key."""
