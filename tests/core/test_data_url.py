"""Tests that base64 data and `data:` URLs are read in every form in which clients write them."""

from __future__ import annotations

from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data_urls import WRITERS

from k26_plugins.common.multimodal.data_url import base64_bytes, data_url_bytes, is_data_url, require_url
from k26_plugins.common.multimodal.image import MediaError


@given(data=st.binary(max_size=300), writer=st.sampled_from(sorted(WRITERS)))
def test_every_writers_base64_is_read(data: bytes, writer: str) -> None:
    written = WRITERS[writer](data)
    assert base64_bytes(written) == data
    for head in ("data:image/png;base64,", "DATA:image/png;BASE64,", "data:;base64,", "data:image/png;name=a;base64,"):
        assert is_data_url(head + written)
        assert data_url_bytes(head + written) == data


@given(data=st.binary(max_size=300))
def test_data_without_base64_is_percent_encoded(data: bytes) -> None:
    assert data_url_bytes("data:image/png," + quote_from_bytes(data)) == data


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,aGV*bG8=", "no base64 .* encode the file"),
        ("data:image/png;base64,aGVsb", "no base64"),
        ("data:image/png;base64,aGVs=bG8=", "no base64"),
        ("data:image/png;base64,日本", "no base64"),
        ("data:image/png;base64", "no comma"),
    ],
)
def test_what_is_none_gets_a_message_that_names_the_remedy(url: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        data_url_bytes(url)


@pytest.mark.parametrize("url", [None, "", "  ", 3])
def test_no_address_is_the_clients_error(url: object) -> None:
    with pytest.raises(MediaError, match="has no URL"):
        require_url(url)
