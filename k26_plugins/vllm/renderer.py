"""Chats to prompts in vLLM: its own renderer, with the messages' text marked before anything is put into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm.renderers.hf import HfRenderer

from k26_plugins.common.prompt.chat import keep_arguments
from k26_plugins.common.prompt.control_tokens import escape_deep, unescape_deep
from k26_plugins.common.settings import control_tokens_as_text


class K26Renderer(HfRenderer):
    """What belongs to tokenizer mode `k26`.

    Marked here and not in the tokenizer: with a template of the user's vLLM writes the images' places into the text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.escape_messages = control_tokens_as_text()

    def render_messages(self, messages: Any, params: Any) -> Any:
        conversation, prompt = super().render_messages(self._ready(messages), _params(params))
        return unescape_deep(conversation), prompt

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        conversation, prompt = await super().render_messages_async(self._ready(messages), _params(params))
        return unescape_deep(conversation), prompt

    def _ready(self, messages: Sequence[Any]) -> Any:
        return keep_arguments(escape_deep(messages) if self.escape_messages else messages)


def _params(params: Any) -> Any:
    """`thinking` under its other name too; and, unless the user chose a template or a format, media as parts of the
    content, so that each is rendered where it stands."""
    options = dict(params.chat_template_kwargs)
    if "enable_thinking" in options:
        options.setdefault("thinking", options["enable_thinking"])
    chosen = params.chat_template is not None or params.chat_template_content_format != "auto"
    content_format = params.chat_template_content_format if chosen else "openai"
    return dataclasses.replace(params, chat_template_kwargs=options, chat_template_content_format=content_format)
