"""SGLang's cache in the host's memory (HiCache) without a GPU, for which two pieces of it are a GPU's alone.

A plugin of the tests' own, in each process of the server: host memory is not pinned, and the kernel that copies rows of a KV
cache between two memories is a plain copy. All else is SGLang's: what is kept, where it goes, when it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_POOLS = "sglang.srt.mem_cache.pool_host"
FLAGS = [
    "--enable-hierarchical-cache",
    # The form that has one kernel for both ways.
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
]


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_POOLS}.common._cuda_host_register", unpinned, HookType.REPLACE)


def unpinned(buffer: torch.Tensor, granularity: int | None = None) -> None:
    """Called for the host's memory, before anything is copied there: without a GPU that module lacks the kernel."""
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
