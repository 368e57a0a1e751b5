"""Text that spells a control token, kept text on its way through a rendered prompt.

A chat prompt is one string in which the template's control tokens and the messages' own text lie side by side, and every
engine hands that string to a tokenizer. What a message says is therefore marked before it is rendered: a character that no
text holds (a Unicode noncharacter) goes into the middle of whatever might spell a control token, so that no tokenizer finds
one there. The core's tokenizers take the marks out again after they have found the control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# U+FDD0 with what follows it is removed or restored; Unicode keeps these code points free for such inner use.
_SIGN = "\ufdd0"
MARK = _SIGN + "\ufdd1"
QUOTED_SIGN = _SIGN + "\ufdd2"
# Every way in which a control token can begin, also where its rest is in the next part of the content.
_BEGINNING = re.compile(r"<(?=[|]|/?th|/?t?$)|\[(?=[BEUP]|$)")
MAX_DEPTH = 100
"""Levels of lists and objects in a message or a tool. Behind them Python's own limit ends a request as a server's error."""
_MEDIA_KEYS = ("image_url", "video_url", "image", "video", "input_audio")


def escape(text: str) -> str:
    """`text` with marks, to be put into a prompt that the core's tokenizers read."""
    if _SIGN in text:
        text = text.replace(_SIGN, QUOTED_SIGN)
    return _BEGINNING.sub(lambda match: match.group() + MARK, text)


def unescape(text: str) -> str:
    """What `escape` was given. Any other text without U+FDD0 is returned as it is."""
    return text.replace(MARK, "").replace(QUOTED_SIGN, _SIGN) if _SIGN in text else text


def escape_deep(value: Any) -> Any:
    """A copy of JSON data, such as a message, with every string and every key escaped; images and videos are left alone.

    Raises ValueError for data nested deeper than MAX_DEPTH.
    """
    return _map_strings(value, escape)


def unescape_deep(value: Any) -> Any:
    """What `escape_deep` was given."""
    return _map_strings(value, unescape)


def require_shallow(depth: int) -> None:
    """Raise ValueError where `depth` is beyond MAX_DEPTH."""
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
    # An engine's validation may leave a one-way iterator in the place of a list.
    if isinstance(value, list | tuple | Iterator):
        return [_map_strings(item, change, depth + 1) for item in value]
    return value
