"""Tests that a real server's answers keep to the grammar that a request asks for.

Each engine's tests derive `ServedGrammarTests` and define how a request asks for a grammar. Python's `re` and
jsonschema judge the answers.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from support.grammar import CASES, NAMES, SCHEMA, is_valid, liking
from support.server import Server

from k26_plugins.common.prompt.output import MARKERS, THINK_BEGIN, THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

TOOL = {"type": "function", "function": {"name": "report", "parameters": SCHEMA, "strict": True}}


class ServedGrammarTests:
    """Tests that take the fixtures `server` and `plain`, the core's tokenizer."""

    reasoning: ClassVar[str]
    """The field of a message that holds the reasoning content."""
    drawn: ClassVar[dict[str, Any]] = {}
    """Further fields of the requests whose answers are sampled at random."""

    def asked(self, kind: str, spec: Any) -> dict[str, Any]:
        """Return the request fields by which the engine takes a `regex` or a `choice`."""
        raise NotImplementedError

    def test_served_answers_are_valid_and_the_reasoning_is_free(self, server: Server, plain: KimiTokenizer) -> None:
        """Content keeps to the grammar and the reasoning is free of it.

        The answers are sampled from random weights, with a bias towards the end of the reasoning. The markers of tool
        calls are excluded, because engines differ in whether one of them ends the reasoning, so that the grammar
        begins.
        """
        bias = liking(plain.special, {**dict.fromkeys(MARKERS, -100), THINK_END: 3})
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}

        def ask(kind: str, thinking: bool) -> dict[str, Any]:
            fields = {"response_format": schema} if kind == "json" else self.asked(kind, CASES[kind])
            answer = server.chat(
                "Report.", max_tokens=1500, temperature=1, logit_bias=bias, chat_template_kwargs={"thinking": thinking},
                **fields, **self.drawn,
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
            thoughts[thinking] += message[self.reasoning] or ""
        # A single answer may begin with the end of the reasoning, so only all answers together are sure to have some.
        assert thoughts[True]
        assert not thoughts[False]

    def test_a_served_answer_has_no_control_tokens_for_words(self, server: Server, plain: KimiTokenizer) -> None:
        """A grammar lets no control token stand for ordinary characters, because an answer does not show control tokens
        and would be too short."""
        unliked = {str(plain.special[name]): -100 for name in MARKERS}
        answer = server.chat(
            "Name one.", max_tokens=100, temperature=1, logit_bias=unliked, chat_template_kwargs={"thinking": False},
            **self.asked("regex", NAMES),
        )  # fmt: skip
        content = answer["choices"][0]["message"]["content"]
        assert re.fullmatch(NAMES, content), content

    def test_a_served_call_is_valid(self, server: Server, plain: KimiTokenizer) -> None:
        bias = liking(plain.special, {name: 100 for name in MARKERS if name not in (THINK_BEGIN, THINK_END)})
        answer = server.chat(
            "Report.", max_tokens=1500, temperature=1, tools=[TOOL], tool_choice="required", logit_bias=bias,
            chat_template_kwargs={"thinking": False}, **self.drawn,
        )  # fmt: skip
        choice = answer["choices"][0]
        assert choice["finish_reason"] in ("stop", "tool_calls", "length"), choice
        first = choice["message"]["tool_calls"][0]["function"]
        assert first["name"] == "report"
        assert is_valid("json", first["arguments"])
