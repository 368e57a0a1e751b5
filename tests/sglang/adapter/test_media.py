"""Tests of an image's pixels as SGLang's own processors give them, against digests recorded from vLLM's processor."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sameness import SIZES, image_of, media_line, recorded
from support.sglang_parts import hf_utils
from support.videos import make_video

from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.sglang import compat


def test_pixels_are_those_of_vllm(tiny_folder: Path) -> None:
    """The processor comes from SGLang's own `get_processor` and is called as SGLang's code for this model calls it."""
    processor = hf_utils().get_processor(str(tiny_folder), trust_remote_code=False)
    for size in SIZES:
        image = image_of(size)
        medias = [{"type": "image", "image": image}]
        count = processor.media_processor.media_tokens_calculator(medias[0])
        found = processor(text=["<|media_pad|>" * count], medias=medias, padding=True, return_tensors="pt")
        assert found["input_ids"].tolist() == [[277] * count]
        line = media_line(found["pixel_values"], found["grid_thws"][0])
        assert line == recorded()["media"][f"{size[0]}x{size[1]}"]


@pytest.fixture(scope="module")
def media_processor(tiny_folder: Path) -> Any:
    """Return the media processor that SGLang chooses for this model, built as its tokenizer manager builds it.

    It is made once, because a second import of the packages in one process would leave SGLang's own class in front.
    """
    from sglang.srt.managers import multimodal_processor
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(model_path=str(tiny_folder), device="cpu")
    set_global_server_args_for_scheduler(arguments)
    multimodal_processor.import_processors("sglang.srt.multimodal.processors")
    multimodal_processor.import_processors(os.environ[compat.MEDIA_VARIABLE], overwrite=True)
    processor = hf_utils().get_processor(str(tiny_folder), trust_remote_code=False)
    config = hf_utils().get_config(str(tiny_folder), trust_remote_code=False)
    return multimodal_processor.get_mm_processor(config, arguments, processor, None)


def test_sglangs_media_class_takes_the_core_s_pixels_on_any_device(
    media_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the plugin, SGLang's class would decode and resize images on a GPU, with other arithmetic."""
    assert not media_processor.gpu_image_decode
    if not hasattr(media_processor._processor, "_gpu_call"):
        pytest.skip("SGLang 0.5.10 has no GPU preprocessing for this model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = media_processor._processor(text=["a<|media_pad|>b"], images=[image_of((640, 480))])
    assert media_line(found["pixel_values"], found["image_grid_thw"][0]) == recorded()["media"]["640x480"]


def test_a_video_s_chunks_stand_among_the_prompt_s_tokens(media_processor: Any) -> None:
    """Every release hands videos to this class, and KTransformers' fork keeps other attributes than SGLang does.

    A video of 4 seconds at two frames a second has 8 frames, which are two chunks of four.
    """
    prompt = "a<|media_begin|>video<|media_content|><|media_pad|><|media_end|>b"
    request = SimpleNamespace(video_data=[make_video(40, fps=10)])
    found = asyncio.run(media_processor.process_mm_data_async([], prompt, request, max_req_input_len=4096))
    token_ids = found["input_ids"] if isinstance(found, dict) else found.input_ids
    text = media_processor._processor.tokenizer.decode(token_ids)
    assert re.fullmatch(
        r"a(00:00:0[02]\S*<\|media_begin\|>video<\|media_content\|>(<\|media_pad\|>)+<\|media_end\|>){2}b", text
    ), text


def test_another_media_package_of_the_user_s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compat.MEDIA_VARIABLE, "theirs")
    with pytest.raises(UnsupportedEngineError, match=r"SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE is 'theirs'"):
        compat.register_media(Registration(), "k26_plugins.sglang.media")
