"""vLLM's parsers as the plugin chooses them: whole answers, and streams of any number of tokens at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.scripted import TOKEN_CASES, TOOLS, Case, call

from k26_plugins.common.prompt.output import SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.vllm import compat, register
from k26_plugins.vllm.tokenizer import K26Tokenizer

pytest.importorskip("vllm.parser.kimi_k2", reason="vLLM's state machine for this model came after 0.19.1")

BIG = '{"city":"' + 'x } \\" <| ' * 1500 + '"}'
ALL = {
    **TOKEN_CASES,
    "12-kilobytes": Case(f"{THINK_END}{SECTION_BEGIN}{call('now:0', BIG)}{SECTION_END}", "", "", [("now", BIG)]),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    register()
    return K26Tokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize("name", ALL)
def test_whole_and_streamed(tokenizer: Any, name: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    case = ALL[name]
    parser = ParserManager.get_parser(compat.PARSER, compat.PARSER, enable_auto_tools=True, tokenizer=tokenizer)
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], tools=TOOLS, model="m")
    token_ids = tokenizer.encode(case.answer, add_special_tokens=False)
    reasoning, content, calls = parser(tokenizer, tools=request.tools).parse(
        shown(tokenizer, token_ids), request, enable_auto_tools=True, model_output_token_ids=token_ids
    )
    expected = (case.reasoning, case.content, case.calls)
    assert (reasoning or "", content or "", [(found.name, found.arguments) for found in calls or []]) == expected
    for seed in range(5):
        assert _stream(parser(tokenizer, tools=request.tools), tokenizer, request, token_ids, seed) == expected


def shown(tokenizer: Any, token_ids: list[int]) -> str:
    """What the parser is given: it asks for no special token to be shown."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


def _stream(parser: Any, tokenizer: Any, request: Any, token_ids: list[int], seed: int) -> Any:
    rng, position = random.Random(seed), 0
    prompt = tokenizer.encode("<|im_assistant|>assistant<|im_middle|><think>", add_special_tokens=False)
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
