"""Render messages to a prompt by the checkpoint's chat template.

The module also prepares the template's input, and expands the placeholders of media among the prompt's token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from k26_plugins.common.prompt.control_tokens import escape, escape_deep
from k26_plugins.common.prompt.tool_declaration import declare_tools, sorted_deep
from k26_plugins.common.prompt.tool_ids import with_kimis_ids

TEMPLATE_FILE = "chat_template.jinja"
# Marks the end of a message that is to be continued: a noncharacter, which no text contains and which `control_tokens`
# does not use.
_OPEN_END = "\ufdd3"
MEDIA_PARTS = ("image", "image_url", "video", "video_url")
"""Types of content parts that the template replaces by a medium's placeholder."""


class VerbatimArguments(dict[str, Any]):
    """A past tool call's parsed arguments, with the text that they were parsed from.

    Engines parse the text before they render it, and rendering the parsed arguments would give other white space than
    the model wrote.
    """

    def __init__(self, text: str) -> None:
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None
        super().__init__(parsed if isinstance(parsed, dict) else {})
        self.text = text or "{}"

    def __bool__(self) -> bool:
        """Return True: vLLM replaces empty arguments, and arguments that are not valid JSON are empty here too."""
        return True

    def __reduce__(self) -> tuple[type[VerbatimArguments], tuple[str]]:
        return VerbatimArguments, (self.text,)


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """The variables with which the chat template is rendered."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    tools_ts_str: str | None
    """The tools' declaration in TypeScript; None if the template is to write them as JSON, or if there are no tools."""


def own_template() -> str:
    """Return the chat template that this package ships, written after docs/model.md, 5.2.

    A checkpoint's own template is preferred.
    """
    return resources.files(__package__).joinpath(TEMPLATE_FILE).read_text(encoding="utf-8")


def keep_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of OpenAI-style messages in which an engine's parsing does not change the arguments of tool calls.

    The arguments become VerbatimArguments.
    """
    return [_map_arguments(message, _keep) for message in messages]


def prepare(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    escape_messages: bool = True,
    escape_tools: bool = True,
    parsed_arguments: bool = False,
    kimis_ids: bool = True,
) -> TemplateInput:
    """Convert messages and tools to the chat template's input.

    escape_messages, escape_tools: text that spells a control token stays text. parsed_arguments: past calls' arguments
    are objects, as a user's own template expects, instead of the text that the model wrote, as Kimi's template expects.
    kimis_ids: past tool calls get ids of the form that the model writes. Raises ValueError for a content part that is
    neither text, image nor video.
    """
    written = [
        _with_known_parts(_map_arguments(message, _keep if parsed_arguments else _verbatim)) for message in messages
    ]
    if kimis_ids:
        written = with_kimis_ids(written)
    if not tools:
        return TemplateInput(escape_deep(written) if escape_messages else written, None, None)
    ordered = sorted_deep([_as_sent(tool) for tool in tools])
    declaration = declare_tools(ordered)
    return TemplateInput(
        escape_deep(written) if escape_messages else written,
        escape_deep(ordered) if escape_tools else ordered,
        escape(declaration) if declaration and escape_tools else declaration,
    )


def render(
    messages: Sequence[Mapping[str, Any]],
    folder: str | Path | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    control_tokens_as_text: bool = True,
) -> str:
    """Render OpenAI-style `messages` to a prompt with control tokens by name, for `KimiTokenizer.encode_prompt`.

    folder: the checkpoint, whose `chat_template.jinja` is used if it has one. The template runs in jinja2's sandbox.
    continue_final_message: leave the last message open and start no new one. Raises ValueError if that message has no
    text, and jinja2.TemplateError if the template raises it.

    Examples:
        >>> render([{"role": "user", "content": "1 + 1 = ?"}])
        '<|im_user|>user<|im_middle|>1 + 1 = ?<|im_end|><|im_assistant|>assistant<|im_middle|><think>'
        >>> render([{"role": "user", "content": "1 + 1 = ?"}], thinking=False).endswith("<think></think>")
        True
    """
    file = None if folder is None else Path(folder) / TEMPLATE_FILE
    source = file.read_text(encoding="utf-8") if file is not None and file.exists() else own_template()
    given = prepare(messages, tools, escape_messages=control_tokens_as_text, escape_tools=control_tokens_as_text)
    if continue_final_message:
        _open(given.messages)
    text = _compiled(source).render(
        messages=given.messages,
        tools=given.tools,
        tools_ts_str=given.tools_ts_str,
        thinking=thinking,
        preserve_thinking=preserve_thinking,
        add_generation_prompt=add_generation_prompt and not continue_final_message,
    )
    return text[: text.rindex(_OPEN_END)] if continue_final_message else text


def as_error(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return the content of a tool result that reports an error, with the word "Error" at the beginning of its text.

    A chat message has no field for errors, so only the text can tell the model. Text that begins with "error" or
    `<tool_use_error>` is left as it is. content: text or content parts.
    """
    if isinstance(content, str):
        return content if content.lower().startswith(("error", "<tool_use_error>")) else f"Error: {content}"
    first = next((place for place, part in enumerate(content) if part["type"] == "text"), None)
    if first is None:
        return [{"type": "text", "text": "Error:"}, *content]
    told = {**content[first], "text": as_error(content[first]["text"])}
    return [*content[:first], told, *content[first + 1 :]]


