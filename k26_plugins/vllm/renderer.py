"""Chats to prompts in vLLM: its own renderer, with the messages' text marked before anything is put into it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from vllm.renderers.hf import HfRenderer

from k26_plugins.common.data_url import is_data_url, require_url
from k26_plugins.common.prompt.chat import keep_arguments
from k26_plugins.common.prompt.control_tokens import escape_deep, unescape_deep
from k26_plugins.common.prompt.thinking import template_options
from k26_plugins.common.settings import control_tokens_as_text


class K26Renderer(HfRenderer):
    """What belongs to tokenizer mode `k26`.

    Marked here and not in the tokenizer: with a template of the user's vLLM writes the images' places into the text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.escape_messages = control_tokens_as_text()

    def render_messages(self, messages: Any, params: Any) -> Any:
        conversation, prompt = super().render_messages(self._ready(messages, params), _params(params))
        return unescape_deep(conversation), prompt

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        conversation, prompt = await super().render_messages_async(self._ready(messages, params), _params(params))
        return unescape_deep(conversation), prompt

    def _ready(self, messages: Sequence[Any], params: Any) -> Any:
        kept = keep_arguments(escape_deep(messages) if self.escape_messages else messages)
        if params.chat_template is None:
            kept = [_as_system(message) if message.get("role") == "developer" else message for message in kept]
        return _named(kept)


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """A developer's message by another name: the template writes the same of it.

    vLLM looks for the role's name in the template, and would move it to the beginning, together with every system message.
    """
    return {**message, "role": "system", "name": message.get("name") or "developer"}


def _named(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Media with names, in place, where there is a video: vLLM names its chunks, and then wants every image named too.

    A name is the key of vLLM's caches: media that came with their data have their data's. Raises MediaError for a medium
    without an address: vLLM would look for its name in its cache, but has no such way for this model's media, and fails.
    """
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    media = [part for content in contents for part in content if isinstance(part, dict) and _is_medium(part)]
    for part in media:
        require_url(_url(part))
    if any("video_url" in part for part in media):
        for part in media:
            url = _url(part)
            digest = hashlib.sha256(url.encode()).hexdigest() if is_data_url(url) else uuid4().hex
            if not part.get("uuid"):
                part["uuid"] = digest
    return messages


def _is_medium(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    if isinstance(kind, str):
        return kind in ("image_url", "input_image", "video_url")
    return "image_url" in part or "video_url" in part


def _url(part: dict[str, Any]) -> Any:
    medium = part.get("video_url") or part.get("image_url")
    return medium.get("url") if isinstance(medium, dict) else medium


def _params(params: Any) -> Any:
    """One value of `thinking`; and, unless the user chose a template or a format, media as parts of the
    content, so that each is rendered where it stands."""
    options = template_options(params.chat_template_kwargs)
    chosen = params.chat_template is not None or params.chat_template_content_format != "auto"
    content_format = params.chat_template_content_format if chosen else "openai"
    return dataclasses.replace(params, chat_template_kwargs=options, chat_template_content_format=content_format)
