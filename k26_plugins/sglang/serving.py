"""Chats to prompts in SGLang, in the processes that serve this model: hooks around what its API server does to messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.hf_tokenizer import CONTINUE_KEY
from k26_plugins.common.prompt.output import MARKERS
from k26_plugins.sglang import compat
from k26_plugins.sglang.arguments import PARSER

DROPPED = ("name", "reasoning")
MAX_ANSWERS = 1024
"""Of one request (`n`): SGLang makes as many requests of it, before it looks at any."""


def install() -> None:
    """Put the hooks in place, once for each process."""
    compat.replace_tool_detector(PARSER, "k26_plugins.sglang.output", "K26ToolDetector")
    compat.hook_chat("normalize_assistant_tool_call_arguments", keep_arguments)
    compat.hook_chat("OpenAIServingChat._handle_last_assistant_message", leave_last_message)
    compat.hook_chat("OpenAIServingChat.handle_request", read_messages)
    compat.hook_chat("OpenAIServingChat._engine_prompt", send_token_ids)
    compat.hook_chat("OpenAIServingChat._process_messages", hide_reserved_tokens)
    compat.hook_responses("OpenAIServingResponses._flatten_tool_output", keep_images)


async def read_messages(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None) -> Any:
    """What the template reads of a message and SGLang's classes drop: a user's `name`, and `reasoning`, as Kimi's own API
    calls what SGLang knows as `reasoning_content`. What would end the server is refused."""
    refused = _ends_the_server(request, serving.tokenizer_manager.model_config.vocab_size)
    if refused is not None:
        return serving.create_error_response(refused)
    if raw_request is not None:
        body = await raw_request.body()
        if any(f'"{name}"'.encode() in body for name in DROPPED):
            sent = (await raw_request.json()).get("messages") or []
            request.messages = [
                compat.with_fields(
                    message, {name: fields[name] for name in DROPPED if isinstance(fields.get(name), str)}
                )
                for message, fields in zip(request.messages, sent, strict=True)
            ]
    return await original(serving, request, raw_request)


def _ends_the_server(request: Any, vocab_size: int) -> str | None:
    """Why a request must not reach SGLang's scheduler, which takes these numbers as they come."""
    if (request.top_logprobs or 0) > vocab_size:
        return f"top_logprobs is {request.top_logprobs}: the vocabulary has {vocab_size} tokens."
    if (request.n or 1) > MAX_ANSWERS:
        return f"n is {request.n}: ask for at most {MAX_ANSWERS} answers."
    return None


def keep_arguments(original: Callable[..., None], message: dict[str, Any], **kwargs: Any) -> None:
    """A past call's arguments stay the text that the model wrote; the tokenizer parses it where a template needs that."""


def keep_images(original: Callable[..., Any], output: Any) -> Any:
    """Of a function's output in the Responses API. SGLang would keep its text alone; its chat API takes the parts."""
    if isinstance(output, list) and any(
        isinstance(part, dict) and part.get("type") == "input_image" for part in output
    ):
        return [compat.chat_part(part) for part in output]
    return original(output)


def leave_last_message(
    original: Callable[..., Any], serving: Any, messages: list[dict[str, Any]], request: Any
) -> tuple[list[dict[str, Any]], None]:
    """The template renders an assistant's last message, as everywhere else.

    SGLang would make a user's message of it, or put its text behind a new generation prompt.
    """
    if request.continue_final_message and messages and messages[-1].get("role") == "assistant":
        messages = [*messages[:-1], {**messages[-1], CONTINUE_KEY: True}]
    return messages, None


def send_token_ids(
    original: Callable[..., tuple[str, Any]], serving: Any, processed: Any, is_multimodal: bool
) -> tuple[str, Any]:
    """The prompt's token ids. SGLang would decode them and have the text tokenised again: text that spells a control
    token would become one."""
    if isinstance(processed.prompt_ids, list) and processed.prompt_ids:
        return "input_ids", processed.prompt_ids
    return original(serving, processed, is_multimodal)


def hide_reserved_tokens(original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """In an answer, as the client asks. SGLang shows every special token where there are tools, so that its parser sees the
    markers; our tokenizer counts those among the ordinary tokens."""
    asked = request.skip_special_tokens
    processed = original(serving, request, *args, **kwargs)
    if set(serving.tokenizer_manager.tokenizer.all_special_tokens).isdisjoint(MARKERS):
        request.skip_special_tokens = processed.skip_special_tokens = asked
    return processed
