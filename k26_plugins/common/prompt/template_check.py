"""Find the conversations that a checkpoint's chat template renders differently from the template that this package ships.

The checkpoint's template is the one that is used. A difference means that the shipped template, which is used where a
folder has none, is not that model's, or that somebody changed the folder's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from k26_plugins.common.prompt.chat import TEMPLATE_FILE, render

_CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
_USER: dict[str, Any] = {"role": "user", "content": "Hi"}
_MEDIA = [{"type": "image_url"}, {"type": "video_url"}, {"type": "text", "text": "What?"}]
_STEPS: list[dict[str, Any]] = [
    {"role": "system", "content": "S", "name": "rules"},
    _USER,
    {"role": "assistant", "content": "one", "reasoning": "R1"},
    _USER,
    {"role": "assistant", "content": "", "reasoning_content": "R2", "tool_calls": [_CALL, _CALL]},
    {"role": "tool", "tool_call_id": "functions.f:0", "content": "42"},
]
# A conversation, and the template's options, for each rule of docs/model.md, 5.2.
SAMPLES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a message": ([_USER], {}),
    "instant mode": ([_USER], {"thinking": False}),
    "tools": ([_USER], {"tools": [_TOOL]}),
    "images and videos": ([{"role": "user", "content": _MEDIA}], {}),
    "thinking and tool calls": (_STEPS, {}),
    "instant mode and tool calls": (_STEPS, {"thinking": False}),
    "preserved thinking": (_STEPS, {"preserve_thinking": True}),
    "no answer asked for": (_STEPS, {"add_generation_prompt": False}),
}


def differing_samples(folder: str | Path) -> list[str]:
    """Return the names of the samples that the folder's template renders differently; none if it has no template."""
    if not (Path(folder) / TEMPLATE_FILE).exists():
        return []
    return [name for name, (messages, options) in SAMPLES.items() if _differs(folder, messages, options)]


def _differs(folder: str | Path, messages: list[dict[str, Any]], options: dict[str, Any]) -> bool:
    try:
        return render(messages, folder, **options) != render(messages, **options)
    except TemplateError:
        return True
