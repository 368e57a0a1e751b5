"""Corrects what SGLang's API server does to chats, where it serves this model, by hooks around SGLang's functions.

`REQUESTS` and `ANSWERS` say which hook goes around which function, and `install` puts them in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.answers import markers_are_ordinary
from k26_plugins.common.adapters.hooks import Hook, wanted_hooks
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.prompt.hf_tokenizer import CONTINUE_KEY
from k26_plugins.common.prompt.thinking import template_options
from k26_plugins.common.settings import ENGINE, PARSERS
from k26_plugins.sglang import compat, compat_chats, names
from k26_plugins.sglang.answers import K26Answers
from k26_plugins.sglang.arguments import PARSER
from k26_plugins.sglang.completions import hide_markers
from k26_plugins.sglang.messages import keep_history, show_cut_calls

DROPPED = ("name", "reasoning")
MAX_ANSWERS = 1024
"""The largest number of answers to one request (`n`). SGLang makes that many requests of one before it looks at any."""


def install() -> None:
    """Put the hooks in place. A second call in a process does no harm.

    If this SGLang lacks a function that a hook is for, the log says what is lost, and SGLang serves without that hook.
    """
    changes = Registration()
    if PARSERS.read() != ENGINE:
        compat.replace_tool_detector(changes, PARSER, "k26_plugins.sglang.output", "K26ToolDetector")
    for name, around, lost in wanted_hooks(REQUESTS, ANSWERS):
        compat_chats.hook(changes, name, around, lost)
    changes.apply()


async def read_messages(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None) -> Any:
    """Wrap SGLang's `handle_request` for chats so that fields which SGLang drops are read, and fatal numbers refused.

    SGLang's classes of requests drop a user's `name`, `reasoning` (vLLM's name of what SGLang calls
    `reasoning_content`) and `thinking`. A number that would end the server is answered with an error. An answer that is
    not streamed gets its reasoning under both names.
    """
    refused = _ends_the_server(request, serving.tokenizer_manager.model_config.vocab_size)
    if refused is not None:
        return serving.create_error_response(refused)
    if hasattr(raw_request, "body"):  # SGLang itself passes None, and its gRPC server an object that is no HTTP request
        body = await raw_request.body()
        if any(f'"{name}"'.encode() in body for name in (*DROPPED, "thinking", "enable_thinking")):
            # `raw_request.json()` would return what SGLang's classes have already changed.
            sent = json.loads(body)
            request.messages = [
                compat.with_fields(
                    message, {name: fields[name] for name in DROPPED if isinstance(fields.get(name), str)}
                )
                for message, fields in zip(request.messages, sent.get("messages") or [], strict=True)
            ]
            hear_thinking(request, sent)
    return compat_chats.reasoning_named_twice(await original(serving, request, raw_request))


async def read_thinking(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None) -> Any:
    """Wrap SGLang's `create_responses` so that `thinking` counts in the Responses API; SGLang would drop it."""
    if hasattr(raw_request, "body"):
        hear_thinking(request, json.loads(await raw_request.body()))
    return await original(serving, request, raw_request)


def hear_thinking(request: Any, sent: dict[str, Any]) -> None:
    """Write what a request says about thinking, in any form, as one `thinking` into its chat template's options.

    SGLang's own reading of `reasoning_effort` counts only if the request says nothing about thinking itself. sent: the
    request's JSON as the client sent it.
    """
    options = sent.get("chat_template_kwargs")
    settled = template_options(options if isinstance(options, dict) else None, thinking=sent.get("thinking"))
    if "thinking" in settled:
        request.chat_template_kwargs = settled


def _ends_the_server(request: Any, vocab_size: int) -> str | None:
    """Return why a request must not reach SGLang's scheduler, which does not check these numbers, or None if it may."""
    if (request.top_logprobs or 0) > vocab_size:
        return f"top_logprobs is {request.top_logprobs}: the vocabulary has {vocab_size} tokens."
    if (request.n or 1) > MAX_ANSWERS:
        return f"n is {request.n}: ask for at most {MAX_ANSWERS} answers."
    return None


def keep_arguments(original: Callable[..., None], message: dict[str, Any], **kwargs: Any) -> None:
    """Do nothing in the place of SGLang's `normalize_assistant_tool_call_arguments`, so that past arguments stay text.

    SGLang would parse the text, and the template would write it anew. The core's tokenizer parses it for a template
    that needs that.
    """


def keep_images(original: Callable[..., Any], output: Any) -> Any:
    """Wrap SGLang's `_flatten_tool_output` (Responses API) so that a function's output keeps its images.

    SGLang would keep the text alone, although its chat API takes parts.
    """
    if isinstance(output, list) and any(
        isinstance(part, dict) and part.get("type") == "input_image" for part in output
    ):
        return [compat_chats.chat_part(part) for part in output]
    return original(output)


