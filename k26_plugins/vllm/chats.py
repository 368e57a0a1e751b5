"""What vLLM's API server does to chats beside rendering and parsing them, mended in the processes that serve this model."""

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
    """Put the hooks in place, once for each process. A vLLM without the place of one serves without it, and says so."""
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
    """One value of `thinking` for the template, the parsers and the engine, from all that the request says of it.

    vLLM turns an effort of reasoning into `enable_thinking`, which its parser heard beside a `thinking` that the template
    heard, and drops a field `thinking`, by which Moonshot's clients say it.
    """
    params = original(request, *args, **kwargs)
    options = params.chat_template_kwargs
    said = (request.model_extra or {}).get("thinking")
    settled = template_options(options, thinking=said, reasoning_effort=options.get("reasoning_effort"))
    return dataclasses.replace(params, chat_template_kwargs=settled)


def name_reasoning(original: Callable[..., None], message: Any, **fields: Any) -> None:
    """Give a message's reasoning the name that vLLM has for it, and the one that Moonshot's API and its clients have."""
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
    """An answer that the token limit cut says so, with calls in it too, as it does where it is streamed."""
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
    """Arguments of a past call as the model wrote them: vLLM would spell Chinese by numbers."""
    original(block, tool_calls)
    tool_calls[-1]["function"]["arguments"] = json.dumps(block.input or {}, ensure_ascii=False)


def keep_results(original: Callable[..., None], block: Any, openai_messages: list[dict[str, Any]]) -> None:
    """A result with its images where they stand: vLLM would say that the user sent them, between two results too. And with
    `is_error` in its text: a chat's message has no place for it."""
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
    """A cut call's arguments are text: vLLM would refuse the whole answer."""
    make_cut_calls_text(response.choices[0].message)
    return original(serving, response)


async def end_incomplete(original: Callable[..., Any], generator: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The last event of an answer that the token limit cut, by its name."""

    async def renamed() -> AsyncIterator[Any]:
        async for event in generator:
            yield _incomplete(event) if getattr(event, "type", None) == "response.completed" else event

    async for line in original(renamed()):
        yield line


async def read_reasoning(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None) -> Any:
    """`reasoning_content`, which a chat takes and vLLM's class of this request drops."""
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
