"""Cases about the prompt tokens that an endpoint counts: thinking switched off, images of many sizes, and streams.

The expected tokens of an image are the core's own count.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

from PIL import Image

from k26_plugins.common.multimodal.image import MediaConfig, navit_resize
from k26_plugins.operate.verify.conformance.case import QUESTION, Case, Chat, NotAskedError, require
from k26_plugins.operate.verify.endpoint import data_url

# Width and height in pixels: an image of one token, one whose sides are no multiple of a patch, a wide one, a tall one,
# a photo, and one that is shrunk to the limit.
SIZES = ((28, 28), (57, 29), (1000, 100), (90, 700), (640, 480), (2560, 1920))
ROOM = 256
"""Tokens of context that are kept for everything but the images."""


def image_part(width: int, height: int) -> dict[str, Any]:
    """Return an image of this size in pixels as a part of a chat message."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}


def tokens_of(width: int, height: int) -> int:
    """Return how many tokens the core counts for an image of this size in pixels, with the published preprocessing."""
    return navit_resize(width, height, MediaConfig()).num_tokens


def _count(chat: Chat, *sizes: tuple[int, int]) -> int:
    limit, needed = chat.endpoint.context_length(), sum(tokens_of(*size) for size in sizes) + ROOM
    if limit is not None and needed > limit:
        raise NotAskedError(f"it needs {needed:,} tokens, and the server's context is {limit:,}")
    return chat.prompt_tokens([*(image_part(*size) for size in sizes), {"type": "text", "text": QUESTION}])


def _images(chat: Chat, sizes: tuple[tuple[int, int], ...]) -> str:
    """Check the prompt tokens of a chat with images of these sizes.

    Around its own tokens each image adds the same number of others. The smallest image shows how many these are.
    """
    bare, smallest = _count(chat), _count(chat, SIZES[0])
    around = smallest - bare - tokens_of(*SIZES[0])
    require(around > 0, f"{smallest} prompt tokens with an image and {bare} without: the image is not in the prompt")
    found, expected = _count(chat, *sizes) - bare, sum(tokens_of(*size) + around for size in sizes)
    require(found == expected, f"images take {found} prompt tokens, expected {expected}")
    return f"{found} tokens"


def _thinking(chat: Chat) -> str:
    require(bool(chat.off), "neither chat_template_kwargs.thinking nor thinking.type changes the prompt by a token")
    return next(iter(chat.off))


def _stream(chat: Chat) -> str:
    whole = chat.ask(QUESTION, max_tokens=4, temperature=0)["usage"]
    usage = chat.streamed(QUESTION, max_tokens=4, temperature=0, stream_options={"include_usage": True})["usage"]
    require(usage is not None, "the stream ends without its usage")
    names = ("prompt_tokens", "completion_tokens")
    found = [int(usage[name]) for name in names]
    require(found == [int(whole[name]) for name in names], f"the stream counts {found}, the whole answer {whole}")
    return f"{found[0]} prompt tokens"


def cases() -> list[Case]:
    """Return the cases about prompt tokens."""
    found = [Case("thinking switched off", _thinking), Case("usage of a stream", _stream)]
    found += [Case(f"image of {w} × {h}", partial(_images, sizes=((w, h),))) for w, h in SIZES[1:]]
    return [*found, Case("three images", partial(_images, sizes=SIZES[1:4]))]
