"""Lets SGLang's prefill server run without a GPU, where it could not tell Mooncake which pages to send.

For Mooncake the server copies the indices of a prompt's pages to pinned memory and records a CUDA event; to other
transfer backends it passes them directly. With this test plugin, which every process of the server loads, it passes
them directly to Mooncake too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TARGET = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk"


def register() -> None:
    """Put `plainly` around SGLang's sending of a chunk of the KV cache."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, plainly, HookType.AROUND)


def plainly(original: Callable[..., None], scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Have the sender take the pages' indices directly instead of from pinned memory."""
    request.disagg_kv_sender.supports_host_tensor_indices = False
    original(scheduler, request, *args, **kwargs)
