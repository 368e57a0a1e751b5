"""SGLang's server of the encoder with PyPI's build of its kernels, which lacks those of another model for CPUs.

The server imports that model's file, which names its kernels at once and calls them for that model alone. A plugin of the
tests' own, in each process of the server, gives the names something to be.
"""

from __future__ import annotations

NAMES = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


def register() -> None:
    import torch

    for name in NAMES:
        if not hasattr(torch.ops.sgl_kernel, name):
            setattr(torch.ops.sgl_kernel, name, None)
