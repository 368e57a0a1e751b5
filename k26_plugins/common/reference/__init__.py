"""The whole model in plain PyTorch: the reference that every engine's answers are compared with."""
