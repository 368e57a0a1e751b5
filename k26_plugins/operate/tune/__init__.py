"""Measure the core's kernels and an engine's on this GPU, at the shapes of one rank, for `k26 tune`."""
