"""Answers held to a grammar: what each of SGLang's backends makes of the model's tokenizer, and the server's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grammar import CASES, CHOICES, NAMES, SCHEMA, is_valid, liking, tokens, walk
from support.server import Server

from k26_plugins.common.prompt.output import MARKERS, THINK_BEGIN, THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.sglang import compat, register

pytest.importorskip("sglang.srt.runtime_context", reason="backends are made of the context that came after 0.5.10")
VOCABULARY = 512


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> KimiTokenizer:
    return KimiTokenizer(tiny_folder)


@pytest.fixture(scope="module", params=["xgrammar", "llguidance", "outlines"])
def backend(tiny_folder: Path, plain: KimiTokenizer, request: pytest.FixtureRequest) -> Iterator[Any]:
    """As the scheduler makes it of the flag."""
    from sglang.srt.constrained import base_grammar_backend
    from sglang.srt.runtime_context import get_context

    register()
    tokenizer = compat.get_tokenizer(str(tiny_folder), None)
    # The context's arguments are of a model that is looked for on the hub.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with get_context().override_server_args(grammar_backend=request.param, device="cpu") as arguments:
        make = base_grammar_backend.create_grammar_backend
        yield make(arguments, tokenizer, VOCABULARY, {plain.special["<|im_end|>"]})
    monkeypatch.undo()


def grammar(backend: Any, kind: str, spec: Any) -> Any:
    """As SGLang's manager of grammars asks for one."""
    kinds = {"json": ("json", json.dumps(spec)), "choice": ("regex", "|".join(CHOICES)), "regex": ("regex", spec)}
    future, _ = backend.get_cached_or_future_value(kinds.get(kind, (kind, spec)), False)
    return future.result()


def allowed(found: Any) -> list[int]:
    mask = found.allocate_vocab_mask(VOCABULARY, 1, "cpu")
    if mask.dtype == torch.bool:
        found.fill_vocab_mask(mask, 0)
        return [token for token in range(VOCABULARY) if not mask[0, token]]
    mask.fill_(-1)
    found.fill_vocab_mask(mask, 0)
    return tokens(mask[0])


@pytest.mark.parametrize("kind", CASES)
def test_whatever_is_allowed_is_valid(backend: Any, plain: KimiTokenizer, kind: str) -> None:
    """And ends with the token with which the model ends answers."""
    end = plain.special["<|im_end|>"]
    for seed in range(8):
        found = grammar(backend, kind, CASES[kind])
        *answer, last = walk(lambda found=found: allowed(found), found.accept_token, {end}, seed)
        assert last == end
        assert max(answer) < 256, "a control token in the answer"
        text = plain.decode(answer)
        assert is_valid(kind, text), text


def test_served_answers_are_valid_and_the_reasoning_is_free(server: Server, plain: KimiTokenizer) -> None:
    """Drawn at random from the model's noise, with a liking for the end of thinking."""
    bias = liking(plain.special, {THINK_END: 3})

    def ask(kind: str, thinking: bool) -> dict[str, Any]:
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        asked: dict[str, Any] = {"regex": CASES["regex"] if kind == "regex" else "|".join(CHOICES)}
        answer = server.chat(
            "Report.", max_tokens=1500, temperature=1, logit_bias=bias,
            chat_template_kwargs={"thinking": thinking}, **({"response_format": schema} if kind == "json" else asked),
        )  # fmt: skip
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    asked = [(kind, thinking) for kind in CASES for thinking in (True, False)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda one: ask(*one), asked)
    thoughts = {True: "", False: ""}
    for (kind, thinking), choice in zip(asked, answers, strict=True):
        message = choice["message"]
        assert choice["finish_reason"] == "stop", choice
        assert is_valid(kind, message["content"]), message
        thoughts[thinking] += message["reasoning_content"] or ""
    # Each may begin with the end of thinking.
    assert thoughts[True]
    assert not thoughts[False]


TOOL = {"type": "function", "function": {"name": "report", "parameters": SCHEMA, "strict": True}}


def test_a_served_answer_has_no_control_tokens_for_words(server: Server, plain: KimiTokenizer) -> None:
    """They are not shown, so that the answer would be too short."""
    unliked = {str(plain.special[name]): -100 for name in MARKERS}
    answer = server.chat(
        "Name one.", max_tokens=100, temperature=1, logit_bias=unliked, chat_template_kwargs={"thinking": False},
        regex=NAMES,
    )  # fmt: skip
    content = answer["choices"][0]["message"]["content"]
    assert re.fullmatch(NAMES, content), content


def test_a_served_call_is_valid(server: Server, plain: KimiTokenizer) -> None:
    bias = liking(plain.special, {name: 100 for name in MARKERS if name not in (THINK_BEGIN, THINK_END)})
    answer = server.chat(
        "Report.", max_tokens=1500, temperature=1, tools=[TOOL], tool_choice="required", logit_bias=bias,
        chat_template_kwargs={"thinking": False},
    )  # fmt: skip
    first = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert first["name"] == "report"
    assert is_valid("json", first["arguments"])
