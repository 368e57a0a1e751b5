"""Kimi's special tokens: 256 ids after the mergeable ranks, of which the named ones have fixed offsets."""

from __future__ import annotations

NUM_SPECIAL_TOKENS = 256

# Offset of each named token from the first special id; with the published 163,584 ranks `[BOS]` is 163584.
NAMED_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "<|media_begin|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "<think>": 22,
    "</think>": 23,
    "[UNK]": 254,
    "[PAD]": 255,
}

# The text in a message that stands for a video until its chunks are known; it is no token of the vocabulary.
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
# The placeholder of one chunk in a prompt, after its timestamp; the pad token stands for the chunk's tokens.
CHUNK_PLACE = "<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"


def special_token_ids(num_ranks: int) -> dict[str, int]:
    """Return the token id of each named special token in a vocabulary with `num_ranks` mergeable ranks."""
    return {name: num_ranks + offset for name, offset in NAMED_OFFSETS.items()}
