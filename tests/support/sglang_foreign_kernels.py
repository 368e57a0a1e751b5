"""Lets SGLang's encoder server start with PyPI's build of its kernels, which lacks CPU kernels of another model.

The server imports that other model's file, which looks up its kernels on import but calls them for its own model only.
This test plugin, which every process of the server loads, gives the missing names a value.
"""

from __future__ import annotations

NAMES = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


def register() -> None:
    """Set each missing kernel to None."""
    import torch

    for name in NAMES:
        if not hasattr(torch.ops.sgl_kernel, name):
            setattr(torch.ops.sgl_kernel, name, None)
