"""Keep text that spells a control token as text, on its way through a rendered prompt.

A chat prompt is one string that contains the template's control tokens and the messages' own text, and every engine
passes this string to a tokenizer. Therefore, the text of messages is marked before it is rendered: a Unicode
noncharacter, which no text contains, is inserted in the middle of everything that might spell a control token, so that
no tokenizer finds one there. The core's tokenizers remove the marks after they have found the control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# U+FDD0 and the code point after it are removed or restored together. Unicode reserves them for internal use.
_SIGN = "\ufdd0"
MARK = _SIGN + "\ufdd1"
QUOTED_SIGN = _SIGN + "\ufdd2"
# Every way in which a control token can begin, even if its rest is in the next part of the content.
_BEGINNING = re.compile(r"<(?=[|]|/?th|/?t?$)|\[(?=[BEUP]|$)")
MAX_DEPTH = 100
"""Levels of lists and objects in a message or a tool.

Deeper data would reach Python's recursion limit, and the request would fail as an error of the server.
"""
_MEDIA_KEYS = ("image_url", "video_url", "image", "video", "input_audio")


def escape(text: str) -> str:
    """Return `text` with marks, for a prompt that one of the core's tokenizers reads."""
    if _SIGN in text:
        text = text.replace(_SIGN, QUOTED_SIGN)
    return _BEGINNING.sub(lambda match: match.group() + MARK, text)


def unescape(text: str) -> str:
    """Return the text that `escape` was given; return any other text without U+FDD0 as it is."""
    return text.replace(MARK, "").replace(QUOTED_SIGN, _SIGN) if _SIGN in text else text


def escape_deep(value: Any) -> Any:
    """Return a copy of JSON data, such as a message, with every string and key escaped, except in images and videos.

    Raises ValueError for data nested deeper than MAX_DEPTH.
    """
    return _map_strings(value, escape)


def unescape_deep(value: Any) -> Any:
    """Return the data that `escape_deep` was given. Raises ValueError as it does."""
    return _map_strings(value, unescape)


def require_shallow(depth: int) -> None:
    """Raise ValueError if `depth` is greater than MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a message or a tool is nested deeper than {MAX_DEPTH} levels: send a flatter one.")


def _map_strings(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    require_shallow(depth)
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: item
            if key in _MEDIA_KEYS
            else _map_strings(item, change, depth + 1)
            for key, item in value.items()
        }
    # An engine's validation may leave a one-shot iterator instead of a list.
    if isinstance(value, list | tuple | Iterator):
        return [_map_strings(item, change, depth + 1) for item in value]
    return value
