"""Kernels for Hopper (sm_90) in Gluon: they serve less than the portable ones, faster."""
