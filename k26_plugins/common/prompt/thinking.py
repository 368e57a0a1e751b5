"""Decide whether the model is to think.

Clients say it in many ways; the prompt and the answer's parser use the one value that this module returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k26_plugins.common.prompt.output import THINK_BEGIN, THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

_OFF = ("", "false", "off", "no", "none", "disabled", "0")


def template_options(
    options: Mapping[str, Any] | None, *, thinking: Any = None, reasoning_effort: str | None = None
) -> dict[str, Any]:
    """Return the chat template's options with `thinking` as a bool, or without it if the request does not mention it.

    options: the request's `chat_template_kwargs`, where `enable_thinking` is another name for `thinking`. thinking: the
    request's own field, as in Moonshot's API: `{"type": "disabled"}` or `{"type": "enabled", "keep": "all"}`; the
    latter also sets `preserve_thinking`. The first value that is given, in this order, counts: `thinking` in the
    options, `thinking` in the request, `enable_thinking`, a reasoning effort of `none`.

    Examples:
        >>> template_options(None, thinking={"type": "disabled"})
        {'thinking': False}
        >>> template_options({"enable_thinking": True}, reasoning_effort="none")
        {'thinking': True}
        >>> template_options(None)
        {}
    """
    given = dict(options or {})
    said = [given.pop("thinking", None), thinking, given.pop("enable_thinking", None)]
    for value in said:
        if isinstance(value, Mapping) and value.get("keep") == "all":
            given.setdefault("preserve_thinking", True)
    first = next((value for value in said if value is not None), None)
    if first is not None:
        given["thinking"] = _is_on(first)
    elif reasoning_effort == "none":
        given["thinking"] = False
    return given


def begins_in_reasoning(tokenizer: KimiTokenizer, prompt_token_ids: Sequence[int]) -> bool:
    """Return whether a prompt leaves the think block open, so that the answer begins with reasoning."""
    begin, end = tokenizer.special[THINK_BEGIN], tokenizer.special[THINK_END]
    closed = {end, tokenizer.special["<|im_middle|>"], tokenizer.special["<|im_end|>"]}
    for token_id in reversed(prompt_token_ids):
        if token_id == begin or token_id in closed:
            return token_id == begin
    return False


def _is_on(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.get("type", True)
    return value.strip().lower() not in _OFF if isinstance(value, str) else bool(value)
