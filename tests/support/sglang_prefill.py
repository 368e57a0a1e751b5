"""SGLang's server of prefill without a GPU, for which the way it tells Mooncake what to send is a GPU's alone.

It copies the numbers of a prompt's pages to pinned memory and notes when, by CUDA's events; for other transfers it says them
plainly. A plugin of the tests' own, in each process of the server, has it do that for Mooncake too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.entry_point import write_entry_point
from support.server import python_path

_TARGET = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, plainly, HookType.AROUND)


def plainly(original: Callable[..., None], scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    request.disagg_kv_sender.supports_host_tensor_indices = False
    original(scheduler, request, *args, **kwargs)


def settings(folder: Path) -> dict[str, str]:
    """What to set for the server. folder: an empty one, for the plugin's metadata."""
    write_entry_point(folder, "k26_prefill", "sglang.srt.plugins", "support.sglang_prefill:register")
    return {"PYTHONPATH": os.pathsep.join([str(folder), python_path()])}
