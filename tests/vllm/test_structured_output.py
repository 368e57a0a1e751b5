"""Tests of answers that are held to a grammar: what each of vLLM's grammar backends allows with the model's tokenizer,
and what the server answers."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.grammar import CASES, SCHEMA, is_valid, tokens, walk
from support.served_grammar import TOOL, ServedGrammarTests

from k26_plugins.common.prompt.output import (
    CALL_BEGIN,
    SECTION_BEGIN,
    CallArguments,
    CallStart,
    OutputParser,
)
from k26_plugins.common.prompt.token_text import TokenText
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.vllm import compat, register
from k26_plugins.vllm.tokenizer import K26Tokenizer

pytest.importorskip("vllm.parser.kimi_k2", reason="the manager was checked where the parser is")


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> KimiTokenizer:
    return KimiTokenizer(tiny_folder)


class Engine:
    """The engine's part of structured output, as a server of the checkpoint in `folder` with this backend has it."""

    def __init__(self, folder: Path, backend: str) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.structured_output import StructuredOutputManager

        register()
        arguments = EngineArgs(
            model=str(folder), structured_outputs_config={"backend": backend}, enforce_eager=True, max_model_len=4096
        )
        self.config = arguments.create_engine_config()
        self.manager = StructuredOutputManager(self.config)

    def grammar(self, kind: str, spec: Any) -> Any:
        """Return the compiled grammar, asked for as by a request. Raise the error if vLLM refuses the grammar."""
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams
        from vllm.tokenizers import cached_tokenizer_from_config
        from vllm.v1.request import Request

        model_config = self.config.model_config
        params = SamplingParams(max_tokens=100, structured_outputs=StructuredOutputsParams(**{kind: spec}))
        tokenizer = cached_tokenizer_from_config(model_config=model_config)
        params.update_from_generation_config(model_config.try_get_generation_config(), tokenizer.eos_token_id)
        params._validate_structured_outputs(model_config, self.config.structured_outputs_config, tokenizer)
        request = Request("a", [1, 2], params, None)
        self.manager.grammar_init(request)
        asked = request.structured_output_request
        while not asked.is_grammar_ready:
            time.sleep(0.01)
        if isinstance(asked.grammar, Exception):
            raise asked.grammar
        return asked.grammar

    def walk(self, kind: str, spec: Any, ends: set[int], seed: int, **how: Any) -> list[int]:
        grammar = self.grammar(kind, spec)

        def accept(token: int) -> None:
            assert grammar.accept_tokens("a", [token])

        return walk(lambda: self.allowed(grammar), accept, ends, seed, **how)

    def allowed(self, grammar: Any) -> list[int]:
        mask = self.manager.backend.allocate_token_bitmask(1)
        mask.fill_(-1)
        grammar.fill_bitmask(mask, 0)
        return tokens(mask[0])


