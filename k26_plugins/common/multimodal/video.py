"""Turn a video into the chunks of frames that the model sees (docs/model.md, 4.5).

The module chooses the frames and makes their timestamps and patches. Frames are decoded one after the other and cut
into patches chunk by chunk. Memory holds only the file, the patches of the chosen frames, and a few frames of full
size. Times count from the first frame that a player shows.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from k26_plugins.common.multimodal.image import MediaConfig, MediaError, check_size, frame_resize, patchify
from k26_plugins.common.prompt.special_tokens import CHUNK_PLACE

# The model has this many positions, so no video may have more tokens.
MAX_TOKENS = 262_144
# Containers that hold their own data. Others of ffmpeg's formats are playlists, which make it open other files.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
_THREADS = 4


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The container's description of a video.

    The size is that of the frames as they are stored, before they are rotated.
    """

    num_frames: int
    """Number of frames that a player shows."""
    fps: Fraction
    width: int
    height: int
    pts: tuple[int, ...] | None
    """The times of the frames in the order in which they are shown; None if the container has none (AVI)."""
    time_base: Fraction
    """Seconds of one unit of `pts`."""
    constant_rate: bool
    """Whether every frame is shown less than half a frame's duration from its time at the constant rate `fps`.

    Timestamps that the container rounded stay within that.
    """

    def seconds(self, index: int) -> float:
        """Return the seconds after which frame `index` is shown."""
        if self.pts is None or self.constant_rate:
            return float(index / self.fps)
        return float((self.pts[index] - self.pts[0]) * self.time_base)


class _Packet(NamedTuple):
    """A packet of the container without its data."""

    pts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool


@dataclass(frozen=True, slots=True)
class VideoChunk:
    """Up to four frames that the vision tower encodes together."""

    indices: tuple[int, ...]
    """Indices of its frames in the video, from 0."""
    timestamp: str
    """The time of its first frame, as text."""
    patches: npt.NDArray[np.uint8]
    """uint8 `[t · grid_h · grid_w, 3, patch, patch]`, not normalized."""
    grid_thw: tuple[int, int, int]
    """Number of frames, and of rows and columns of patches."""
    num_tokens: int

    @property
    def prompt(self) -> str:
        """The chunk's text in the prompt; the pad token in it stands for `num_tokens` tokens."""
        return self.timestamp + CHUNK_PLACE


def video_info(data: bytes) -> VideoInfo:
    """Read the container's description of a video.

    Raises MediaError. Frames are counted by their packets, without decoding.
    """
    with _opened(data) as (container, stream):
        promised = stream.frames
        packets = [
            _Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
            for packet in container.demux(stream)
            if packet.size and not packet.is_corrupt
        ]
        # The frame count in an MP4 header includes frames that its edit list cuts away; the duration does not.
        kept = stream.duration if "mp4" in container.format.name else None
        fps, time_base = (
            Fraction(rate or 0) for rate in (stream.average_rate or stream.guessed_rate, stream.time_base)
        )
        width, height = stream.codec_context.width, stream.codec_context.height
    check_size(width, height, "video")
    shown = _shown(packets)
    if not shown:
        raise MediaError("the video holds no frame: send a whole file.")
    if len(packets) < promised and not (kept and _fill(shown, kept)):
        raise MediaError(f"the video ends after {len(packets)} of {promised} frames: send a whole file.")
    found = [packet.pts for packet in shown if packet.pts is not None]
    pts = tuple(sorted(found)) if time_base and len(found) == len(shown) else None
    if fps <= 0:
        if pts is None or pts[0] == pts[-1]:
            raise MediaError("the video does not say how many frames it has in a second: convert it to MP4 or WebM.")
        fps = (len(pts) - 1) / ((pts[-1] - pts[0]) * time_base)
    even = pts is None or _constant_rate(pts, fps * time_base)
    return VideoInfo(len(shown), fps, width, height, pts, time_base, even)


def _constant_rate(pts: Sequence[int], frames: Fraction) -> bool:
    """Return whether the times have a constant rate of `frames` per unit of time.

    Each time may deviate from that rate by less than half a frame's duration.
    """
    # Whole numbers are faster than fractions: an hour of video has 100,000 frames.
    return all(
        2 * abs(frames.numerator * (time - pts[0]) - frames.denominator * index) < frames.denominator
        for index, time in enumerate(pts)
    )


def _shown(packets: Sequence[_Packet]) -> list[_Packet]:
    """Return the packets that players show.

    Left out are packets that the container marks as decode-only (an edit list), and those before the first keyframe,
    which no decoder can decode (a stream that was cut).
    """
    first = next((index for index, packet in enumerate(packets) if packet.is_keyframe), 0)
    return [packet for packet in packets[first:] if not packet.is_discard]


def _fill(shown: Sequence[_Packet], duration: int) -> bool:
    """Return whether these packets take up the video's whole duration.

    Half a frame may be missing, because containers round the duration.
    """
    return sum(packet.duration for packet in shown) >= duration - duration / len(shown) / 2


def sample_frames(
    num_frames: int, fps: float | Fraction, sample_fps: float, max_frames: int | None = None
) -> list[int]:
    """Return the indices of the frames that the model sees of a video of constant rate.

    They are evenly spread, `sample_fps` for each second, at least one and at most `max_frames`.
    """
    rate = min(sample_fps, float(fps))
    count = max(round(num_frames * rate / float(fps)), 1)
    if max_frames is not None:
        count = min(count, max_frames)
    return [int(index) for index in np.linspace(0, num_frames - 1, count).round()]


