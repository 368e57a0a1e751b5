"""Tests of which frames of a video are taken and at which times, against the specification. The pixels' arithmetic is
held to transformers' own video processor in test_transformers_media.py."""

from __future__ import annotations

import io
import tracemalloc
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.videos import edited_video, make_video, variable_rate

from k26_plugins.common.multimodal.image import MediaConfig, MediaError, preprocess
from k26_plugins.common.multimodal.video import (
    VideoChunk,
    make_chunk,
    read_chunks,
    sample_frames,
    sample_times,
    timestamp,
    video_info,
)


def test_frames_are_spread_evenly() -> None:
    """The expected indices follow by hand from docs/model.md, 4.5: n = max(round(frames · min(rate, fps) / fps), 1),
    indices = round(linspace(0, frames − 1, n))."""
    assert sample_frames(30, 10, 2.0) == [0, 6, 12, 17, 23, 29]
    assert sample_frames(10, 1, 2.0) == list(range(10))
    assert sample_frames(1, 25, 2.0) == [0]
    assert sample_frames(5, 25, 2.0) == [0]
    # Python's round turns 12.5 and 2.5 frames into the nearest even number.
    assert len(sample_frames(125, 20, 2.0)) == 12
    assert len(sample_frames(25, 20, 2.0)) == 2
    assert sample_frames(300, Fraction(30000, 1001), 2.0)[:3] == [0, 16, 31]


@pytest.mark.parametrize(
    ("seconds", "mode", "text"),
    [
        (0.0, "hh:mm:ss.fff", "00:00:00.000"),
        (3725.9999, "hh:mm:ss.fff", "01:02:05.999"),
        (125.5, "mm:ss.fff", "02:05.500"),
        (3600.0, "mm:ss", "60:00"),
    ],
)
def test_timestamps(seconds: float, mode: str, text: str) -> None:
    assert timestamp(seconds, mode) == text


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
)
def test_the_frames_are_the_ones_meant(container: str, codec: str) -> None:
    """The grey of each frame tells its number."""
    data = make_video(30, 10, container=container, codec=codec)
    info = video_info(data)
    assert (info.num_frames, info.fps, info.width, info.height) == (30, Fraction(10), 64, 48)
    chunks = list(read_chunks(data, MediaConfig()))
    assert [chunk.indices for chunk in chunks] == [(0, 6, 12, 17), (23, 29)]
    # transformers' processor gives 2.299 too: as a float, 2.3 s is a little less, and further digits are cut off.
    assert [chunk.timestamp for chunk in chunks] == ["00:00:00.000", "00:00:02.299"]
    assert [chunk.grid_thw for chunk in chunks] == [(4, 4, 6), (2, 4, 6)]
    assert [chunk.num_tokens for chunk in chunks] == [6, 6]
    for chunk in chunks:
        assert np.abs(greys(chunk) - [index * 8 % 256 for index in chunk.indices]).max() < 6


@pytest.mark.parametrize(("turned", "corner"), [(0, (0, 0)), (90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))], ids=str)
def test_a_video_is_seen_as_a_player_shows_it(turned: int, corner: tuple[int, int]) -> None:
    """The black square, which lies at the upper left before turning, is in the corner to which turning brings it."""
    size = (56, 28)
    chunk = next(read_chunks(make_video(8, 2, size, turned=turned), MediaConfig()))
    _, grid_h, grid_w = chunk.grid_thw
    assert (grid_w, grid_h) == ((4, 2) if turned % 180 == 0 else (2, 4))
    last = chunk.patches.reshape(4, grid_h, grid_w, 3, 14, 14)[3].transpose(0, 3, 1, 4, 2)
    frame = last.reshape(grid_h * 14, grid_w * 14, 3)
    corners = {(y, x): frame[y, x].max() for y in (0, -1) for x in (0, -1)}
    assert [place for place, level in corners.items() if level < 12] == [corner]


def test_a_chunk_is_what_its_frames_are() -> None:
    frames = [Image.effect_noise((640, 480), 60).convert("RGB") for _ in range(3)]
    chunk = make_chunk([5, 10, 15], frames, 0.5, MediaConfig())
    patches, grids = preprocess([frames], MediaConfig(), is_video=[True])
    assert np.array_equal(chunk.patches, patches)
    assert [list(chunk.grid_thw)] == grids.tolist()
    assert chunk.prompt == "00:00:00.500<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"


def greys(chunk: VideoChunk) -> np.ndarray:
    """Return the grey of a patch in the middle of each frame of 64 × 48, away from the square and the padding."""
    return chunk.patches.reshape(len(chunk.indices), 4, 6, 3, 14, 14)[:, 2, 3].mean((1, 2, 3))


def assert_shown(data: bytes, first: int, count: int) -> None:
    """Assert that these are all frames of an even video that a player shows, ten in a second, from the encoder's frame
    `first` on."""
    info = video_info(data)
    assert (info.num_frames, info.fps) == (count, Fraction(10))
    chunks = list(read_chunks(data, MediaConfig()))
    assert [index for chunk in chunks for index in chunk.indices] == sample_frames(count, 10, 2.0)
    for chunk in chunks:
        assert chunk.timestamp == timestamp(chunk.indices[0] / 10, "hh:mm:ss.fff")
        assert np.abs(greys(chunk) - [(first + index) * 8 % 256 for index in chunk.indices]).max() < 6


