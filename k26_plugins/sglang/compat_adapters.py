"""What the adapter touches of SGLang's LoRA, beside `compat`."""

from __future__ import annotations

from collections.abc import Callable

from k26_plugins.common.adapters.registration import Registration
from k26_plugins.sglang import compat, names


def hook_adapters(hook: Callable[..., None]) -> None:
    """Put `hook(original, adapter, name, weight)` around what takes each tensor of a LoRA adapter's file."""
    changes = Registration()
    compat.wrap(changes, names.LORA_WEIGHT, hook)
    changes.apply()


def serves_adapters() -> bool:
    """Whether the user's flags ask for LoRA: SGLang turns it on by itself where adapters are named."""
    return bool(compat.server_args().enable_lora)
