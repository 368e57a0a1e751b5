"""Messages to a prompt: the checkpoint's chat template, and the places of images in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = "chat_template.jinja"


def _to_json(value: object, separators: tuple[str, str] | None = None) -> str:
    # Unlike jinja2's own filter this escapes no HTML, as transformers' does not.
    return json.dumps(value, ensure_ascii=False, separators=separators)


def own_template() -> str:
    """The template that this package ships, written after the specification; the checkpoint's is preferred."""
    return resources.files(__package__).joinpath(TEMPLATE_FILE).read_text(encoding="utf-8")


def render(
    messages: Sequence[Mapping[str, Any]],
    folder: str | Path | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of OpenAI-style `messages`, with control tokens by name.

    folder: the checkpoint, whose `chat_template.jinja` is used where it has one. The template runs in jinja2's sandbox.
    Tools are declared as compact JSON.
    """
    file = None if folder is None else Path(folder) / TEMPLATE_FILE
    source = file.read_text(encoding="utf-8") if file is not None and file.exists() else own_template()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    return environment.from_string(source).render(
        messages=messages,
        tools=tools,
        thinking=thinking,
        preserve_thinking=preserve_thinking,
        add_generation_prompt=add_generation_prompt,
    )


def expand_media_placeholders(
    token_ids: Sequence[int], tokens_per_medium: Sequence[int], placeholder_id: int
) -> list[int]:
    """Repeat each placeholder token to its medium's number of tokens, in order. Raises ValueError on another count."""
    found = sum(token_id == placeholder_id for token_id in token_ids)
    if found != len(tokens_per_medium):
        raise ValueError(f"the prompt has {found} places for media and {len(tokens_per_medium)} media were given.")
    counts = iter(tokens_per_medium)
    expanded: list[int] = []
    for token_id in token_ids:
        expanded.extend([token_id] * (next(counts) if token_id == placeholder_id else 1))
    return expanded