@pytest.mark.parametrize(("first", "count"), [(0, 60), (12, 48), (30, 30), (55, 5), (12, 20)], ids=str)
def test_of_a_trimmed_video_the_frames_are_those_that_a_player_shows(first: int, count: int) -> None:
    """The edit list of a trimmed video keeps frames of a GOP that are decoded and not shown, or leaves whole GOPs in
    the file."""
    assert_shown(edited_video(first, count), first, count)


def test_a_trimmed_video_that_was_cut_is_refused() -> None:
    """The index stands at the beginning, as in files for the web, so it promises frames that a cut file does not
    hold."""
    data = bytearray(edited_video(12))
    start, index = data.index(b"mdat") - 4, data.index(b"moov") - 4
    moov, media = data[index:], data[start:index]
    # The chunks of media data move back by the length of the index, which now stands before them.
    at = moov.index(b"stco") + 8
    for entry in range(int.from_bytes(moov[at : at + 4])):
        place = at + 4 + 4 * entry
        moov[place : place + 4] = (int.from_bytes(moov[place : place + 4]) + len(moov)).to_bytes(4)
    whole = bytes(data[:start] + moov + media)
    assert_shown(whole, 12, 48)
    for cut in (20, 200, len(media) // 2):
        with pytest.raises(MediaError, match=r"ends after|cannot be read"):
            list(read_chunks(whole[:-cut], MediaConfig()))


def test_a_stream_that_begins_before_a_whole_frame_is_read_from_that_on() -> None:
    """The file is a piece of a broadcast: MPEG-TS packets of 188 bytes, cut off in the first of two groups of
    pictures."""
    data = make_video(60, 10, container="mpegts", codec="libx264", options={"g": "30", "bf": "0", "sc_threshold": "0"})
    with av.open(io.BytesIO(data), "r") as container:
        second = [packet.pos for packet in container.demux(video=0) if packet.size][5]
    assert second is not None
    # The stream's tables come first in every TS file; these packets are kept.
    assert_shown(data[: 188 * 3] + data[second:], 30, 30)


SCREEN = [0, 33, 66, 100, 5000, 5033, 5066, 20000, 20033, 20066, 59000, 60000]


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_a_video_of_variable_rate_is_sampled_by_time(container: str, codec: str) -> None:
    """There are twelve frames in a minute. Every chunk's time is that of its first frame, which would be wrong by the
    average rate."""
    data = variable_rate(SCREEN, container, codec)
    chunks = list(read_chunks(data, MediaConfig()))
    assert [chunk.indices for chunk in chunks] == [(0, 3, 4, 6), (7, 9, 10, 11)]
    assert [chunk.timestamp for chunk in chunks] == ["00:00:00.000", "00:00:20.000"]
    for chunk in chunks:
        assert np.abs(greys(chunk) - [index * 8 for index in chunk.indices]).max() < 6
    fewer = [index for chunk in read_chunks(data, MediaConfig(), max_frames=3) for index in chunk.indices]
    assert (fewer[0], fewer[-1]) == (0, 11)
    assert len(fewer) <= 3


@given(
    steps=st.lists(st.integers(1, 5000), max_size=60),
    sample_fps=st.sampled_from([0.1, 1.0, 2.0, 7.3]),
    max_frames=st.none() | st.integers(1, 20),
)
def test_what_a_player_shows_at_even_times(steps: list[int], sample_fps: float, max_frames: int | None) -> None:
    """The judge searches for the shown frame at every moment. There are never more frames than asked for."""
    pts = list(accumulate(steps, initial=-700))
    found = sample_times(pts, Fraction(1, 1000), sample_fps, max_frames)
    assert found == sorted(set(found))
    if max_frames is not None:
        assert len(found) <= max_frames
        return
    times = [Fraction(time - pts[0], 1000) for time in pts]
    moments = [number / Fraction(sample_fps) for number in range(int(times[-1] * Fraction(sample_fps)) + 1)]
    shown = {bisect_right(times, moment) - 1 for moment in moments}
    assert found == sorted(shown | {len(pts) - 1})


GOOD = make_video(20)
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
BAD = {
    "empty": (b"", "cannot be read"),
    "text": (b"no video at all", "cannot be read"),
    "cut": (GOOD[:-200], "cannot be read|ends after"),
    "cut-early": (GOOD[:400], "cannot be read|ends after|ends before"),
    "playlist": (PLAYLIST, "cannot be read"),
    "concat": (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_gets_one_clear_error(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(MediaError, match=message):
        list(read_chunks(data, MediaConfig()))


def test_damage_in_the_middle_is_no_crash() -> None:
    for position in range(100, len(GOOD) - 100, 97):
        damaged = GOOD[:position] + b"\xff\x00\xff\x00" * 8 + GOOD[position + 32 :]
        try:
            assert sum(len(chunk.indices) for chunk in read_chunks(damaged, MediaConfig())) > 0
        except MediaError:
            continue


def test_a_video_of_too_many_tokens_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(MediaError, match=r"takes 6 tokens \(4 frames of 64 × 48 pixels\), expected at most 5"):
        next(read_chunks(GOOD, MediaConfig(), max_tokens=5))


def test_frames_that_are_not_used_take_no_memory() -> None:
    """400 frames of 640 × 480 are 369 MB decoded; every fiftieth is used."""
    data = make_video(400, 25, (640, 480))
    config = MediaConfig(sample_fps=0.5)
    tracemalloc.start()
    chunks = 0
    for chunk in read_chunks(data, config):
        chunks += chunk.patches.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chunks == 8 * 36 * 46 * 588
    assert peak < 60_000_000
