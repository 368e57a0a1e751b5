"""Looks up and changes what the adapter needs of SGLang's APIs for chats and of its objects for answers.

`compat` looks up the rest.
"""

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
    """Note that `around(original, …)` is to be called in the place of a function or a method of one of SGLang's APIs.

    If this release does not have the function, log what is lost. If the import of its module fails, note nothing,
    because SGLang then serves without that API. lost: what happens without the hook, as `go_without` takes it.
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
    """Have `around(original, server_args, tokenizer, …)` called where SGLang makes its compiler of grammars.

    Nothing is done in a process that has not imported the compiler's module. The scheduler's process has.
    """
    if names.GRAMMAR_BACKEND.module in sys.modules:
        ENGINE.hook(around, names.GRAMMAR_BACKEND)


def chat_part(part: Any) -> Any:
    """Return a content part of the Responses API as a content part of the chat API."""
    return private(names.RESPONSES_PART)(part)


def tool_parsing_result(normal_text: str, calls: list[Any]) -> Any:
    """Return SGLang's object for the text and the calls that a tool-call parser found."""
    return private(names.PARSE_RESULT)(normal_text=normal_text, calls=calls)


def tool_call_item(call: CallPiece) -> Any:
    """Return SGLang's object for a call, or a piece of one, that a parser found."""
    return private(names.CALL_ITEM)(tool_index=call.index, name=call.name, parameters=call.arguments)


def tool_call(item: Any, call_id: str | None) -> Any:
    """Return SGLang's object for a call, or a piece of one, as a client gets it. item: from `tool_call_item`."""
    function = private(names.FUNCTION_RESPONSE)(name=item.name, arguments=item.parameters)
    return private(names.TOOL_CALL)(id=call_id, index=item.tool_index, function=function)


def reasoning_named_twice(response: Any) -> Any:
    """Return a whole answer to a chat with its reasoning under both names, `reasoning` and `reasoning_content`.

    Any other response, such as a stream or an error, is returned as it is.
    """
    if not isinstance(response, private(names.CHAT_RESPONSE)):
        return response
    data = response.model_dump(mode="json", by_alias=True)
    for choice in data["choices"]:
        name_reasoning_twice(choice["message"])
    return importlib.import_module("fastapi.responses").JSONResponse(data)


def answer_chunks(**fields: Any) -> list[str]:
    """Return the server-sent events for one step of an answer."""
    chunks: list[str] = private(names.ANSWER_CHUNKS)(**fields)
    return chunks


def calls_or_schema(tools: list[Any], parser: str, schema: Any, parallel: bool) -> Any:
    """Return a response format that allows either calls of `tools` or an answer by a JSON schema.

    Returns None if SGLang has no grammar of calls for this parser. parser: the name of the tool-call parser. parallel:
    whether an answer may have several calls.
    """
    calls = private(names.CALL_PARSER)(tools, parser)
    constraint = calls.get_structure_constraint("required", parallel_tool_calls=parallel)
    if constraint is None or constraint[0] != "structural_tag" or not hasattr(constraint[1], "format"):
        return None
    formats = importlib.import_module("xgrammar.structural_tag")
    answer = formats.JSONSchemaFormat(json_schema=schema)
    return type(constraint[1])(format=formats.OrFormat(elements=[constraint[1].format, answer]))


def sends_increments() -> bool:
    """Return whether a chunk has only what is new, and not everything so far, which is SGLang's default."""
    return bool(private(names.GET_SERVING)().incremental_streaming_output)


def counts_output_ids() -> bool:
    """Return whether this release says which token ids a chunk brings, as 0.5.23 does."""
    return ENGINE.has_module(names.NEW_OUTPUT_IDS)


def new_text(chunk: dict[str, Any], given_out: int) -> tuple[str, int]:
    """Return the new text of a chunk, and the number of characters given out with it.

    given_out: the number of characters that earlier chunks gave out; it is not counted if chunks have only what is new.
    """
    text: str = chunk["text"]
    return (text, given_out) if sends_increments() else (text[given_out:], len(text))


def new_output_ids(chunk: dict[str, Any], consumed: int, finish_reason: str | None) -> list[int]:
    """Return the new token ids of a chunk. consumed: the number of ids that earlier chunks brought."""
    found: list[int] = private(names.NEW_OUTPUT_IDS)(
        output_ids=chunk.get("output_ids") or [],
        num_consumed_tokens=consumed,
        completion_tokens=chunk["meta_info"]["completion_tokens"],
        finish_reason_type=finish_reason,
        incremental=sends_increments(),
    )
    return found
