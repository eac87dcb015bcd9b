"""What every backward needs before and after its kernels: row statistics, parts and their sums."""
