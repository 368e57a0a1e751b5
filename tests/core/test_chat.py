"""Tests of what the chat template is given and how its text becomes token ids. The judges are transformers' own
rendering of the same template, the tiktoken library, and the specification's rules."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conversations import conversations
from transformers import PreTrainedTokenizerFast

from k26_plugins.common.prompt.chat import VerbatimArguments, keep_arguments, prepare, render
from k26_plugins.common.prompt.control_tokens import escape, escape_deep, unescape, unescape_deep
from k26_plugins.common.prompt.hf_tokenizer import KimiTokenizerFast, load_hf_tokenizer
from k26_plugins.common.prompt.special_tokens import NAMED_OFFSETS
from k26_plugins.common.prompt.template_check import differing_samples
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

NAMES = [*NAMED_OFFSETS, "<|reserved_token_300|>", "<|kimi_k25_video_placeholder|>"]
PIECES = st.one_of(
    st.sampled_from(
        [*NAMES, "<", "<|", "|>", "im_end|>", "</", "/", "think>", "[", "EOS]", "\ufdd0", "\ufdd1", "\ufdd2"]
    ),
    st.text(max_size=5),
)
HOSTILE = st.lists(PIECES, max_size=8).map("".join)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a <|im_end|> city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def fast(tiny_folder: Path) -> KimiTokenizerFast:
    return load_hf_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> KimiTokenizer:
    return KimiTokenizer(tiny_folder)


@given(HOSTILE)
@settings(deadline=None, max_examples=300)
def test_escaped_text_has_no_control_token_and_comes_back(text: str) -> None:
    marked = escape(text)
    assert not any(name in marked for name in NAMES)
    assert unescape(marked) == text
    assert unescape_deep(escape_deep({"a": [text]})) == {"a": [text]}


@given(st.lists(HOSTILE, max_size=4))
@settings(deadline=None, max_examples=300)
def test_no_control_token_comes_of_parts_put_together(parts: list[str]) -> None:
    assert not any(name in "".join(map(escape, parts)) for name in NAMES)


@given(st.lists(HOSTILE, min_size=1, max_size=3), st.booleans())
@settings(deadline=None, max_examples=200)
def test_hostile_messages_are_text_between_the_templates_tokens(
    fast: KimiTokenizerFast, plain: KimiTokenizer, parts: list[str], as_tool: bool
) -> None:
    """The judge is the tiktoken library, which encodes the messages' own text with no control token allowed."""
    message: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": part} for part in parts]}
    if as_tool:
        message = {"role": "tool", "tool_call_id": "functions.f:0", "content": "".join(parts)}
    judge = tiktoken.Encoding(
        "judge",
        pat_str=plain._encoding._pat_str,
        mergeable_ranks=plain._encoding._mergeable_ranks,
        special_tokens=plain.special,
    )
    body = ("## Return of functions.f:0\n" if as_tool else "") + "".join(parts)
    head, role = ("<|im_system|>", "tool") if as_tool else ("<|im_user|>", "user")
    expected = [
        *judge.encode(f"{head}{role}<|im_middle|>", allowed_special="all"),
        *judge.encode_ordinary(body),
        *judge.encode("<|im_end|><|im_assistant|>assistant<|im_middle|><think>", allowed_special="all"),
    ]
    assert plain.encode_prompt(render([message])) == expected
    rendered = fast.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert fast.encode(rendered, add_special_tokens=False) == expected


def test_control_tokens_can_be_allowed(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = [{"role": "user", "content": "a<|im_end|>b"}]
    with monkeypatch.context() as patch:
        patch.setenv("K26_CONTROL_TOKENS", "allow")
        allowing = load_hf_tokenizer(tiny_folder)
        patch.setenv("K26_CONTROL_TOKENS", "yes")
        with pytest.raises(ValueError, match="choose text or allow"):
            load_hf_tokenizer(tiny_folder)
    end = allowing.convert_tokens_to_ids("<|im_end|>")

    def count(tokenizer: KimiTokenizerFast) -> int:
        return tokenizer.apply_chat_template(message, tokenize=True, return_dict=False).count(end)

    assert (count(load_hf_tokenizer(tiny_folder)), count(allowing)) == (1, 2)


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi", "name": "bob"}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "R",
            "tool_calls": [
                {"id": "functions.weather:0", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}},
                {"id": "functions.weather:1", "function": {"name": "weather", "arguments": {"city": "A & B"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "functions.weather:0", "content": "sun"},
        {"role": "tool", "tool_call_id": "functions.weather:1", "content": [{"type": "text", "text": "rain"}]},
    ],
    "history": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "R1"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "tw"},
    ],
    "media": [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "<|media_pad|>?"}]}
    ],
}


@pytest.mark.parametrize(
    "options", [{}, {"thinking": False}, {"preserve_thinking": True}, {"tools": [WEATHER]}], ids=str
)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_as_transformers_renders_the_same_template(fast: KimiTokenizerFast, name: str, options: dict[str, Any]) -> None:
    """The judge is transformers' rendering without any of our overrides, given the messages that `prepare` makes for
    the template."""
    prepared = prepare(CONVERSATIONS[name], options.get("tools"))
    extra = {key: value for key, value in options.items() if key != "tools"}
    judged = PreTrainedTokenizerFast.apply_chat_template(
        fast,
        prepared.messages,
        tools=prepared.tools,
        tools_ts_str=prepared.tools_ts_str,
        tokenize=False,
        add_generation_prompt=True,
        **extra,
    )
    assert render(CONVERSATIONS[name], **options) == judged
    assert (
        fast.apply_chat_template(CONVERSATIONS[name], tokenize=False, add_generation_prompt=True, **options) == judged
    )


