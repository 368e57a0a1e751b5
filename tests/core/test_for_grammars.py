"""Tests of the tokenizer that compilers of grammars are given. What the compilers make of it is tested in tests/vllm
and tests/sglang."""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.prompt.for_grammars import for_grammars
from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.output import MARKERS
from k26_plugins.common.prompt.special_tokens import special_token_ids


def test_control_tokens_are_no_words(tiny_folder: Path) -> None:
    tokenizer = load_hf_tokenizer(tiny_folder)
    seen = for_grammars(tokenizer)
    ids = special_token_ids(256)
    assert (seen.eos_token, seen.eos_token_id) == ("<|im_end|>", ids["<|im_end|>"])
    vocabulary = seen.get_vocab()
    assert {token_id for token_id in vocabulary.values() if token_id > 255} == {ids[name] for name in MARKERS}
    assert len(vocabulary) == 256 + len(MARKERS)


def test_the_tokenizer_itself_stays(tiny_folder: Path) -> None:
    tokenizer = load_hf_tokenizer(tiny_folder)
    seen = for_grammars(tokenizer)
    assert (tokenizer.eos_token, len(tokenizer.get_vocab())) == ("[EOS]", 512)
    text = "ü <|im_end|></think>"
    assert seen.encode(text) == tokenizer.encode(text)
    other = object()
    assert for_grammars(other) is other
