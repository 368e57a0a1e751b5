"""What the adapter touches of SGLang for hybrid runs, beside `compat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.registration import Registration
from k26_plugins.sglang import compat


def hook_results(hook: Callable[..., Any]) -> None:
    """Put `hook(original, scheduler, batch, result)` around what gives a step's tokens to their requests."""
    changes = Registration()
    scheduler = compat.private("sglang.srt.managers.scheduler", "Scheduler")
    compat.wrap(changes, scheduler, "process_batch_result", hook)
    changes.apply()
