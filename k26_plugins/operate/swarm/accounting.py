"""Compute the token ids of a conversation's prompt with the core, to compare a server's prompt with them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k26_plugins.common.model.config import K26Config
from k26_plugins.common.multimodal.image import MediaConfig, navit_resize, open_image
from k26_plugins.common.prompt.chat import expand_media_placeholders, render
from k26_plugins.common.prompt.tokenizer import KimiTokenizer


class Accountant:
    """A renderer and tokenizer of requests, with the chat template and tokenizer of the checkpoint in `folder`."""

    def __init__(self, folder: Path) -> None:
        """Read the checkpoint's files. Raises TokenizerError, ConfigError and MediaError if they cannot be used."""
        self.folder = folder
        self.tokenizer = KimiTokenizer(folder)
        config = K26Config.from_path(folder)
        self.tokenizer.check(config)
        self._placeholder = config.media_placeholder_token_id
        self._media = MediaConfig.from_path(folder)

    def token_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]], thinking: bool
    ) -> list[int]:
        """Return the token ids of the prompt of `messages`, each image's placeholder repeated to its number of tokens.

        Images must be data URLs in base64.
        """
        text = render(messages, self.folder, tools=tools, thinking=thinking)
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        counts = [self._image_tokens(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        return expand_media_placeholders(self.tokenizer.encode_prompt(text), counts, self._placeholder)

    def _image_tokens(self, url: str) -> int:
        size = open_image(base64.b64decode(url.split(",", 1)[1])).size
        return navit_resize(*size, self._media).num_tokens
