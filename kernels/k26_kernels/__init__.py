"""Triton kernels of Kimi-K2.6's INT4 experts; imports torch and triton only.

No kernel is here yet: on GPUs the engines keep their own experts, on CPUs `k26_plugins.common.experts` has none to import.
"""
