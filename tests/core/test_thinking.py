"""Tests that the prompt and the answer's parser take the same value for thinking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k26_plugins.common.prompt.hf_tokenizer import KimiTokenizerFast, load_hf_tokenizer
from k26_plugins.common.prompt.thinking import begins_in_reasoning, template_options

OFF: list[Any] = [False, 0, "", [], "false", "disabled", " Off ", {"type": "disabled"}]
ON: list[Any] = [True, 1, "on", [0], {"type": "enabled"}, {"type": "enabled", "budget_tokens": 5}, {}]


@pytest.fixture(scope="module")
def fast(tiny_folder: Path) -> KimiTokenizerFast:
    return load_hf_tokenizer(tiny_folder)


@pytest.mark.parametrize("value", [*OFF, *ON], ids=str)
def test_every_form_is_a_bool(value: Any) -> None:
    on = value in ON and value not in OFF
    assert template_options({"thinking": value, "other": 1}) == {"thinking": on, "other": 1}
    assert template_options({"enable_thinking": value}) == {"thinking": on}
    assert template_options(None, thinking=value) == {"thinking": on}


def test_which_is_heard_first() -> None:
    assert template_options({}) == template_options({"thinking": None, "enable_thinking": None}) == {}
    assert template_options({}, reasoning_effort="high") == {}
    assert template_options({}, reasoning_effort="none") == {"thinking": False}
    assert template_options({"enable_thinking": True}, reasoning_effort="none") == {"thinking": True}
    assert template_options({"enable_thinking": True}, thinking={"type": "disabled"}) == {"thinking": False}
    assert template_options({"thinking": False, "enable_thinking": True}, thinking=True) == {"thinking": False}


def test_thoughts_to_keep() -> None:
    """`keep` preserves past thoughts as in Moonshot's API; `preserve_thinking` among the options counts first."""
    kept = {"type": "enabled", "keep": "all"}
    assert template_options({}, thinking=kept) == {"thinking": True, "preserve_thinking": True}
    said = template_options({"thinking": kept, "preserve_thinking": False})
    assert said == {"thinking": True, "preserve_thinking": False}
    assert template_options({}, thinking={"type": "enabled", "keep": None}) == {"thinking": True}


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_prompt_and_parser_agree(fast: KimiTokenizerFast, data: st.DataObject) -> None:
    options = data.draw(
        st.dictionaries(
            st.sampled_from(["thinking", "enable_thinking"]), st.sampled_from([*OFF, *ON, None]), max_size=2
        )
    )
    messages = [
        {"role": "user", "content": "a <think> b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]
    prompt = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options)
    assert fast.plain is not None
    assert begins_in_reasoning(fast.plain, prompt) == template_options(options).get("thinking", True)


def test_a_continued_answer_is_behind_its_thoughts(fast: KimiTokenizerFast) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c", "reasoning": "r"}]
    text = fast.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert fast.plain is not None
    assert not begins_in_reasoning(fast.plain, fast.plain.encode_prompt(text))
    assert not begins_in_reasoning(fast.plain, [])
