"""Lets SGLang's KV cache in host memory (HiCache) run without a GPU, by replacing two of its parts that need one.

With this test plugin, which every process of the server loads, host memory is not pinned, and a plain copy replaces the
kernel that copies rows of a KV cache between device and host memory. All else is SGLang's code: which rows are kept,
where they go, and when they come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_POOLS = "sglang.srt.mem_cache.pool_host"
FLAGS = [
    "--enable-hierarchical-cache",
    # With these two options, one kernel copies in both directions.
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
]


def register() -> None:
    """Replace SGLang's pinning of host memory by `unpinned`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_POOLS}.common._cuda_host_register", unpinned, HookType.REPLACE)


def unpinned(buffer: torch.Tensor, granularity: int | None = None) -> None:
    """Pin nothing, and give SGLang's module for MLA a plain copy for the kernel that it lacks without a GPU.

    SGLang calls this for the host's memory before it copies anything there.
    """
    from sglang.srt.mem_cache.pool_host import mla

    mla.transfer_kv_direct = copy_rows


def copy_rows(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy each layer's rows `src_indices` of a cache to rows `dst_indices` of another."""
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices] = source[src_indices]
