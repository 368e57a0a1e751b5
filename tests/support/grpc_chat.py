"""Asks SGLang's gRPC service for a chat completion; the service carries the HTTP API's JSON as bytes."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from typing import Any

from support.server import Server

HAS_GRPC = find_spec("sglang.srt.rust_extensions") is not None
_CHAT = "/sglang.runtime.v1.SglangService/ChatComplete"


def chat_by_grpc(server: Server, **body: Any) -> dict[str, Any]:
    """Return the answer to a chat completion that is not streamed. body: the fields of the HTTP API's request."""
    import grpc

    address = re.search(r"gRPC server started on (\S+)", server.log.read_text())
    assert address is not None, "the server says of no gRPC service"
    request = json.dumps({"model": server.model, **body}).encode()
    with grpc.insecure_channel(address[1]) as channel:
        call = channel.unary_stream(_CHAT, request_serializer=_field_1, response_deserializer=bytes)
        sent = b"".join(call(request, timeout=120))
    # The protobuf framing around the JSON is of no interest here.
    answer: dict[str, Any] = json.loads(sent[sent.index(b"{") : sent.rindex(b"}") + 1])
    return answer


def _field_1(content: bytes) -> bytes:
    """Return a protobuf message whose first field is `content`."""
    length, size = b"", len(content)
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return b"\x0a" + length + bytes([size]) + content
