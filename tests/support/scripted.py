"""Holds scripted answers, which a logits processor in the engine writes, and reads how a server reports them.

A real server's parsers, streaming and detokenization thereby see exactly the model output that a test is about. The
logits processors are in `support.vllm_scripted` and `support.sglang_scripted`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from support.server import Server

from k26_plugins.common.prompt.control_tokens import escape
from k26_plugins.common.prompt.output import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
)


@dataclass(frozen=True)
class Case:
    """An answer as the model writes it, and what the API must make of it."""

    answer: str
    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    """The name and the arguments of each tool call."""


def call(call_id: str, arguments: str) -> str:
    """Return a tool call as the model writes it."""
    return f"{CALL_BEGIN}{call_id}{CALL_ARGUMENTS}{arguments}{CALL_END}"


def _tool(name: str, *properties: str, required: tuple[str, ...] = ()) -> dict[str, object]:
    schemas = {one: {"type": "string"} for one in properties}
    parameters = {"type": "object", "properties": schemas, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    *(_tool(name, "city") for name in ("get_weather", "search.web-v2", "now")),
    _tool("srv:read", "path", required=("path",)),
]
WEATHER = '{"city":"Bern"}'
PATH = '{"path":"/"}'
LONG = '{"city":"' + 'x } \\" <| ' * 6 + '"}'
CASES = {
    "content": Case("why</think>hello", "why", "hello", []),
    "call": Case(
        f"why</think>ok{SECTION_BEGIN}{call('functions.get_weather:0', WEATHER)}{SECTION_END}",
        "why", "ok", [("get_weather", WEATHER)],
    ),
    "no-end-of-thinking": Case(
        f"why{SECTION_BEGIN}{call('functions.get_weather:0', WEATHER)}{SECTION_END}", "why", "", [("get_weather", WEATHER)]
    ),
    "dots-and-hyphens": Case(
        f"a</think>{SECTION_BEGIN}{call('functions.search.web-v2:0', WEATHER)}{SECTION_END}",
        "a", "", [("search.web-v2", WEATHER)],
    ),
    "empty-arguments": Case(f"a</think>{SECTION_BEGIN}{call('functions.now:0', '')}{SECTION_END}", "a", "", [("now", "{}")]),
    "two": Case(
        f"a</think>{SECTION_BEGIN}{call('functions.now:0', '{}')}{call('functions.get_weather:1', WEATHER)}{SECTION_END}",
        "a", "", [("now", "{}"), ("get_weather", WEATHER)],
    ),
    "long-arguments": Case(
        f"a</think>{SECTION_BEGIN}{call('functions.get_weather:0', LONG)}{SECTION_END}", "a", "", [("get_weather", LONG)]
    ),
    "cut-arguments": Case(
        f'a</think>{SECTION_BEGIN}{CALL_BEGIN}functions.get_weather:0{CALL_ARGUMENTS}{{"city":"Be',
        "a", "", [("get_weather", '{"city":"Be')],
    ),
    "cut-before-arguments": Case(
        f"a</think>b{SECTION_BEGIN}{CALL_BEGIN}functions.get_weather:0{CALL_ARGUMENTS}", "a", "b", []
    ),
    "no-section": Case(f"a</think>b{call('functions.now:0', '{}')}", "a", "b", [("now", "{}")]),
    "orphan-end-of-section": Case(f"a</think>b{SECTION_END}", "a", "b", []),
    "without-index": Case(f"a</think>{SECTION_BEGIN}{call('functions.now', '')}{SECTION_END}", "a", "", [("now", "{}")]),
    "another-kind-of-id": Case(
        f"a</think>{SECTION_BEGIN}{call('call_6b', PATH)}{call('call_7', WEATHER)}{SECTION_END}",
        "a", f"call_7 {WEATHER}", [("srv:read", PATH)],
    ),
    "colon-and-no-end-of-call": Case(
        f"a</think>{SECTION_BEGIN}{CALL_BEGIN}functions.srv:read:0{CALL_ARGUMENTS}{PATH}{call('functions.now:1', '{}')}",
        "a", "", [("srv:read", PATH), ("now", "{}")],
    ),
    "one-id-twice": Case(
        f"a</think>{SECTION_BEGIN}{2 * call('functions.now:0', '{}')}{SECTION_END}", "a", "", [("now", "{}"), ("now", "{}")]
    ),
    "cut-header": Case(f"a</think>b{SECTION_BEGIN}{CALL_BEGIN}functions.get_wea", "a", "b", []),
    # Ordinary tokens spell half a marker, so it is text that the model wrote.
    "half-a-marker": Case("a</think>b <|tool_calls_sec", "a", "b <|tool_calls_sec", []),
}  # fmt: skip
NAMED = "pad with [PAD], unknown is [UNK], [BOS]x[EOS]"
SPELLED = f"[PAD]<think></think>{SECTION_BEGIN}{call('functions.now:0', '{}')}{SECTION_END}<|im_end|>"
"""The text of a model that quotes its own format with ordinary tokens."""
# These cases need an answer given as token ids: reserved tokens, which an answer must not show, and names of special
# tokens in text, which must stay.
TOKEN_CASES = {
    **CASES,
    "reserved": Case(
        "w<|reserved_token_300|>hy<|reserved_token_301|></think><|reserved_token_302|>he<|reserved_token_303|>llo",
        "why", "hello", [],
    ),
    "reserved-and-calls": Case(
        f"why<|reserved_token_300|></think>ok{SECTION_BEGIN}<|reserved_token_301|>"
        f"{call('functions.get_weather:0', WEATHER)}{SECTION_END}<|reserved_token_302|>",
        "why", "ok", [("get_weather", WEATHER)],
    ),
    "names-of-special-tokens": Case(f"a</think>{escape(NAMED)}", "a", NAMED, []),
    "spelled": Case(
        f"a{escape(SPELLED)}</think>b{escape(SPELLED)}{SECTION_BEGIN}{call('functions.now:0', escape(SPELLED))}",
        f"a{SPELLED}", f"b{SPELLED}", [("now", SPELLED)],
    ),
}  # fmt: skip


def parsed(server: Server, case: Case, script: dict[str, Any]) -> tuple[str, str, list[tuple[str, str]], str]:
    """Return the reasoning, content, calls and finish reason of an answer that comes whole.

    script: the request's fields that order the answer.
    """
    answer = server.post("/v1/chat/completions", **_body(case, script))
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    message = choice["message"]
    calls = [(found["function"]["name"], found["function"]["arguments"]) for found in message.get("tool_calls") or []]
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    return reasoning, message["content"] or "", calls, choice["finish_reason"]


def streamed(server: Server, case: Case, script: dict[str, Any]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the reasoning, content and calls of a streamed answer, joined from its chunks of one or a few tokens."""
    reasoning, content = "", ""
    calls: dict[int, tuple[str, str]] = {}
    for chunk in server.stream("/v1/chat/completions", **_body(case, script)):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reasoning += delta.get("reasoning") or delta.get("reasoning_content") or ""
            content += delta.get("content") or ""
            for piece in delta.get("tool_calls") or []:
                name, arguments = calls.get(piece["index"], ("", ""))
                function = piece["function"]
                calls[piece["index"]] = (
                    name + (function.get("name") or ""),
                    arguments + (function.get("arguments") or ""),
                )
    return reasoning, content, [calls[index] for index in sorted(calls)]


def completed(server: Server, prompt: Any, *, stream: bool, **body: Any) -> tuple[str, list[str], list[int]]:
    """Return a raw completion's text, the names of its tokens with a log-probability, and their offsets in the text."""
    body = {"prompt": prompt, "max_tokens": 2000, "temperature": 0, **body}
    answers = server.stream("/v1/completions", **body) if stream else [server.complete(**body)]
    choices = [choice for answer in answers for choice in answer["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    names = [name for one in logprobs for name in one["tokens"]]
    places = [place for one in logprobs for place in one["text_offset"]]
    return "".join(choice["text"] for choice in choices), names, places


def _body(case: Case, script: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Weather?"}]
    return {"messages": messages, "tools": TOOLS, "max_tokens": 2000, "temperature": 0, **script}
