"""Tests of videos put among token ids, against the ids of the same prompt completed as text and tokenized
afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k26_plugins.common.prompt.chat import render
from k26_plugins.common.prompt.hf_tokenizer import KimiTokenizerFast, load_hf_tokenizer
from k26_plugins.common.prompt.places import media_kinds, place_videos
from k26_plugins.common.prompt.special_tokens import CHUNK_PLACE, VIDEO_PLACEHOLDER
from k26_plugins.common.prompt.tokenizer import KimiTokenizer


@pytest.fixture(scope="module")
def fast(tiny_folder: Path) -> KimiTokenizerFast:
    return load_hf_tokenizer(tiny_folder, video_place=CHUNK_PLACE)


TEXTS = st.one_of(st.text(max_size=6), st.sampled_from(["12", "1", ":", "00:", VIDEO_PLACEHOLDER, CHUNK_PLACE, "é"]))
PARTS = st.lists(st.one_of(st.sampled_from(["image", "video"]), TEXTS), min_size=1, max_size=6)


@given(PARTS, st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_as_if_the_prompt_had_been_completed_first(
    fast: KimiTokenizerFast, tiny_folder: Path, parts: list[str], chunks: int
) -> None:
    content = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}]
    prompts = [f"00:00:{number:02d}.000{CHUNK_PLACE}" for number in range(chunks)]
    count = parts.count("video")
    expected = KimiTokenizer(tiny_folder).encode_prompt(render(messages).replace(VIDEO_PLACEHOLDER, "".join(prompts)))
    token_ids = fast.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert media_kinds(token_ids, fast) == [part for part in parts if part in ("image", "video")]
    assert place_videos(token_ids, [prompts] * count, fast) == expected


def test_another_number_of_videos_is_refused(fast: KimiTokenizerFast) -> None:
    with pytest.raises(ValueError, match="0 places for videos and 1 videos"):
        place_videos([1, 2], [["x"]], fast)


def test_a_placeholder_out_of_place_is_refused(fast: KimiTokenizerFast) -> None:
    pad = fast.convert_tokens_to_ids("<|media_pad|>")
    with pytest.raises(ValueError, match="not where the chat template puts it"):
        media_kinds([pad], fast)
