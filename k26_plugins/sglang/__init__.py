"""The SGLang adapter. SGLang calls `register` in every process, through the entry point `sglang.srt.plugins`.

0.5.10 has no such entry point and gets it by one environment variable: see `boot/`.
"""

from __future__ import annotations

import logging

# Under SGLang's own logger, so that its level and format apply.
logger = logging.getLogger("sglang.k26_plugins")


def register() -> None:
    """Put Kimi-K2.6's classes into SGLang's registries. Repeatable, and never raises.

    A failure is logged, and SGLang stays as it was. `SGLANG_PLUGINS` without `k26` in it switches the plugin off.
    """
    try:
        from k26_plugins.common.remote_code import refuse_remote_code
        from k26_plugins.sglang import compat

        refuse_remote_code()
        compat.register_media("k26_plugins.sglang.media")  # first: it is the one that a user's settings may forbid
        compat.register_config("k26_plugins.sglang.config", "KimiK25Config")
        compat.register_processor("k26_plugins.sglang.processor", "K26Processor")
        compat.register_tokenizer_hook("k26_plugins.sglang.tokenizer", "get_tokenizer")
        compat.register_argument_hook("k26_plugins.sglang.serving", "choose_parsers")
        compat.register_models("k26_plugins.sglang.models")
    except Exception:
        logger.exception("k26-plugins is not active: SGLang serves Kimi-K2.6 with its own code.")
