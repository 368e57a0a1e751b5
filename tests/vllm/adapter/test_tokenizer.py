"""Tests of the tokenizer that vLLM gets, and of when prompts are left to vLLM's own."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from k26_plugins.common.prompt.hf_tokenizer import core_serves_prompts


def test_a_token_that_vllm_adds_is_one_token(tiny_folder: Path) -> None:
    """vLLM marks the place of embeddings in a chat with a token that it adds. It copies the tokenizer and keeps the
    length that the tokenizer had before, but the token must be one id all the same."""
    from k26_plugins.vllm.tokenizer import K26Tokenizer

    tokenizer = copy.copy(K26Tokenizer.from_pretrained(tiny_folder))
    length = len(tokenizer)
    assert len(tokenizer.encode("a<place>", add_special_tokens=False)) == 8
    tokenizer.add_special_tokens({"additional_special_tokens": ["<place>"]})
    for one in (tokenizer, copy.deepcopy(tokenizer)):
        assert one.encode("a<place>", add_special_tokens=False) == [ord("a"), length]


def test_a_tokenizer_json_alone_is_left_to_vllm(tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint with a `tokenizer.json` alone is left to vLLM; beside `tiktoken.model` a `tokenizer.json` changes
    nothing."""
    folder = tmp_path / "DIR"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert core_serves_prompts(folder)
    (folder / "tiktoken.model").unlink()
    assert not core_serves_prompts(folder)
    (folder / "tokenizer.json").unlink()
    assert core_serves_prompts(folder)  # and reports the missing `tiktoken.model` in one clear error
