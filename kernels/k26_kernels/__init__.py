"""Triton kernels of Kimi-K2.6's INT4 experts. Imports torch and triton only."""
