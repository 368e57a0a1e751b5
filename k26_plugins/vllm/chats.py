"""Corrects what vLLM's API server does to chats besides rendering and parsing them, where it serves this model.

`install` puts the hooks in place; each other public function is a hook around a function of vLLM's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import pydantic

from k26_plugins.common.adapters.answers import make_cut_calls_text, name_reasoning_twice
from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.adapters.hooks import Hook, go_without, wanted_hooks
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.prompt.chat import as_error
from k26_plugins.common.prompt.thinking import template_options
from k26_plugins.vllm import compat, logger, names
from k26_plugins.vllm.completions import hide_streamed, hide_whole


def install() -> None:
    """Put the hooks in place. A second call in a process does no harm.

    If this vLLM lacks a function that a hook is for, the log says what is lost, and vLLM serves without that hook.
    """
    requests: list[Hook] = [
        *(
            (name, settle_thinking, "`thinking` is not heard in every form")
            for name in (names.CHAT_PARAMS, names.RESPONSES_CHAT_PARAMS, names.TOKENIZE_CHAT_PARAMS)
        ),
        (
            names.MESSAGES_CALL,
            keep_characters,
            "past arguments are escaped to ASCII in the Messages API",
        ),
        (
            names.MESSAGES_RESULT,
            keep_results,
            "the model is not told that a result of the Messages API is an error, and its images are dropped",
        ),
        (compat.create_tokenize(), read_reasoning, "/tokenize leaves out `reasoning_content`"),
    ]
    answers: list[Hook] = [
        (names.CHAT_MESSAGE, name_reasoning, "an answer has its reasoning under vLLM's name alone"),
        (
            names.CHAT_ANSWER,
            length_wins,
            "an answer that the token limit cut within a call ends as if the call were whole",
        ),
        (names.COMPLETION_STREAM, hide_streamed, "markers are shown in streamed completions"),
        (names.COMPLETION, hide_whole, "markers are shown in completions"),
        (names.MESSAGES_ANSWER, show_cut_calls, "a call that the token limit cut is an error in the Messages API"),
        (
            names.RESPONSES_EVENTS,
            end_incomplete,
            "a stream of the Responses API that the token limit cut ends as completed",
        ),
    ]
    changes = Registration()
    for name, hook, lost in wanted_hooks(requests, answers):
        try:
            compat.wrap(changes, name, hook)
        except UnsupportedEngineError as error:
            go_without(error, lost, logger)
    changes.apply()


def settle_thinking(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap vLLM's `build_chat_params` so that the template, the parsers and the engine see one value of `thinking`.

    vLLM turns `reasoning_effort` into `enable_thinking`, which its parser follows, while the template follows
    `thinking`: the two can contradict each other. vLLM also drops the request's field `thinking`, which Moonshot's
    clients send.
    """
    params = original(request, *args, **kwargs)
    options = params.chat_template_kwargs
    said = (request.model_extra or {}).get("thinking")
    settled = template_options(options, thinking=said, reasoning_effort=options.get("reasoning_effort"))
    return dataclasses.replace(params, chat_template_kwargs=settled)


def name_reasoning(original: Callable[..., None], message: Any, **fields: Any) -> None:
    """Wrap vLLM's `ChatMessage.__init__` so that an answer has its reasoning as `reasoning` and as `reasoning_content`.

    vLLM sends the first name only; Moonshot's API and its clients use the second.
    """
    name_reasoning_twice(fields)
    original(message, **fields)


async def length_wins(
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    result_generator: AsyncIterator[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Wrap vLLM's `chat_completion_full_generator` so that the finish reason is `length` where the token limit cut an
    answer.

    vLLM gives `tool_calls` for a whole answer with calls in it, although it gives `length` for the same answer
    streamed.
    """
    last: list[Any] = []

    async def watched() -> AsyncIterator[Any]:
        async for result in result_generator:
            last[:] = [result]
            yield result

    response = await original(serving, request, watched(), *args, **kwargs)
    cut = {output.index for result in last for output in result.outputs if output.finish_reason == "length"}
    for choice in getattr(response, "choices", ()):
        if choice.index in cut:
            choice.finish_reason = "length"
    return response


def keep_characters(original: Callable[..., None], block: Any, tool_calls: list[dict[str, Any]]) -> None:
    """Wrap vLLM's `_convert_tool_use_block` (Messages API) so that a past call's arguments keep their characters.

    vLLM would write Chinese characters as escape sequences, which the model did not write.
    """
    original(block, tool_calls)
    tool_calls[-1]["function"]["arguments"] = json.dumps(block.input or {}, ensure_ascii=False)


def keep_results(original: Callable[..., None], block: Any, openai_messages: list[dict[str, Any]]) -> None:
    """Wrap vLLM's `_convert_user_tool_result` (Messages API) so that a result keeps its images and its `is_error`.

    vLLM would put the images into a message of the user's behind the result, even between two results. It would drop
    `is_error`, which goes into the result's text here, because a chat message has no field for it.
    """
    place = len(openai_messages)
    original(block, openai_messages)
    result, after = openai_messages[place], openai_messages[place + 1 : place + 2]
    if after and after[0]["role"] == "user":
        del openai_messages[place + 1]
        parts = [compat.message_image(part) if part.get("type") == "image" else part for part in block.content]
        result["content"] = [part for part in parts if part and part["type"] in ("text", "image_url")]
    if block.is_error:
        result["content"] = as_error(result["content"])


def show_cut_calls(original: Callable[..., Any], serving: Any, response: Any) -> Any:
    """Wrap vLLM's `messages_full_converter` (Messages API) so that a call which the token limit cut becomes text.

    vLLM would answer with an error, because the arguments of such a call are no JSON.
    """
    make_cut_calls_text(response.choices[0].message)
    return original(serving, response)


async def end_incomplete(original: Callable[..., Any], generator: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Wrap vLLM's `_convert_stream_to_sse_events` so that a stream which the token limit cut ends as incomplete.

    The last event of a stream of the Responses API is then `response.incomplete`; vLLM sends `response.completed`.
    """

    async def renamed() -> AsyncIterator[Any]:
        async for event in generator:
            yield _incomplete(event) if getattr(event, "type", None) == "response.completed" else event

    async for line in original(renamed()):
        yield line


async def read_reasoning(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None) -> Any:
    """Wrap vLLM's `create_tokenize` so that /tokenize reads the `reasoning_content` of messages.

    A chat completion takes the field, but vLLM's class of this request drops it.
    """
    messages = getattr(request, "messages", None)
    if messages and raw_request is not None:
        sent = (await raw_request.json()).get("messages") or []
        for message, fields in zip(messages, sent, strict=True):
            if fields.get("reasoning_content") is not None and message.get("reasoning") is None:
                message["reasoning"] = fields["reasoning_content"]
    return await original(serving, request, raw_request)


def _incomplete(event: Any) -> Any:
    response = event.response
    status = response.get("status") if isinstance(response, dict) else response.status
    if status != "incomplete":
        return event
    return _incomplete_event(event.__class__).model_construct(**{**dict(event), "type": "response.incomplete"})


@functools.cache
def _incomplete_event(completed: type) -> Any:
    return pydantic.create_model(
        "ResponseIncompleteEvent", __base__=completed, type=(Literal["response.incomplete"], "response.incomplete")
    )
