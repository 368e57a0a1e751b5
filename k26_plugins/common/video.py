"""Videos to chunks of frames as the model sees them: which frames, their timestamps, their patches (specification 4.5).

Frames are read one after the other and cut into patches chunk by chunk: what is in memory is the file, the patches of the
frames used, and a few frames of full size.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from k26_plugins.common.media import MediaConfig, MediaError, check_size, frame_resize, patchify
from k26_plugins.common.prompt.special_tokens import CHUNK_PLACE

# As many tokens as the model has positions.
MAX_TOKENS = 262_144
# Containers that hold their own data. Playlists among ffmpeg's formats would have it open other files.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
_THREADS = 4


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What the container says of a video. Its size is that of the frames as they are stored, before they are turned."""

    num_frames: int
    fps: Fraction
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class VideoChunk:
    """Up to four frames that are encoded together."""

    indices: tuple[int, ...]
    """Of its frames in the video."""
    timestamp: str
    """Of its first frame."""
    patches: npt.NDArray[np.uint8]
    """`[t · grid_h · grid_w, 3, patch, patch]`"""
    grid_thw: tuple[int, int, int]
    num_tokens: int

    @property
    def prompt(self) -> str:
        """Its place in the prompt; the pad token in it stands for `num_tokens`."""
        return self.timestamp + CHUNK_PLACE


def video_info(data: bytes) -> VideoInfo:
    """Frames are counted by their packets, without decoding. Raises MediaError."""
    with _opened(data) as (container, stream):
        promised = stream.frames
        found = sum(1 for packet in container.demux(stream) if packet.size)
        fps = stream.average_rate or stream.guessed_rate
        width, height = stream.codec_context.width, stream.codec_context.height
    check_size(width, height, "video")
    if found == 0:
        raise MediaError("the video holds no frame: send a whole file.")
    if found < promised:
        raise MediaError(f"the video ends after {found} of {promised} frames: send a whole file.")
    if not fps or fps <= 0:
        raise MediaError("the video does not say how many frames it has in a second: convert it to MP4 or WebM.")
    return VideoInfo(found, Fraction(fps), width, height)


def sample_frames(
    num_frames: int, fps: float | Fraction, sample_fps: float, max_frames: int | None = None
) -> list[int]:
    """Indices of the frames that the model sees: evenly spread, `sample_fps` of them in a second, at least one."""
    rate = min(sample_fps, float(fps))
    count = max(round(num_frames * rate / float(fps)), 1)
    if max_frames is not None:
        count = min(count, max_frames)
    return [int(index) for index in np.linspace(0, num_frames - 1, count).round()]


def timestamp(seconds: float, mode: str) -> str:
    """`hh:mm:ss.fff` or one of the shorter modes of preprocessor_config.json; milliseconds are cut, not rounded."""
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    text = (
        f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}" if mode.startswith("hh") else f"{minutes:02d}:{rest:02d}"
    )
    return f"{text}.{int((seconds - whole) * 1000):03d}" if mode.endswith("fff") else text


def read_chunks(
    data: bytes, config: MediaConfig, max_tokens: int = MAX_TOKENS, max_frames: int | None = None
) -> Iterator[VideoChunk]:
    """The chunks of a video file, in order. Raises MediaError, before any frame is decoded where it can.

    max_tokens: a video that takes more is refused. max_frames: of a longer video so many are taken, as evenly spread.
    """
    info = video_info(data)
    indices = sample_frames(info.num_frames, info.fps, config.sample_fps, max_frames)
    groups = _groups(indices, config.temporal_merge_kernel_size)
    # A frame takes as many tokens when it is turned.
    tokens = sum(frame_resize(info.width, info.height, len(group), config).num_tokens for group in groups)
    if tokens > max_tokens:
        raise MediaError(
            f"the video takes {tokens:,} tokens ({len(indices):,} frames of {info.width} × {info.height} pixels), "
            f"expected at most {max_tokens:,}: send a shorter or a smaller one."
        )
    waiting: deque[Future[VideoChunk]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, frames in zip(groups, _in_groups(_frames(data, indices), groups), strict=True):
            waiting.append(pool.submit(make_chunk, group, frames, info.fps, config))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def make_chunk(
    indices: Sequence[int], frames: Sequence[Image.Image], fps: float | Fraction, config: MediaConfig
) -> VideoChunk:
    """One chunk of decoded frames. Raises MediaError."""
    check_size(*frames[0].size, "video")
    resize = frame_resize(*frames[0].size, len(frames), config)
    grid = (len(frames), resize.grid_h, resize.grid_w)
    time = timestamp(float(indices[0] / Fraction(fps)), config.timestamp_mode)
    return VideoChunk(tuple(indices), time, patchify(frames, resize, config), grid, resize.num_tokens)


def _groups(indices: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]


def _in_groups(frames: Iterator[Image.Image], groups: Sequence[Sequence[int]]) -> Iterator[list[Image.Image]]:
    for group in groups:
        yield [next(frames) for _ in group]


def _frames(data: bytes, indices: Sequence[int]) -> Iterator[Image.Image]:
    """The frames of these indices, which do not fall and may repeat, as RGB."""
    wanted = deque(indices)
    with _opened(data) as (container, stream):
        stream.thread_type = "AUTO"
        for position, frame in enumerate(container.decode(stream)):
            if wanted and wanted[0] == position:
                check_size(frame.width, frame.height, "video")
                image = _upright(frame)
                while wanted and wanted[0] == position:
                    wanted.popleft()
                    yield image
            if not wanted:
                return
    raise MediaError(f"the video ends before its frame {wanted[0]}: send a whole file.")


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Turned as a player shows it, where its container says so: in quarters, counter-clockwise."""
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
