"""Tests of the tokenizer and of chat rendering. The judges are the specification's facts, the tiktoken library and
transformers."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k26_plugins.common.model.config import K26Config
from k26_plugins.common.prompt.chat import expand_media_placeholders, render
from k26_plugins.common.prompt.control_tokens import MARK, QUOTED_SIGN
from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.special_tokens import NAMED_OFFSETS, special_token_ids
from k26_plugins.common.prompt.tokenizer import KimiTokenizer, TokenizerError
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny


@pytest.fixture(scope="module")
def full_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with as many tokens as the published one; its merge ranks are made up, its special ids are
    real."""
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    sizes = TinySizes(vocab_size=163840, hidden_size=64, layers=2, vision_layers=1, experts=2, moe_intermediate_size=32)
    make_tiny(folder, sizes)
    return folder


@pytest.fixture(scope="module")
def plain(full_vocabulary: Path) -> KimiTokenizer:
    return KimiTokenizer(full_vocabulary)


def test_a_list_of_ids_is_a_token_each(full_vocabulary: Path) -> None:
    """Each id of a flat list is decoded by itself, because SGLang's fork asks in this way for the texts of
    log-probabilities."""
    fast = load_hf_tokenizer(full_vocabulary)
    first, second = 163586, 163606
    assert fast.batch_decode([first, second]) == ["<|im_end|>", "<think>"]
    assert fast.batch_decode([[first, second], [second]]) == ["<|im_end|><think>", "<think>"]


def test_special_tokens_have_the_published_ids(full_vocabulary: Path) -> None:
    ids = special_token_ids(163584)
    published = {
        "[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587, "<|im_assistant|>": 163588,
        "<|start_header_id|>": 163590, "<|end_header_id|>": 163591, "[EOT]": 163593, "<|im_system|>": 163594,
        "<|tool_calls_section_begin|>": 163595, "<|tool_calls_section_end|>": 163596, "<|tool_call_begin|>": 163597,
        "<|tool_call_argument_begin|>": 163598, "<|tool_call_end|>": 163599, "<|im_middle|>": 163601,
        "<|media_begin|>": 163602, "<|media_content|>": 163603, "<|media_end|>": 163604, "<|media_pad|>": 163605,
        "<think>": 163606, "</think>": 163607, "[UNK]": 163838, "[PAD]": 163839,
    }  # fmt: skip
    assert ids == published
    tokenizer = load_hf_tokenizer(full_vocabulary)
    for name, token_id in published.items():
        assert tokenizer.convert_tokens_to_ids(name) == token_id
    assert tokenizer.convert_tokens_to_ids("<|reserved_token_163600|>") == 163600
    assert len(tokenizer) == 163840


def test_both_tokenizers_give_the_same_ids(full_vocabulary: Path, plain: KimiTokenizer) -> None:
    """The tokenizers library, which answers where offsets are asked for, gives the same ids as the tiktoken library on
    strings that exercise every branch of the split pattern, control tokens and marks."""
    fast = load_hf_tokenizer(full_vocabulary)
    rng = random.Random(0)
    alphabet = [
        *"abcXYZ éÜß中文字漢 \n\r\t'’s12345.,!?-—😀ñज्ञ한국어あカǅ\u0301ʰ'll'RE<>|",
        *NAMED_OFFSETS,
        MARK,
        QUOTED_SIGN,
    ]
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))
        both = fast(text, add_special_tokens=False, return_offsets_mapping=True)
        assert both["input_ids"] == fast.encode(text, add_special_tokens=False) == plain.encode_prompt(text), text
        assert plain.decode(plain.encode(text)) == text


