"""SGLang's server of prefill without a GPU, for which the way it tells Mooncake what to send is a GPU's alone.

It copies the numbers of a prompt's pages to pinned memory and notes when, by CUDA's events; for other transfers it says them
plainly. A plugin of the tests' own, in each process of the server, has it do that for Mooncake too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TARGET = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, plainly, HookType.AROUND)


def plainly(original: Callable[..., None], scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    request.disagg_kv_sender.supports_host_tensor_indices = False
    original(scheduler, request, *args, **kwargs)
