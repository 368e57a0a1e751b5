"""Makes scripted answers work in SGLang's Messages and Responses APIs, whose classes drop the fields that order one.

This test plugin, which SGLang loads through its entry point, reads those fields from the request's body as it was sent.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

_TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"


def register() -> None:
    """Put `order` around SGLang's generation of a request's answer."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, order, HookType.AROUND)


async def order(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Pass the two fields that order an answer on to the sampler, as SGLang's own chat API does."""
    # A request by gRPC has no body; the chat API reads its fields itself.
    sent = json.loads(await request.body() or b"{}") if hasattr(request, "body") else {}
    if "custom_params" in sent and obj.custom_logit_processor is None:
        obj.custom_logit_processor = sent["custom_logit_processor"]
        obj.sampling_params["custom_params"] = sent["custom_params"]
    async for chunk in original(manager, obj, request):
        yield chunk