def join_turns(original: Callable[..., Any], messages: list[Any]) -> Any:
    """Wrap SGLang's `_merge_consecutive_assistant_messages` (Responses API) so that a past answer becomes one message.

    SGLang keeps the reasoning, the text and the calls of an answer apart if the text names its phase, which this
    model's template does not read. The template would then take the reasoning for that of an answer without calls, and
    drop it.
    """
    return original(
        [
            {name: value for name, value in message.items() if name != "phase"}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    )


def leave_last_message(
    original: Callable[..., Any], serving: Any, messages: list[dict[str, Any]], request: Any
) -> tuple[list[dict[str, Any]], None]:
    """Replace SGLang's `_handle_last_assistant_message` so that the template renders a last message of the assistant's.

    SGLang would turn it into a user's message or, with `continue_final_message`, put its text behind a new generation
    prompt. Returns the messages, and None for the text that SGLang would put there.
    """
    if request.continue_final_message and messages and messages[-1].get("role") == "assistant":
        messages = [*messages[:-1], {**messages[-1], CONTINUE_KEY: True}]
    return messages, None


def send_token_ids(
    original: Callable[..., tuple[str, Any]], serving: Any, processed: Any, is_multimodal: bool
) -> tuple[str, Any]:
    """Wrap SGLang's `_engine_prompt` so that a prompt with images is sent on as token ids.

    SGLang would decode the ids and have the text tokenized again: text that spells a control token would become one.
    """
    if isinstance(processed.prompt_ids, list) and processed.prompt_ids:
        return "input_ids", processed.prompt_ids
    return original(serving, processed, is_multimodal)


def settle(original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap SGLang's `_process_messages` to correct what SGLang decides anew after it has rendered a chat.

    Special tokens are shown as the client asks. SGLang would show all of them if the request has tools, so that its
    parser sees the markers; the core's tokenizer counts the markers among the ordinary tokens. `thinking` becomes the
    bool with which the template was rendered. Calls are allowed beside a JSON schema for the answer (`allow_calls`).
    """
    asked = request.skip_special_tokens
    processed = original(serving, request, *args, **kwargs)
    if markers_are_ordinary(serving.tokenizer_manager.tokenizer):
        request.skip_special_tokens = processed.skip_special_tokens = asked
    request.chat_template_kwargs = template_options(request.chat_template_kwargs)
    allow_calls(serving, request, processed)
    return processed


def allow_calls(serving: Any, request: Any, processed: Any) -> None:
    """Make the grammar of a request that has tools and a JSON schema for its answer allow calls as well, in place.

    SGLang's own grammar allows the schema alone.
    """
    schema = _schema(request.response_format)
    if schema is None or request.tool_choice != "auto" or not _reads_ids(serving):
        return
    tools = serving._effective_tools(request)
    either = tools and compat_chats.calls_or_schema(tools, PARSER, schema, request.parallel_tool_calls)
    if either:
        request.response_format, processed.tool_call_constraint = either, None


def _schema(response_format: Any) -> Any:
    kind = getattr(response_format, "type", None)
    if kind == "json_object":
        return {"type": "object"}
    return response_format.json_schema.schema_ if kind == "json_schema" else None


def read_token_ids(original: Callable[..., Any], serving: Any) -> Any:
    """Wrap SGLang's `_encoding_output` so that answers are parsed by token ids, if both parsers are this model's.

    SGLang would parse the text, in which a marker that the model quotes looks like a marker.
    """
    return K26Answers(serving) if _reads_ids(serving) else original(serving)


def keep_reasoning_apart(original: Callable[..., bool], serving: Any) -> bool:
    """Wrap SGLang's `supports_native_reasoning_history` so that past reasoning is a field that the template renders.

    SGLang would put the reasoning of the Messages API into the content, between tags that would be plain text there.
    """
    return serving.template_manager.chat_template_name is None or original(serving)


def _reads_ids(serving: Any) -> bool:
    tokenizer = serving.tokenizer_manager.tokenizer
    parsers = {serving.reasoning_parser, serving.tool_call_parser}
    return (
        hasattr(serving, "_encoding_output") and parsers == {PARSER} and getattr(tokenizer, "plain", None) is not None
    )


REQUESTS: list[Hook] = [
    (
        names.ASSISTANT_ARGUMENTS,
        keep_arguments,
        "past arguments are written anew, not as they were sent",
    ),
    (
        names.LAST_MESSAGE,
        leave_last_message,
        "an answer that is to go on begins as a new one",
    ),
    (
        names.HANDLE_CHAT,
        read_messages,
        "`name`, `reasoning` and `thinking` are not heard",
    ),
    (
        names.ENGINE_PROMPT,
        send_token_ids,
        "a prompt with images is tokenized twice, and text that spells a control token becomes one",
    ),
    (
        names.PROCESS_MESSAGES,
        settle,
        "special tokens are shown wherever a request has tools",
    ),
    (
        names.REASONING_HISTORY,
        keep_reasoning_apart,
        "past reasoning comes in one piece with the text in Responses and Messages",
    ),
    (
        names.RESPONSES_RESULT,
        keep_images,
        "images in results are dropped in Responses",
    ),
    (
        names.RESPONSES_TURNS,
        join_turns,
        "the parts of a past turn are apart in Responses",
    ),
    (
        names.CREATE_RESPONSES,
        read_thinking,
        "`thinking` is not heard in Responses",
    ),
    (
        names.MESSAGES_REQUEST,
        keep_history,
        "results are not said to be errors, and past arguments are escaped to ASCII in Messages",
    ),
]
ANSWERS: list[Hook] = [
    (
        names.ENCODING_OUTPUT,
        read_token_ids,
        "a marker that an answer quotes counts as a marker",
    ),
    (names.COMPLETIONS, hide_markers, "markers are shown in completions"),
    (names.OLLAMA, hide_markers, "markers are shown in answers to Ollama's clients"),
    (
        names.MESSAGES_ANSWER,
        show_cut_calls,
        "a call that was cut ends as a whole one in Messages",
    ),
]
