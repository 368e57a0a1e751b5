"""What the adapter touches of SGLang for hybrid runs, beside `compat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.registration import Registration
from k26_plugins.sglang import compat, names


def hook_results(hook: Callable[..., Any]) -> None:
    """Put `hook(original, scheduler, batch, result)` around what gives a step's tokens to their requests."""
    changes = Registration()
    compat.wrap(changes, names.BATCH_RESULT, hook)
    changes.apply()
