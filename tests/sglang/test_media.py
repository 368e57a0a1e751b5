"""Tests of a request's images and videos on their way to the processor, against PIL.

tests/sglang/adapter/test_media.py compares the processor's own pixels with vLLM's.
"""

from __future__ import annotations

import numpy as np
import pytest
from sglang.srt.managers.schedule_batch import Modality
from support.conversations import conversations, media_parts, part_bytes
from support.images import pil_rgb
from support.videos import make_video

from k26_plugins.common.multimodal.image import MediaConfig, MediaError
from k26_plugins.common.multimodal.video import read_chunks
from k26_plugins.sglang.media.kimi_k26 import K26MediaProcessor


def test_images_of_every_format_are_pils_rgb() -> None:
    parts = [part for one in conversations() for part in media_parts(one) if part["type"] == "image_url"]
    assert len(parts) > 50
    for part in parts:
        loaded = K26MediaProcessor._load_single_item(part["image_url"]["url"], Modality.IMAGE)
        assert np.array_equal(np.asarray(getattr(loaded, "image", loaded)), np.asarray(pil_rgb(part_bytes(part))))


def test_chunks_of_a_video_pass_as_images_with_a_digest_of_their_own() -> None:
    chunks = list(read_chunks(make_video(50), MediaConfig()))
    loaded = [K26MediaProcessor._load_single_item(chunk, Modality.IMAGE) for chunk in chunks]
    assert [getattr(one, "image", one) for one in loaded] == chunks
    if hasattr(loaded[0], "content_digest"):
        assert len({one.content_digest for one in loaded}) == len(chunks)


def test_a_damaged_image_is_a_clients_error() -> None:
    with pytest.raises(MediaError, match="no image"):
        K26MediaProcessor._load_single_item("data:image/png;base64,aGVsbG8=", Modality.IMAGE)
