"""Tests of the tokenizer that SGLang gets for this model, without its `tiktoken.model`, and for another model."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.sameness import TEXTS, recorded
from support.sglang_parts import hf_utils

from k26_plugins.common.prompt.hf_tokenizer import KimiTokenizerFast


def test_token_ids_are_those_of_vllm(tiny_folder: Path) -> None:
    tokenizer = hf_utils().get_tokenizer(str(tiny_folder), trust_remote_code=False)
    assert isinstance(tokenizer, KimiTokenizerFast)
    for text in TEXTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids == recorded()["prompts"][text]


def test_another_models_tokenizer_is_sglangs(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert not isinstance(hf_utils().get_tokenizer(str(tmp_path)), KimiTokenizerFast)


def test_a_tokenizer_json_alone_is_left_to_sglang(tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint with a `tokenizer.json` alone is left to SGLang; beside `tiktoken.model` a `tokenizer.json` changes
    nothing."""
    folder = tmp_path / "DIR"
    shutil.copytree(tiny_folder, folder)
    settings = (folder / "tokenizer_config.json").read_text()
    save_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(settings)
    assert isinstance(hf_utils().get_tokenizer(str(folder)), KimiTokenizerFast)
    (folder / "tiktoken.model").unlink()
    save_tokenizer(folder)
    assert not isinstance(hf_utils().get_tokenizer(str(folder)), KimiTokenizerFast)


def save_tokenizer(folder: Path) -> None:
    """Write transformers' files of a tokenizer that knows one word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(folder)


@pytest.mark.skipif(find_spec("transformers.models.kimi_k25") is None, reason="this transformers has no such classes")
def test_prompts_and_images_can_be_left_to_sglang(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K26_PROMPTS=engine leaves only the tokenizer to SGLang, and K26_MEDIA=engine only the processor; neither needs
    code of the checkpoint."""
    utils = hf_utils()
    monkeypatch.setenv("K26_PROMPTS", "engine")
    assert not isinstance(utils.get_tokenizer(str(tiny_folder)), KimiTokenizerFast)
    assert type(utils.get_processor(str(tiny_folder))).__module__ == "k26_plugins.sglang.processor"
    monkeypatch.delenv("K26_PROMPTS")
    monkeypatch.setenv("K26_MEDIA", "engine")
    processor = utils.get_processor(str(tiny_folder))
    assert type(processor).__module__.startswith("transformers.")
    assert isinstance(processor.tokenizer, KimiTokenizerFast)
