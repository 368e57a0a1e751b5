"""The SGLang adapter. SGLang calls `register` in every process, through the entry point `sglang.srt.plugins`.

SGLang 0.5.10 has no such entry point. There an environment variable makes the adapter active: see `boot/`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from k26_plugins.common.adapters.activation import activate

if TYPE_CHECKING:
    from k26_plugins.common.adapters.registration import Registration

# The logger is a child of SGLang's own, so that SGLang's level and format apply.
logger = logging.getLogger("sglang.k26_plugins")


def register() -> None:
    """Put Kimi-K2.6's classes into SGLang's registries. A second call does no harm.

    `SGLANG_PLUGINS` without `k26` in it switches the plugin off.
    """
    activate("SGLang", logger, _note)


def _note(changes: Registration) -> None:
    from k26_plugins.sglang import compat

    compat.register_media(changes, "k26_plugins.sglang.media")
    compat.register_config(changes, "k26_plugins.sglang.config", "KimiK25Config")
    compat.register_processor(changes, "k26_plugins.sglang.processor", "K26Processor")
    compat.register_argument_hook(changes, "k26_plugins.sglang.arguments", "before_settling")
    compat.register_models(changes, "k26_plugins.sglang.models")
    # This change must be the last: SGLang's own registry of hooks cannot take back a hook that it has applied.
    compat.register_tokenizer_hook(changes, "k26_plugins.sglang.process", "prepare")
