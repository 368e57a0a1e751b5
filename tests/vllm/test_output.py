"""Tests of vLLM's parsers as the plugin chooses them: whole answers, and streams of any number of tokens at once."""

from __future__ import annotations

import inspect
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.grammar import accepts
from support.scripted import TOKEN_CASES, TOOLS, WEATHER, Case, call

from k26_plugins.common.prompt.output import SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.vllm import compat, register
from k26_plugins.vllm.tokenizer import K26Tokenizer

pytest.importorskip("vllm.parser.kimi_k2", reason="vLLM's state machine for this model came after 0.19.1")
K26Parser = pytest.importorskip("k26_plugins.vllm.output").K26Parser

BIG = '{"city":"' + 'x } \\" <| ' * 1500 + '"}'
ALL = {
    **TOKEN_CASES,
    "12-kilobytes": Case(f"{THINK_END}{SECTION_BEGIN}{call('now:0', BIG)}{SECTION_END}", "", "", [("now", BIG)]),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    register()
    return K26Tokenizer.from_pretrained(tiny_folder)


def parsers(tokenizer: Any, request: Any, **options: Any) -> Any:
    """Return a function that makes a fresh parser for each answer, as vLLM's server does."""
    from vllm.parser.parser_manager import ParserManager

    # Before vLLM 0.32 `get_parser` does not ask for the tokenizer.
    asked_for = inspect.signature(ParserManager.get_parser).parameters
    given = {"tokenizer": tokenizer} if "tokenizer" in asked_for else {}
    found = ParserManager.get_parser(compat.PARSER, compat.PARSER, enable_auto_tools=True, **given)
    assert issubclass(found, K26Parser)
    return lambda: found(tokenizer, tools=request.tools, chat_template_kwargs=options)


def asked(**fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], model="m", **{"tools": TOOLS, **fields})


def whole(parser: Any, tokenizer: Any, request: Any, token_ids: list[int]) -> Any:
    reasoning, content, calls = parser.parse(
        shown(tokenizer, token_ids), request, enable_auto_tools=True, model_output_token_ids=token_ids
    )
    return reasoning or "", content or "", [(found.name, found.arguments) for found in calls or []]


@pytest.mark.parametrize("name", ALL)
def test_whole_and_streamed(tokenizer: Any, name: str) -> None:
    case, request = ALL[name], asked()
    new = parsers(tokenizer, request)
    token_ids = tokenizer.encode(case.answer, add_special_tokens=False)
    expected = (case.reasoning, case.content, case.calls)
    assert whole(new(), tokenizer, request, token_ids) == expected
    for seed in range(5):
        assert _stream(new(), tokenizer, request, token_ids, seed) == expected


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}], ids=str)
def test_no_call_where_none_is_asked_for(tokenizer: Any, fields: dict[str, Any]) -> None:
    case, request = ALL["call"], asked(**fields)
    token_ids = tokenizer.encode(case.answer, add_special_tokens=False)
    new = parsers(tokenizer, request)
    assert whole(new(), tokenizer, request, token_ids) == (case.reasoning, case.content, [])
    assert _stream(new(), tokenizer, request, token_ids, 0) == (case.reasoning, case.content, [])


@pytest.mark.parametrize("options", [{"thinking": False}, {"thinking": 0, "enable_thinking": True}, {"thinking": ""}])
def test_thinking_is_what_the_prompt_was_rendered_with(tokenizer: Any, options: dict[str, Any]) -> None:
    request = asked()
    messages = [{"role": "user", "content": "x"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    token_ids = tokenizer.encode("plain", add_special_tokens=False)
    new = parsers(tokenizer, request, **options)
    assert whole(new(), tokenizer, request, token_ids) == ("", "plain", [])
    assert _stream(new(), tokenizer, request, token_ids, 0, prompt) == ("", "plain", [])


def test_ids_of_calls_and_the_names_of_reasoning(tokenizer: Any) -> None:
    request = asked()
    new = parsers(tokenizer, request)
    token_ids = tokenizer.encode(ALL["one-id-twice"].answer, add_special_tokens=False)
    _, _, calls = new().parse(shown(tokenizer, token_ids), request, model_output_token_ids=token_ids)
    assert [call.id for call in calls] == ["functions.now:0", "functions.now:1"]
    parser = new()
    delta = parser.parse_delta(shown(tokenizer, token_ids), token_ids, request, finished=True)
    assert delta.model_dump(exclude_unset=True)["reasoning_content"] == delta.reasoning == "a"
    assert parser.count_reasoning_tokens(token_ids) == 1
    hidden = new().parse_delta(shown(tokenizer, token_ids), token_ids, asked(include_reasoning=False), finished=True)
    assert set(hidden.model_dump(exclude_unset=True)) == {"tool_calls"}


@pytest.mark.skipif(
    find_spec("vllm.tool_parsers.tool_strict_level") is None,
    reason="before 0.31 vLLM has no grammar of calls or a schema",
)
def test_with_a_schema_calls_are_possible(tokenizer: Any) -> None:
    """By default an answer is tool calls or what the schema allows; vLLM's own default allows the schema alone, unless
    a tool is strict."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    request = parsers(tokenizer, asked())().adjust_request(asked(tool_choice="auto", response_format=format_))
    tag = json.loads(request.structured_outputs.structural_tag)
    assert accepts(tag, '{"a":1}')
    assert accepts(tag, f"{SECTION_BEGIN}{call('functions.now:0', WEATHER)}{SECTION_END}")
    assert not accepts(tag, "text")
    plain = parsers(tokenizer, asked())().adjust_request(asked(tool_choice="auto"))
    assert plain.structured_outputs is None


def shown(tokenizer: Any, token_ids: list[int]) -> str:
    """Return the text that vLLM gives to the parser, in which special tokens are not shown."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


def _stream(
    parser: Any, tokenizer: Any, request: Any, token_ids: list[int], seed: int, prompt: list[int] | None = None
) -> Any:
    rng, position = random.Random(seed), 0
    prompt = prompt or tokenizer.encode("<|im_assistant|>assistant<|im_middle|><think>", add_special_tokens=False)
    reasoning, content = "", ""
    calls: dict[int, tuple[str, str]] = {}
    while position < len(token_ids):
        piece = token_ids[position : position + rng.choice([1, 2, 7, 40, 3000])]
        position += len(piece)
        delta = parser.parse_delta(
            shown(tokenizer, piece), piece, request, prompt_token_ids=prompt, finished=position == len(token_ids)
        )
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for item in delta.tool_calls or []:
            name, arguments = calls.get(item.index, ("", ""))
            calls[item.index] = (name + (item.function.name or ""), arguments + (item.function.arguments or ""))
    return reasoning, content, list(calls.values())
