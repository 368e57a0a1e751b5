"""A real server's answers held to a grammar: each engine's file derives `ServedGrammarTests` and says how one is asked."""

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
    """Takes the fixtures `server` and `plain`, the core's tokenizer."""

    reasoning: ClassVar[str]
    """The field of a message that has the thinking."""
    drawn: ClassVar[dict[str, Any]] = {}
    """Fields of a request that is answered at random."""

    def asked(self, kind: str, spec: Any) -> dict[str, Any]:
        """The fields of a request by which the engine takes a `regex` or a `choice`."""
        raise NotImplementedError

    def test_served_answers_are_valid_and_the_reasoning_is_free(self, server: Server, plain: KimiTokenizer) -> None:
        """Drawn at random from the model's noise, with a liking for the end of thinking.

        Without markers of calls: engines differ in whether one of them ends the thinking, so that the grammar begins.
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
        # Each may begin with the end of thinking.
        assert thoughts[True]
        assert not thoughts[False]

    def test_a_served_answer_has_no_control_tokens_for_words(self, server: Server, plain: KimiTokenizer) -> None:
        """They are not shown, so that the answer would be too short."""
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