def sample_times(
    pts: Sequence[int], time_base: Fraction, sample_fps: float, max_frames: int | None = None
) -> list[int]:
    """Return the indices of the frames that the model sees of a video of variable rate.

    They are the frames that a player shows at every multiple of `1 / sample_fps` seconds, each once, and the last
    frame. If these are more than `max_frames`, the moments are spread further apart.
    """

    def at(rate: Fraction) -> list[int]:
        # For each frame, the index of the first moment at or after its time. Only the last of the frames with the same
        # index is seen.
        steps = time_base * rate
        moments = [-(-(time - pts[0]) * steps.numerator // steps.denominator) for time in pts]
        return [index for index in range(len(pts)) if index + 1 == len(pts) or moments[index] < moments[index + 1]]

    found = at(Fraction(sample_fps))
    if max_frames is None or len(found) <= max_frames:
        return found
    if max_frames == 1 or pts[0] == pts[-1]:
        return [0]
    return at((max_frames - 1) / ((pts[-1] - pts[0]) * time_base))


def timestamp(seconds: float, mode: str) -> str:
    """Format seconds in a mode of preprocessor_config.json, `hh:mm:ss.fff` or a shorter one.

    Milliseconds are truncated, not rounded.
    """
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    text = (
        f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}" if mode.startswith("hh") else f"{minutes:02d}:{rest:02d}"
    )
    return f"{text}.{int((seconds - whole) * 1000):03d}" if mode.endswith("fff") else text


def read_chunks(
    data: bytes, config: MediaConfig, max_tokens: int = MAX_TOKENS, max_frames: int | None = None
) -> Iterator[VideoChunk]:
    """Yield the chunks of a video file in order. Raises MediaError, if possible before any frame is decoded.

    max_tokens: a video that takes more tokens is refused. max_frames: of a longer video, only so many frames are taken,
    evenly spread.
    """
    info = video_info(data)
    if info.pts is None or info.constant_rate:
        indices = sample_frames(info.num_frames, info.fps, config.sample_fps, max_frames)
    else:
        indices = sample_times(info.pts, info.time_base, config.sample_fps, max_frames)
    groups = _groups(indices, config.temporal_merge_kernel_size)
    # Rotating a frame does not change its number of tokens.
    tokens = sum(frame_resize(info.width, info.height, len(group), config).num_tokens for group in groups)
    if tokens > max_tokens:
        raise MediaError(
            f"the video takes {tokens:,} tokens ({len(indices):,} frames of {info.width} × {info.height} pixels), "
            f"expected at most {max_tokens:,}: send a shorter or a smaller one."
        )
    waiting: deque[Future[VideoChunk]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, frames in zip(groups, _in_groups(_frames(data, info, indices), groups), strict=True):
            waiting.append(pool.submit(make_chunk, group, frames, info.seconds(group[0]), config))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def make_chunk(
    indices: Sequence[int], frames: Sequence[Image.Image], seconds: float, config: MediaConfig
) -> VideoChunk:
    """Build a chunk from decoded frames, the first of which is shown after `seconds`. Raises MediaError."""
    check_size(*frames[0].size, "video")
    resize = frame_resize(*frames[0].size, len(frames), config)
    grid = (len(frames), resize.grid_h, resize.grid_w)
    time = timestamp(seconds, config.timestamp_mode)
    return VideoChunk(tuple(indices), time, patchify(frames, resize, config), grid, resize.num_tokens)


def _groups(indices: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]


def _in_groups(frames: Iterator[Image.Image], groups: Sequence[Sequence[int]]) -> Iterator[list[Image.Image]]:
    for group in groups:
        yield [next(frames) for _ in group]


def _frames(data: bytes, info: VideoInfo, indices: Sequence[int]) -> Iterator[Image.Image]:
    """Yield the frames of these ascending indices as RGB images.

    If a decoder does not return a frame, the next one takes its place.
    """
    wanted = deque(indices)
    last, position = None, -1
    with _opened(data) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            position += 1
            if info.pts is not None and frame.pts is not None:
                position = bisect_left(info.pts, frame.pts)
            last = frame
            if wanted[0] <= position:
                image = _image(frame)
                while wanted and wanted[0] <= position:
                    wanted.popleft()
                    yield image
                if not wanted:
                    return
    # The last packets may give no frame of their own (VP8's hidden references): then the last frame stands for them.
    if last is None or len(wanted) > 1:
        raise MediaError(f"the video ends before its frame {wanted[0]}: send a whole file.")
    yield _image(last)


def _image(frame: av.VideoFrame) -> Image.Image:
    check_size(frame.width, frame.height, "video")
    return _upright(frame)


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Rotate a frame as a player shows it, counter-clockwise by the quarter turns that its container asks for."""
    pixels = frame.to_ndarray(format="rgb24")
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(io.BytesIO(data), mode="r", options=_OPTIONS) as container:
            if not container.streams.video:
                raise MediaError("the file holds no video: send MP4 or WebM.")
            if container.streams.video[0].codec_context is None:
                raise MediaError("the video is in a codec that is not known: convert it to MP4 or WebM.")
            yield container, container.streams.video[0]
    except (av.FFmpegError, ValueError, IndexError, EOFError) as error:
        if isinstance(error, MediaError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"the video cannot be read ({reason}): send a whole MP4 or WebM file.") from error
