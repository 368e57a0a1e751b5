"""What `k26 tune` measures: the core's kernels and an engine's, on this GPU, at the shapes of a rank."""
