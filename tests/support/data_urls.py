"""Encodes bytes as base64 in each of the ways in which programs write it into `data:` URLs."""

from __future__ import annotations

import base64
import textwrap
from urllib.parse import quote

WRITERS = {
    "plain": lambda data: base64.b64encode(data).decode(),
    "lines of 76, as GNU base64": lambda data: textwrap.fill(base64.b64encode(data).decode(), 76) + "\n",
    "lines of Windows": lambda data: "\r\n".join(textwrap.wrap(base64.b64encode(data).decode(), 64)),
    "percent-encoded": lambda data: quote(base64.b64encode(data).decode(), safe=""),
    "URL-safe": lambda data: base64.urlsafe_b64encode(data).decode(),
    "without padding": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
}
