"""What this adapter looks up and changes in SGLang's APIs for chats, and what answers are made of, beside `compat`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.answers import CallPiece, name_reasoning_twice
from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.hooks import go_without
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.sglang import logger, names
from k26_plugins.sglang.compat import ENGINE, private, sglang_version, wrap


def hook(changes: Registration, name: EngineName, around: Callable[..., Any], lost: str) -> None:
    """Put `around(original, …)` around a function or a method of one of SGLang's APIs.

    lost: what is said to be so in an SGLang that does not have it. SGLang serves without an API whose import fails.
    """
    try:
        importlib.import_module(name.module)
    except ImportError:
        return
    if ENGINE.has(name):
        wrap(changes, name, around)
    else:
        go_without(UnsupportedEngineError(f"SGLang {sglang_version()} has no {name}."), lost, logger)


def hook_grammars(around: Callable[..., Any]) -> None:
    """Put `around(original, server_args, tokenizer, …)` around what makes the compiler of grammars, in a process that has it
    imported: the scheduler's, where they are compiled."""
    if names.GRAMMAR_BACKEND.module in sys.modules:
        ENGINE.hook(around, names.GRAMMAR_BACKEND)


def chat_part(part: Any) -> Any:
    """A part of the Responses API's as the chat API has it."""
    return private(names.RESPONSES_PART)(part)


def tool_parsing_result(normal_text: str, calls: list[Any]) -> Any:
    return private(names.PARSE_RESULT)(normal_text=normal_text, calls=calls)


def tool_call_item(call: CallPiece) -> Any:
    return private(names.CALL_ITEM)(tool_index=call.index, name=call.name, parameters=call.arguments)


def tool_call(item: Any, call_id: str | None) -> Any:
    """A call, or a piece of one, as a client gets it."""
    function = private(names.FUNCTION_RESPONSE)(name=item.name, arguments=item.parameters)
    return private(names.TOOL_CALL)(id=call_id, index=item.tool_index, function=function)


def reasoning_named_twice(response: Any) -> Any:
    """A whole answer to a chat, with its reasoning as vLLM calls it beside the name of Moonshot's API and SGLang's."""
    if not isinstance(response, private(names.CHAT_RESPONSE)):
        return response
    data = response.model_dump(mode="json", by_alias=True)
    for choice in data["choices"]:
        name_reasoning_twice(choice["message"])
    return importlib.import_module("fastapi.responses").JSONResponse(data)


def answer_chunks(**fields: Any) -> list[str]:
    """Server-sent events of one step of an answer."""
    chunks: list[str] = private(names.ANSWER_CHUNKS)(**fields)
    return chunks


def calls_or_schema(tools: list[Any], parser: str, schema: Any, parallel: bool) -> Any:
    """A response format that allows calls of `tools`, as `parser` reads them, or an answer by a JSON schema; None where
    SGLang has no grammar of calls for it."""
    calls = private(names.CALL_PARSER)(tools, parser)
    constraint = calls.get_structure_constraint("required", parallel_tool_calls=parallel)
    if constraint is None or constraint[0] != "structural_tag" or not hasattr(constraint[1], "format"):
        return None
    formats = importlib.import_module("xgrammar.structural_tag")
    answer = formats.JSONSchemaFormat(json_schema=schema)
    return type(constraint[1])(format=formats.OrFormat(elements=[constraint[1].format, answer]))


def sends_increments() -> bool:
    """Whether a chunk has what is new, or everything so far (SGLang's default)."""
    return bool(private(names.GET_SERVING)().incremental_streaming_output)


def counts_output_ids() -> bool:
    """Whether this SGLang says which token ids a chunk brings: 0.5.23 does."""
    return ENGINE.has_module(names.NEW_OUTPUT_IDS)


def new_text(chunk: dict[str, Any], given_out: int) -> tuple[str, int]:
    """The text of a chunk behind the `given_out` characters of earlier ones, and how many there are now."""
    text: str = chunk["text"]
    return (text, given_out) if sends_increments() else (text[given_out:], len(text))


def new_output_ids(chunk: dict[str, Any], consumed: int, finish_reason: str | None) -> list[int]:
    """The token ids of a chunk behind the `consumed` that earlier ones brought."""
    found: list[int] = private(names.NEW_OUTPUT_IDS)(
        output_ids=chunk.get("output_ids") or [],
        num_consumed_tokens=consumed,
        completion_tokens=chunk["meta_info"]["completion_tokens"],
        finish_reason_type=finish_reason,
        incremental=sends_increments(),
    )
    return found