def test_the_fast_tokenizer_answers_as_transformers_does(full_vocabulary: Path) -> None:
    """The fast tokenizer answers as transformers does whatever is asked for beside the ids. The judge is the class that
    ours overrides."""
    fast = load_hf_tokenizer(full_vocabulary)
    judge = pickle.loads(pickle.dumps(fast))
    judge.plain = None
    text = "Hello <|im_end|> wörld, this is a longer text"
    for side in ("left", "right"):
        fast.truncation_side = judge.truncation_side = side
        for asked in (
            {}, {"truncation": True, "max_length": 5}, {"truncation": True, "max_length": 500}, {"return_tensors": "pt"},
            {"return_attention_mask": False}, {"padding": "max_length", "max_length": 70}, {"return_length": True},
            {"add_special_tokens": False}, {"return_offsets_mapping": True}, {"text_pair": "and more"},
        ):  # fmt: skip
            ours, theirs = fast(text, **asked), judge(text, **asked)
            assert list(ours) == list(theirs)
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), asked
        for asked in ({}, {"truncation": True, "max_length": 3}, {"padding": True, "return_tensors": "np"}):
            ours, theirs = fast([text, "b"], **asked), judge([text, "b"], **asked)
            assert [list(map(list, ours[name])) for name in theirs] == [
                list(map(list, theirs[name])) for name in theirs
            ]
    for tokenizer in (fast, judge):
        tokenizer.add_tokens(["<added>"])
    assert fast.encode("a<added>b") == judge.encode("a<added>b")


@pytest.mark.parametrize(
    "text", [" " * 1_000_000, "a" * 60_000, " " * 25_001 + "b" * 25_000, "ab " * 140_000, "\n" * 25_000 + "x"], ids=len
)
def test_a_text_of_any_length_is_encoded(plain: KimiTokenizer, text: str) -> None:
    """The text is cut where the published tokenizer cuts it, because the tiktoken library gives up at a million spaces.
    The test repeats the published rule character by character."""
    pieces = [""]
    for index, character in enumerate(text):
        if index % 400_000 == 0:
            pieces.append("")
            run = 0
        run = run + 1 if run and character.isspace() == text[index - 1].isspace() else 1
        if run > 25_000:
            pieces.append("")
            run = 1
        pieces[-1] += character
    assert plain.encode(text) == [token_id for piece in pieces for token_id in plain.encode(piece)]


def test_control_tokens_in_text_stay_text_by_default(tiny_folder: Path) -> None:
    tokenizer = KimiTokenizer(tiny_folder)
    assert 258 not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode_prompt("a<|im_end|>b") == [97, 258, 98]
    assert tokenizer.decode([97, 258, 98]) == "a<|im_end|>b"


def test_files_of_two_models_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"gives 512 tokens and config\.json 163840"):
        KimiTokenizer(tiny_folder).check(K26Config())
    with pytest.raises(TokenizerError, match="cannot be read"):
        KimiTokenizer(tmp_path)
    for content in ("YQ==", "YQ== 5\n", "!!! 0\n", ""):
        (tmp_path / "tiktoken.model").write_text(content)
        with pytest.raises(TokenizerError, match="damaged"):
            KimiTokenizer(tmp_path)


USER = {"role": "user", "content": "Hi"}


def test_a_turn_is_rendered_as_specified() -> None:
    assert render([USER]) == "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    assert render([USER], thinking=False).endswith("<|im_middle|><think></think>")
    assert render([USER], add_generation_prompt=False).endswith("Hi<|im_end|>")
    assert render([{"role": "system", "content": "S", "name": "n"}, USER]).startswith(
        "<|im_system|>n<|im_middle|>S<|im_end|>"
    )


def test_media_are_followed_by_a_newline() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    video = {"type": "video_url", "video_url": {"url": "data:"}}
    text = {"type": "text", "text": "What?"}
    assert "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\nWhat?" in render(
        [{"role": "user", "content": [image, text]}]
    )
    assert "<|kimi_k25_video_placeholder|>\nWhat?" in render([{"role": "user", "content": [video, text]}])


def test_thinking_of_past_answers() -> None:
    """Reasoning is dropped up to the last answer without tool calls, kept after it, and kept everywhere on demand."""
    call = {"id": "functions.f:0", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "old", "reasoning": "R1"},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "R2", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "42"},
    ]
    text = render(messages)
    assert "<think></think>old<|im_end|>" in text
    assert (
        "<think>R2</think><|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"a":1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>tool<|im_middle|>## Return of functions.f:0\n42<|im_end|>"
    ) in text
    assert "<think>R1</think>old" in render(messages, preserve_thinking=True)


def test_placeholders_expand_in_order() -> None:
    assert expand_media_placeholders([1, 9, 2, 9], [2, 3], 9) == [1, 9, 9, 2, 9, 9, 9]
    with pytest.raises(ValueError, match="2 places for media and 1 media"):
        expand_media_placeholders([9, 9], [1], 9)
