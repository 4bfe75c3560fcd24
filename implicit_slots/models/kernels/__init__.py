"""Kernels in Pallas, for what XLA's compilers would store and need not."""