def expand_media_placeholders(
    token_ids: Sequence[int], tokens_per_medium: Sequence[int], placeholder_id: int
) -> list[int]:
    """Repeat each placeholder token as often as its medium has tokens.

    Raises ValueError if there are not as many placeholders as media.

    Examples:
        >>> expand_media_placeholders([11, 163605, 12], tokens_per_medium=[3], placeholder_id=163605)
        [11, 163605, 163605, 163605, 12]
    """
    found = sum(token_id == placeholder_id for token_id in token_ids)
    if found != len(tokens_per_medium):
        raise ValueError(f"the prompt has {found} places for media and {len(tokens_per_medium)} media were given.")
    counts = iter(tokens_per_medium)
    expanded: list[int] = []
    for token_id in token_ids:
        expanded.extend([token_id] * (next(counts) if token_id == placeholder_id else 1))
    return expanded


@lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    """Compile a template in an environment like the one of transformers.

    Published templates leave loops by `break`, and call `raise_exception`.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    # Like transformers' filter, and unlike jinja2's own, this one does not escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _open(messages: list[dict[str, Any]]) -> None:
    """Append the sign of an open end to the last message's text, in place."""
    last = messages[-1] if messages else {}
    if isinstance(last.get("content"), str):
        last["content"] += _OPEN_END
        return
    for part in reversed(last.get("content") or []):
        if "text" in part:
            part["text"] += _OPEN_END
            return
    raise ValueError("the last message has no text to continue.")


def _with_known_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Move thinking parts of a past answer to `reasoning`, where the template reads it.

    Raises ValueError for any other unknown part.
    """
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    thoughts: list[str] = []
    kept = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "thinking":
            thoughts.append(str(part.get("thinking") or ""))
            continue
        if kind not in MEDIA_PARTS and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            raise ValueError(
                f"a message has a content part of type {kind!r}: send text, an image (image_url) or a video (video_url)."
            )
        kept.append(part)
    if not thoughts:
        return message
    said = message.get("reasoning") or message.get("reasoning_content")
    return {**message, "content": kept, "reasoning": said or "".join(thoughts)}


def _as_sent(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool without the defaults that engines fill in: `strict: false`, and null for other fields."""
    sent: dict[str, Any] = _without_defaults({name: _without_defaults(value) for name, value in tool.items()})
    return sent


def _without_defaults(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: item for name, item in value.items() if item is not None and item is not False}


def _map_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    # The engine refuses calls of any other shape.
    if not isinstance(calls, list | tuple | Iterator):
        return dict(message)
    changed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            call = {**call, "function": {**function, "arguments": change(function.get("arguments"))}}
        changed.append(call)
    return {**message, "tool_calls": changed}


def _keep(arguments: Any) -> Any:
    return VerbatimArguments(arguments) if isinstance(arguments, str) else arguments


def _verbatim(arguments: Any) -> Any:
    if isinstance(arguments, VerbatimArguments):
        return arguments.text
    return arguments or "{}"
