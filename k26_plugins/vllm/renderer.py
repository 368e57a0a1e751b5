"""Renders chats to prompts by vLLM's own renderer, after marking as text the control tokens that messages spell."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import numpy as np
from vllm.renderers.hf import HfRenderer

from k26_plugins.common.multimodal.data_url import require_url
from k26_plugins.common.multimodal.video import VideoChunk
from k26_plugins.common.prompt.chat import keep_arguments
from k26_plugins.common.prompt.control_tokens import escape_deep, unescape_deep
from k26_plugins.common.prompt.thinking import template_options
from k26_plugins.common.settings import CONTROL_TOKENS


class K26Renderer(HfRenderer):
    """The renderer of the tokenizer mode `k26`.

    It marks control tokens in messages itself, because the tokenizer would be too late: with a chat template of the
    user's, vLLM writes the placeholders of images into the text before that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.escape_messages = CONTROL_TOKENS.read() == "text"

    def render_messages(self, messages: Any, params: Any) -> Any:
        """Return the conversation and the prompt of a chat whose text holds no control tokens."""
        ready, names = self._ready(messages, params)
        conversation, prompt = super().render_messages(ready, _params(params))
        _identify(prompt, names)
        return unescape_deep(conversation), prompt

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """Return the same as `render_messages`."""
        ready, names = self._ready(messages, params)
        conversation, prompt = await super().render_messages_async(ready, _params(params))
        _identify(prompt, names)
        return unescape_deep(conversation), prompt

    def _ready(self, messages: Sequence[Any], params: Any) -> tuple[list[dict[str, Any]], set[str]]:
        """Return the messages that vLLM is to render, and the names that media have until the rendering is done."""
        kept = keep_arguments(escape_deep(messages) if self.escape_messages else messages)
        if params.chat_template is None:
            kept = [_as_system(message) if message.get("role") == "developer" else message for message in kept]
        return _named(kept)


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """Turn a message of the role `developer` into a system message, which the template renders to the same text.

    vLLM looks for the word "developer" in the template. As it does not find it, vLLM would move the message to the
    beginning of the chat, together with every system message.
    """
    return {**message, "role": "system", "name": message.get("name") or "developer"}


def _named(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], set[str]]:
    """Give every medium of the messages a name if one of them is a video.

    vLLM names the chunks of a video, and then requires that all media have names. Returns the messages and the names
    given here, which `_identify` replaces. Raises MediaError for a medium without a URL: vLLM would look for the
    medium's name in its cache, which it cannot do for this model's media, and fail.
    """
    media = [part for message in messages for part in _parts(message) if _is_medium(part)]
    for part in media:
        require_url(_url(part))
    names: set[str] = set()
    if not any("video_url" in part for part in media):
        return messages, names

    def named(part: Any) -> Any:
        if not _is_medium(part) or part.get("uuid"):
            return part
        names.add(name := uuid4().hex)
        return {**part, "uuid": name}

    return [
        {**message, "content": [named(part) for part in parts]} if (parts := _parts(message)) else message
        for message in messages
    ], names


def _identify(prompt: Any, names: set[str]) -> None:
    """Replace the names that `_named` gave, in place.

    A medium's name is its key in vLLM's caches, so the same medium must have the same name in the next turn. A chunk of
    a video is named by the hash of its pixels. An image loses its name, and vLLM then identifies it by its content.
    """
    if not names:
        return
    chunks = prompt["multi_modal_data"]["vision_chunk"]
    for chunk in chunks:
        name = chunk["uuid"]
        if name in names:
            chunk["uuid"] = None
        elif name.rpartition("-")[0] in names:
            chunk["uuid"] = _digest(chunk["video_chunk"])
    prompt["multi_modal_uuids"] = {**prompt["multi_modal_uuids"], "vision_chunk": [chunk["uuid"] for chunk in chunks]}


def _digest(chunk: VideoChunk) -> str:
    content = hashlib.sha256(repr((chunk.grid_thw, chunk.num_tokens)).encode())
    content.update(np.ascontiguousarray(chunk.patches).data)
    return content.hexdigest()


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_medium(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if isinstance(kind, str):
        return kind in ("image_url", "input_image", "video_url")
    return "image_url" in part or "video_url" in part


def _url(part: dict[str, Any]) -> Any:
    medium = part.get("video_url") or part.get("image_url")
    return medium.get("url") if isinstance(medium, dict) else medium


def _params(params: Any) -> Any:
    """Return the parameters of a rendering with one value of `thinking`.

    Unless the user chose a chat template or a content format, media stay parts of the content, so that the template
    renders each where it stands.
    """
    options = template_options(params.chat_template_kwargs)
    chosen = params.chat_template is not None or params.chat_template_content_format != "auto"
    content_format = params.chat_template_content_format if chosen else "openai"
    return dataclasses.replace(params, chat_template_kwargs=options, chat_template_content_format=content_format)
