"""The whole model in plain PyTorch, which every engine is held to."""
