"""Tests of images that come in data URLs."""

from __future__ import annotations

import numpy as np
import pytest
from support.data_urls import WRITERS
from support.images import png, random_image

from k26_plugins.common.multimodal.image import MediaError
from k26_plugins.vllm.media import K26MediaConnector


@pytest.mark.parametrize("writer", WRITERS)
def test_data_urls_are_read_as_their_writers_put_them(writer: str) -> None:
    """An image in a data URL is read as each program writes such URLs. vLLM 0.19.1 hands on what its URL parser made of
    a URL, not the URL itself."""
    image = random_image(60, 40)
    found = K26MediaConnector().fetch_image(f"DATA:image/png;BASE64,{WRITERS[writer](png(image))}")
    assert np.array_equal(np.asarray(found.media), np.asarray(image))
    with pytest.raises(MediaError, match="no base64"):
        K26MediaConnector().fetch_image("data:image/png;base64,aGVsb")
    with pytest.raises(MediaError, match="no URL"):
        K26MediaConnector().fetch_image("")