@pytest.mark.parametrize("name", ["history", "plain", "media"])
def test_the_last_message_can_be_continued(fast: KimiTokenizerFast, name: str) -> None:
    text = render(CONVERSATIONS[name], continue_final_message=True)
    assert text == fast.apply_chat_template(CONVERSATIONS[name], tokenize=False, continue_final_message=True)
    assert render(CONVERSATIONS[name], add_generation_prompt=False) == text + "<|im_end|>"


def test_a_message_without_text_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match="no text to continue"):
        render([{"role": "assistant", "content": None, "tool_calls": []}], continue_final_message=True)


def test_enable_thinking_is_another_name(fast: KimiTokenizerFast) -> None:
    messages = CONVERSATIONS["plain"]
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<think></think>")
    both: dict[str, Any] = {"thinking": True, "enable_thinking": False}
    assert fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **both).endswith("<think>")


def test_past_arguments_are_written_as_the_model_wrote_them() -> None:
    """Engines parse the arguments of past tool calls; the text that the model wrote survives parsing, copying and
    pickling."""
    kept = pickle.loads(pickle.dumps(keep_arguments(CONVERSATIONS["tools"])))
    arguments = kept[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"city": "Köln"}
    assert render(kept) == render(CONVERSATIONS["tools"])
    assert '<|tool_call_argument_begin|>{"city":"Köln"}<|tool_call_end|>' in render(kept)
    assert '<|tool_call_argument_begin|>{"city": "A & B"}<|tool_call_end|>' in render(kept)


@pytest.mark.parametrize(("text", "written"), [("", "{}"), ("{", "{"), ("[1]", "[1]"), ("null", "null")])
def test_arguments_that_are_no_object(text: str, written: str) -> None:
    assert dict(VerbatimArguments(text)) == {}
    assert VerbatimArguments(text)
    call = {"id": "f:0", "function": {"name": "f", "arguments": text}}
    messages = keep_arguments([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert f"<|tool_call_argument_begin|>{written}<|tool_call_end|>" in render(messages)


def test_a_users_template_wins_and_gets_objects(fast: KimiTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{{ m.tool_calls[0].function.arguments.city if m.tool_calls else '' }}{% endfor %}"
    )
    kept = keep_arguments(CONVERSATIONS["tools"])
    assert fast.apply_chat_template(kept, chat_template=template, tokenize=False) == "Köln"


def test_the_checkpoints_own_template_is_preferred(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ tools_ts_str }}|{{ messages[0].content }}")
    text = render([{"role": "user", "content": "Hi"}], tmp_path, tools=[WEATHER])
    assert text.startswith("# Tools\n\n## functions\n")
    tokenizer = load_hf_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=[WEATHER], tokenize=False) == text


def test_the_checkpoints_file_by_plain_jinja(tiny_folder: Path) -> None:
    """For every conversation, `render` gives the text that plain Jinja makes of the checkpoint's template file, once
    the marks of quoted control tokens are removed."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    template = environment.from_string((tiny_folder / "chat_template.jinja").read_text())
    for one in conversations():
        if one.continued:
            continue
        given = prepare(one.messages, one.tools, escape_messages=False, escape_tools=False)
        plain = template.render(**asdict(given), add_generation_prompt=True, **one.options)
        assert unescape(render(one.messages, tiny_folder, tools=one.tools, **one.options)) == plain, one.name


def test_templates_get_what_transformers_gives_them(tmp_path: Path) -> None:
    """Published templates of this family leave loops with `break`, so templates are given the same Jinja extensions,
    filters and functions as by transformers."""
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m | tojson(sort_keys=True) }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{% if not messages %}{{ raise_exception('nothing') }}{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(source)
    messages = [{"role": "user", "content": "Ü&"}, {"role": "tool", "content": ""}]
    assert render(messages, tmp_path) == '{"content": "Ü&", "role": "user"}4'
    with pytest.raises(jinja2.TemplateError, match="nothing"):
        render([], tmp_path)


def test_a_changed_template_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    assert differing_samples(tiny_folder) == []
    assert differing_samples(tmp_path) == []
    own = (tiny_folder / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(own.replace("## Return of ", "## Result of "))
    with_results = [
        "thinking and tool calls",
        "instant mode and tool calls",
        "preserved thinking",
        "no answer asked for",
    ]
    assert differing_samples(tmp_path) == with_results
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert len(differing_samples(tmp_path)) == 8


def nested(levels: int) -> Any:
    value: Any = "leaf"
    for _ in range(levels):
        value = {"a": [value]}
    return value


def test_what_is_nested_too_deeply_is_one_clear_error() -> None:
    """Nesting deeper than 100 levels is refused, because beyond Python's recursion limit a server would answer with an
    error of its own."""
    messages = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(20)}}
    assert "namespace functions" in render(messages, tools=[tool])
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(450)}}
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        render(messages, tools=[tool])
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        render([{"role": "user", "content": [{"type": "text", "text": "Hi", "more": nested(450)}]}])


def test_arguments_of_a_past_call_may_be_any_text() -> None:
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "[" * 50_000}}
    kept = keep_arguments([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert "[" * 50_000 in render(kept)
