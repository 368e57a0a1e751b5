"""Small videos for requests, written by PyAV."""

from __future__ import annotations

import base64
import io
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
        if turned:
            stream.set_display_rotation(turned)
        for index in range(num_frames):
            pixels = np.full((size[1], size[0], 3), index * 8 % 256, dtype=np.uint8)
            pixels[: size[1] // 4, : size[0] // 4] = 0
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
