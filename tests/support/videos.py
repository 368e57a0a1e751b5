"""Makes small videos for requests, with PyAV."""

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
    """Return a video file whose frames can be told apart by their grey.

    Frame i is a plane of the grey 8 · i mod 256 with a black rectangle at its upper left. size: width and height.
    turned: by how many degrees, counter-clockwise, a player is to turn the picture. options: those of the codec.
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
    """Return an MP4 whose edit list has players show a part of its 60 frames, as phones trim without encoding again.

    The video has ten frames a second, and every 30th is a key frame. Players show `duration` frames from frame `first`
    on; None: all that follow.
    """
    data = bytearray(make_video(60, codec="libx264", options={"g": "30", "bf": "0", "sc_threshold": "0"}))
    # The edit list is moov/trak/edts/elst of version 0: a count, then for each entry the duration in the movie's time
    # scale and the start in the track's.
    entry = data.index(b"elst") + 4 + 4 + 4
    timescale = struct.unpack(">I", data[(at := data.index(b"mvhd") + 4 + 12) : at + 4])[0]
    steps = struct.unpack(">I", data[(at := data.index(b"mdhd") + 4 + 12) : at + 4])[0]
    shown = 60 - first if duration is None else duration
    data[entry : entry + 8] = struct.pack(">Ii", shown * timescale // 10, first * steps // 10)
    return bytes(data)


def variable_rate(milliseconds: Sequence[int], container: str = "mp4", codec: str = "libx264") -> bytes:
    """Return a video whose frame i, the same as `make_video`'s, is shown at `milliseconds[i]`.

    Screen recorders write such videos, with a frame whenever the picture changes.
    """
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
    """Return the part of a chat message that holds this file as a video."""
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
