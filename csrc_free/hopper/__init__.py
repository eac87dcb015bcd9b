"""Kernels for Hopper (sm_90) in Gluon: narrower than the portable ones, and faster where they serve."""
