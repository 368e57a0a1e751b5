"""Hold a running endpoint against a golden file, or endpoints against each other."""
