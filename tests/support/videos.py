"""Small videos for requests, written by PyAV."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np


def make_video(
    num_frames: int,
    fps: int | Fraction = 10,
    size: tuple[int, int] = (64, 48),
    container: str = "mp4",
    codec: str = "mpeg4",
    turned: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """Frame i is a plane of one grey, 8 · i mod 256, with a black square at its upper left: what one sees is which it is.

    turned: by how many degrees, counter-clockwise, a player is to turn it.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        if options:
            stream.options = options
        if turned:
            stream.set_display_rotation(turned)
        for index in range(num_frames):
            output.mux(stream.encode(_frame(index, size)))
        output.mux(stream.encode())
    return buffer.getvalue()


def edited_video(first: int, duration: int | None = None) -> bytes:
    """MP4 of 60 frames at ten in a second, one in 30 whole, whose edit list has players show `duration` of them from `first`
    on (None: all that follow), as phones trim without encoding again."""
    data = bytearray(make_video(60, codec="libx264", options={"g": "30", "bf": "0", "sc_threshold": "0"}))
    # moov/trak/edts/elst, version 0: count, then duration in the film's time scale and start in the medium's.
    entry = data.index(b"elst") + 4 + 4 + 4
    timescale = struct.unpack(">I", data[(at := data.index(b"mvhd") + 4 + 12) : at + 4])[0]
    steps = struct.unpack(">I", data[(at := data.index(b"mdhd") + 4 + 12) : at + 4])[0]
    shown = 60 - first if duration is None else duration
    data[entry : entry + 8] = struct.pack(">Ii", shown * timescale // 10, first * steps // 10)
    return bytes(data)


def variable_rate(milliseconds: Sequence[int], container: str = "mp4", codec: str = "libx264") -> bytes:
    """Frame i is `make_video`'s, shown after so many milliseconds: as a recorder of a screen writes what changes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(milliseconds):
            frame = _frame(index, (64, 48))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def _frame(index: int, size: tuple[int, int]) -> av.VideoFrame:
    pixels = np.full((size[1], size[0], 3), index * 8 % 256, dtype=np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = 0
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