@pytest.fixture(scope="module", params=["xgrammar", "guidance", "outlines"])
def engine(tiny_folder: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine(tiny_folder, request.param)


@pytest.mark.parametrize("kind", CASES)
def test_whatever_is_allowed_is_valid(engine: Engine, plain: KimiTokenizer, kind: str) -> None:
    """An answer drawn from what the grammar allows is valid, and may end with the token with which the model ends
    answers."""
    ends = {plain.special["[EOS]"], plain.special["<|im_end|>"]}
    seen = set()
    for seed in range(8):
        *answer, last = engine.walk(kind, CASES[kind], ends, seed)
        assert max(answer) < 256, "a control token in the answer"
        text = plain.decode(answer)
        assert is_valid(kind, text), text
        seen.add(last)
    assert plain.special["<|im_end|>"] in seen


def call_grammar(plain_folder: Path, tool_choice: str) -> str:
    """Return the structural tag that the parser of tool calls makes from a request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    tokenizer = K26Tokenizer.from_pretrained(plain_folder)
    messages = [{"role": "user", "content": "x"}]
    request = ChatCompletionRequest(messages=messages, model="m", tools=[TOOL], tool_choice=tool_choice)
    found = ParserManager.get_parser(compat.PARSER, compat.PARSER, enable_auto_tools=True, tokenizer=tokenizer)
    tag: str = found(tokenizer, tools=request.tools).adjust_request(request).structured_outputs.structural_tag
    return tag


def test_a_call_is_the_tools_own_with_arguments_of_its_schema(tiny_folder: Path, plain: KimiTokenizer) -> None:
    engine = Engine(tiny_folder, "xgrammar")
    tag, ends = call_grammar(tiny_folder, "required"), {plain.special["<|im_end|>"], plain.special["[EOS]"]}
    for seed in range(3):
        *answer, _ = engine.walk("structural_tag", tag, ends, seed, control_tokens_first=True)
        parser = OutputParser(in_reasoning=False, tools={"report": SCHEMA})
        events = parser.feed_pieces(TokenText(plain).split(plain.decode(answer), answer)) + parser.finish()
        calls = [event.name for event in events if isinstance(event, CallStart)]
        assert set(calls) == {"report"}
        for index in range(len(calls)):
            parts = [event.text for event in events if isinstance(event, CallArguments) and event.index == index]
            assert is_valid("json", "".join(parts))


def test_with_a_choice_of_its_own_the_grammar_begins_after_the_marker(tiny_folder: Path, plain: KimiTokenizer) -> None:
    engine = Engine(tiny_folder, "xgrammar")
    grammar = engine.grammar("structural_tag", call_grammar(tiny_folder, "auto"))
    assert len(engine.allowed(grammar)) > 200
    assert grammar.accept_tokens("a", [*plain.encode("Text."), plain.special[SECTION_BEGIN]])
    assert set(engine.allowed(grammar)) <= {plain.special[CALL_BEGIN], *plain.encode("<")}


UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
REFUSED = [
    (
        "xgrammar",
        "json",
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        "not supported by",
    ),
    (
        "guidance",
        "json",
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        "uniqueItems",
    ),
    ("xgrammar", "regex", "(?=a)a", "Lookahead is not supported"),
    ("guidance", "regex", "(?=a)a", "look-around"),
    ("outlines", "regex", "(?=a)a", "Look-Around"),
    ("outlines", "regex", "^a$", "uses anchors"),
    ("outlines", "json_object", True, "does not support json_object"),
    ("outlines", "grammar", 'root ::= "a"', "does not support grammar"),
    ("guidance", "structural_tag", None, "Invalid grammar specification"),
    ("outlines", "structural_tag", None, "Invalid request type for Outlines"),
    ("lm-format-enforcer", "regex", "a", "vllm is not installed"),
]


@pytest.mark.parametrize(("backend", "kind", "spec", "said"), REFUSED, ids=[f"{one[0]}-{one[1]}" for one in REFUSED])
def test_what_a_backend_refuses(tiny_folder: Path, backend: str, kind: str, spec: Any, said: str) -> None:
    """docs/features.md lists what each backend refuses."""
    spec = call_grammar(tiny_folder, "required") if spec is None else spec
    from vllm.exceptions import VLLMValidationError

    with pytest.raises((VLLMValidationError, ValueError, ImportError), match=said):
        Engine(tiny_folder, backend).grammar(kind, spec)


def test_lm_format_enforcer_fails_in_vllm_alone() -> None:
    """lm-format-enforcer imports a module that vLLM no longer has, and takes the error to mean that there is no
    vLLM."""
    with pytest.raises(ImportError, match="vllm is not installed") as raised:
        importlib.import_module("lmformatenforcer.integrations.vllm")
    assert "vllm.transformers_utils.tokenizer" in str(raised.value.__context__)


class TestServed(ServedGrammarTests):
    reasoning = "reasoning"
    drawn: ClassVar[dict[str, Any]] = {"seed": 1}

    def asked(self, kind: str, spec: Any) -> dict[str, Any]:
        return {"structured_outputs": {kind: spec}}
