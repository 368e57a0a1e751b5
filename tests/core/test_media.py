"""Tests of image preprocessing against the specification's table. Equality with an engine's bytes is tested in
tests/vllm."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from k26_plugins.common.multimodal.image import (
    MediaConfig,
    MediaError,
    frame_resize,
    navit_resize,
    normalize,
    open_image,
    preprocess,
)

# From docs/model.md, 4.4: width, height → resized width, height, grid h, w, tokens.
IMAGES = [
    ((1, 1), (1, 1), (2, 2), 1),
    ((28, 28), (28, 28), (2, 2), 1),
    ((50, 50), (50, 50), (4, 4), 4),
    ((224, 224), (224, 224), (16, 16), 64),
    ((640, 480), (640, 480), (36, 46), 414),
    ((1024, 768), (1024, 768), (56, 74), 1036),
    ((1280, 720), (1280, 720), (52, 92), 1196),
    ((1920, 1080), (1920, 1080), (78, 138), 2691),
    ((2048, 2048), (1795, 1795), (130, 130), 4225),
    ((3000, 3000), (1794, 1794), (130, 130), 4225),
    ((3840, 2160), (2392, 1345), (98, 172), 4214),
    ((7168, 7168), (1792, 1792), (128, 128), 4096),
    ((10000, 100), (7168, 71), (6, 512), 768),
    ((8000, 20), (7168, 17), (2, 512), 256),
]
FRAMES = [
    ((1280, 720), (1202, 676), (50, 86), 1075),
    ((1920, 1080), (1196, 672), (48, 86), 1032),
    ((2048, 2048), (897, 897), (66, 66), 1089),
    ((3840, 2160), (1196, 672), (48, 86), 1032),
]


@pytest.mark.parametrize(("size", "resized", "grid", "num_tokens"), IMAGES, ids=str)
def test_images_resize_as_specified(
    size: tuple[int, int], resized: tuple[int, int], grid: tuple[int, int], num_tokens: int
) -> None:
    found = navit_resize(*size, MediaConfig())
    assert ((found.width, found.height), (found.grid_h, found.grid_w), found.num_tokens) == (resized, grid, num_tokens)


@pytest.mark.parametrize(("size", "resized", "grid", "num_tokens"), FRAMES, ids=str)
def test_video_frames_resize_as_specified(
    size: tuple[int, int], resized: tuple[int, int], grid: tuple[int, int], num_tokens: int
) -> None:
    found = frame_resize(*size, 4, MediaConfig())
    assert ((found.width, found.height), (found.grid_h, found.grid_w), found.num_tokens) == (resized, grid, num_tokens)


def test_patches_are_where_the_pixels_were() -> None:
    """Pixel (y, x) of channel c is in patch (y // 14, x // 14); padding is 0, and −1 after normalization."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    patches, grids = preprocess([[Image.fromarray(pixels)]], MediaConfig())
    assert grids.tolist() == [[1, 4, 4]]
    for y, x, channel in [(0, 0, 0), (39, 29, 2), (20, 15, 1), (13, 14, 0)]:
        assert patches[(y // 14) * 4 + x // 14, channel, y % 14, x % 14] == pixels[y, x, channel]
    assert patches[3, :, :, 2:].max() == 0
    normalized = normalize(patches, MediaConfig())
    assert normalized.dtype == np.float32
    assert (normalized[3, :, :, 2:] == -1).all()
    np.testing.assert_allclose(normalized, (patches / 255 - 0.5) / 0.5, atol=1e-6)


def test_several_media_are_each_alone() -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((30, 50), (100, 20), (5, 5))
    ]
    together, grids = preprocess([[image] for image in images], MediaConfig())
    alone = np.concatenate([preprocess([[image]], MediaConfig())[0] for image in images])
    assert np.array_equal(together, alone)
    assert len(together) == grids.prod(1).sum()


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = (
        Image.new("I;16", (5, 4), 40000) if mode == "I;16" else Image.new("RGB", (5, 4), (200, 30, 90)).convert(mode)
    )
    opened = open_image(encode(image))
    assert (opened.mode, opened.size) == ("RGB", (5, 4))


RAMP = np.linspace(0, 1, 300 * 4).reshape(4, 300)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.rint(RAMP * 65535).astype(np.uint16), "PNG"),
        (np.rint(RAMP * 65535).astype(np.uint16), "TIFF"),
        (np.rint(RAMP * 65535).astype(np.int32), "TIFF"),
        (np.rint(RAMP * 4e9 - 2e9).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 3000 - 1000).astype(np.float32), "TIFF"),
    ],
    ids=["16-bit-png", "16-bit-tiff", "32-bit", "32-bit-signed", "float", "float-degrees"],
)
def test_more_than_eight_bits_are_scaled(values: np.ndarray, kind: str) -> None:
    """The image goes from black to white in even steps; PIL's own RGB clips nearly all of it to one of the two."""
    levels = np.asarray(open_image(encode(Image.fromarray(values), kind)))
    assert np.abs(levels - np.rint(RAMP * 255)[..., None]).max() <= 1
    assert len(np.unique(levels)) == 256


def test_what_is_no_number_is_black() -> None:
    values = np.array([[0.0, 1.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    levels = np.asarray(open_image(encode(Image.fromarray(values), "TIFF")))
    assert levels[0, :, 0].tolist() == [0, 255, 0, 255, 0]


def avif_without_pixels() -> bytes:
    """Return an AVIF image whose pixel data is zeroed, for which Pillow's decoder has errors of its own."""
    data = encode(Image.new("RGB", (4, 4), 3), "AVIF")
    start = data.index(b"mdat") + 4
    return data[:start] + bytes(len(data) - start)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no image"),
        (b"not an image at all", "no image"),
        (encode(Image.new("RGB", (64, 64), 3), "PNG")[:60], "damaged"),
        (encode(Image.effect_noise((64, 64), 9), "JPEG")[:700], "damaged"),
        (encode(Image.new("RGB", (4, 4), 3), "EPS"), "no image"),
        (avif_without_pixels(), "damaged"),
        (png_header(0, 0), "damaged|no image|0 × 0"),
        (png_header(30_000, 30_000), "too many pixels"),
        (png_header(15_000, 15_000), "too many pixels"),
    ],
    ids=["empty", "text", "cut-png", "cut-jpeg", "eps", "avif", "0x0", "30000x30000", "15000x15000"],
)
def test_what_is_no_image_gets_one_clear_error(data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        open_image(data)


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(MediaError, match="0 × 5"):
        preprocess([[Image.new("RGB", (0, 5))]], MediaConfig())


def test_the_checkpoints_file_is_read(tiny_folder: Path) -> None:
    assert MediaConfig.from_path(tiny_folder) == MediaConfig()
    with pytest.raises(MediaError, match="media_proc_cfg"):
        MediaConfig.from_dict({})
    with pytest.raises(MediaError, match="in_patch_limit is 0"):
        MediaConfig.from_dict({"media_proc_cfg": {"in_patch_limit": 0}})
    with pytest.raises(MediaError, match="not readable"):
        MediaConfig.from_path(tiny_folder / "nowhere")
