"""Kimi-K2.6 for vLLM, SGLang and KTransformers from one core."""

__version__ = "0.1.0"
