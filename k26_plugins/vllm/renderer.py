"""Chats to prompts in vLLM: its own renderer, with the messages' text marked before anything is put into it."""

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
    """What belongs to tokenizer mode `k26`.

    Marked here and not in the tokenizer: with a template of the user's vLLM writes the images' places into the text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.escape_messages = CONTROL_TOKENS.read() == "text"

    def render_messages(self, messages: Any, params: Any) -> Any:
        ready, names = self._ready(messages, params)
        conversation, prompt = super().render_messages(ready, _params(params))
        _identify(prompt, names)
        return unescape_deep(conversation), prompt

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        ready, names = self._ready(messages, params)
        conversation, prompt = await super().render_messages_async(ready, _params(params))
        _identify(prompt, names)
        return unescape_deep(conversation), prompt

    def _ready(self, messages: Sequence[Any], params: Any) -> tuple[list[dict[str, Any]], set[str]]:
        """The messages as vLLM renders them, and the names that media have for the length of the rendering."""
        kept = keep_arguments(escape_deep(messages) if self.escape_messages else messages)
        if params.chat_template is None:
            kept = [_as_system(message) if message.get("role") == "developer" else message for message in kept]
        return _named(kept)


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """A developer's message by another name: the template writes the same of it.

    vLLM looks for the role's name in the template, and would move it to the beginning, together with every system message.
    """
    return {**message, "role": "system", "name": message.get("name") or "developer"}


def _named(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], set[str]]:
    """Give every medium a name where there is a video: vLLM names a video's chunks, and then wants all media named.

    Returns the messages and the names given here, which `_identify` replaces. Raises MediaError for a medium without an
    address: vLLM would look for its name in its cache, but has no such way for this model's media, and fails.
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
    """Replaces the names that were given here: they are the keys of vLLM's caches, and the same medium has to be found
    there in the next turn. A video's chunk is known by its pixels; an image without a name vLLM identifies itself."""
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
    """One value of `thinking`; and, unless the user chose a template or a format, media as parts of the
    content, so that each is rendered where it stands."""
    options = template_options(params.chat_template_kwargs)
    chosen = params.chat_template is not None or params.chat_template_content_format != "auto"
    content_format = params.chat_template_content_format if chosen else "openai"
    return dataclasses.replace(params, chat_template_kwargs=options, chat_template_content_format=content_format)
