"""Compare a running endpoint with a golden file, or several endpoints with each other."""
