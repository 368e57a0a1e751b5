"""Compute Kimi-K2.6's INT4 experts by Triton kernels. This package imports torch and triton only.

docs/kernels.md explains how the kernels work.
"""

from k26_kernels.batched import batched_experts, batched_plan
from k26_kernels.config import Shape
from k26_kernels.experts import KernelExperts, fused_experts, use_configs, workspace_bytes
from k26_kernels.layout import repack, restore
from k26_kernels.target import device_of
from k26_kernels.variants import compile_batched, compile_variants

__all__ = [
    "KernelExperts",
    "Shape",
    "batched_experts",
    "batched_plan",
    "compile_batched",
    "compile_variants",
    "device_of",
    "fused_experts",
    "repack",
    "restore",
    "use_configs",
    "workspace_bytes",
]
