"""Decode `data:` URLs (RFC 2397), and base64 (RFC 4648) in the variants that clients write."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from k26_plugins.common.multimodal.image import MediaError

SCHEME = "data:"
_BASE64 = ";base64"
_WHITESPACE = re.compile(rb"[ \t\r\n]+")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SHOWN = 32


def require_url(url: object) -> None:
    """Raise MediaError if `url` is not a string or is blank."""
    if not isinstance(url, str) or not url.strip():
        raise MediaError("the image or video has no URL: send an http(s) address or data:…;base64, with the file.")


def is_data_url(url: str) -> bool:
    """Return whether the URL's scheme is `data:`, in upper or lower case."""
    return url[: len(SCHEME)].lower() == SCHEME


def data_url_bytes(url: str) -> bytes:
    """Return the bytes of a `data:` URL. Raises MediaError.

    The data is base64 if the URL says so (in upper or lower case), else percent-encoded.
    """
    header, comma, data = url[len(SCHEME) :].partition(",")
    if not comma:
        raise MediaError(
            f"the URL {url[:_SHOWN]!r} has no comma before its data: write data:image/png;base64,… with the file's base64."
        )
    if header.rstrip().lower().endswith(_BASE64):
        return base64_bytes(data)
    return unquote_to_bytes(data)


def base64_bytes(text: str) -> bytes:
    """Decode base64 in the standard or the URL-safe alphabet. Raises MediaError.

    The text may contain line breaks, be percent-encoded, and lack the padding.
    """
    data = unquote_to_bytes(text) if "%" in text else text.encode("utf-8", "replace")
    data = _WHITESPACE.sub(b"", data).translate(_URL_SAFE).rstrip(b"=")
    try:
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except binascii.Error as error:
        raise MediaError(
            f"the data is no base64 ({error}): encode the file's bytes, as `base64 FILE` does, and send all of it."
        ) from error
