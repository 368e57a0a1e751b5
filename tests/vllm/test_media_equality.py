"""Tests of the core's pixels against vLLM's own fused processor for this model, byte for byte."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.conversations import conversations, media_parts, part_bytes
from support.images import pil_rgb
from support.videos import make_video
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from k26_plugins.common.multimodal.image import MediaConfig, normalize, preprocess
from k26_plugins.vllm.media import K26ImageIO, K26VideoIO
from k26_plugins.vllm.processing import K26ImageProcessor

fused = pytest.importorskip(
    "vllm.transformers_utils.processors.kimi_k25_vision_fused", reason="vLLM's fused processor came after 0.19.1"
)


@pytest.fixture(scope="module")
def judge(tiny_folder: Path) -> object:
    settings = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    return fused.KimiK25FusedVisionProcessor(settings["media_proc_cfg"])


def assert_equal(judge: object, images: list[Image.Image], *, normalized: bool) -> None:
    medias = [{"type": "image", "image": image.copy()} for image in images]
    expected = judge.preprocess(medias, do_rescale=normalized, do_normalize=normalized)  # type: ignore[attr-defined]
    patches, grids = preprocess([[image] for image in images], MediaConfig())
    pixels = normalize(patches, MediaConfig()) if normalized else patches
    assert pixels.dtype == expected["pixel_values"].numpy().dtype
    assert pixels.tobytes() == expected["pixel_values"].numpy().tobytes()
    assert np.array_equal(grids, expected["grid_thws"].numpy())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 1500),
    height=st.integers(1, 1500),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P", "LA", "CMYK"]),
    normalized=st.booleans(),
)
def test_random_images(judge: object, width: int, height: int, mode: str, normalized: bool) -> None:
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_equal(judge, [Image.fromarray(pixels).convert(mode)], normalized=normalized)


@pytest.mark.parametrize("size", [(1, 1), (3000, 3000), (10000, 100), (20, 8000), (3840, 2160)], ids=str)
def test_extreme_sizes(judge: object, size: tuple[int, int]) -> None:
    assert_equal(judge, [Image.effect_noise(size, 60).convert("RGB")], normalized=False)


def test_several_images(judge: object) -> None:
    images = [Image.effect_noise(size, 60).convert("RGB") for size in ((50, 70), (640, 480), (5, 300))]
    assert_equal(judge, images, normalized=True)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_video_chunks(judge: object, count: int) -> None:
    frames = [Image.effect_noise((640, 480), 60).convert("RGB") for _ in range(count)]
    chunk = {"type": "video_chunk", "video_chunk": [frame.copy() for frame in frames]}
    expected = judge.preprocess([chunk], do_rescale=False, do_normalize=False)  # type: ignore[attr-defined]
    patches, grids = preprocess([frames], MediaConfig(), is_video=[True])
    assert patches.tobytes() == expected["pixel_values"].numpy().tobytes()
    assert grids.tolist() == expected["grid_thws"].tolist()


def test_a_requests_images_of_every_format(judge: object, tiny_folder: Path) -> None:
    """Images of every format, through our media connector and processor, give the bytes that PIL's RGB gives through
    vLLM's fused processor."""
    settings = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    processor = K26ImageProcessor(settings)
    parts = [part for one in conversations() for part in media_parts(one) if part["type"] == "image_url"]
    assert len(parts) > 50
    for part in parts:
        data = part_bytes(part)
        found = processor.preprocess([{"type": "image", "image": K26ImageIO().load_bytes(data)}])
        media = [{"type": "image", "image": pil_rgb(data)}]
        expected = judge.preprocess(media, do_rescale=True, do_normalize=True)  # type: ignore[attr-defined]
        assert found["pixel_values"].numpy().tobytes() == expected["pixel_values"].numpy().tobytes()


def test_a_videos_chunks(judge: object, tiny_folder: Path) -> None:
    """A video's chunks, through our media connector and processor, give the bytes that the frames of PyAV give through
    vLLM's fused processor."""
    settings = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    data = make_video(50, 10, (320, 240))
    with av.open(io.BytesIO(data), "r") as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    chunks = K26VideoIO(MediaConfig.from_path(tiny_folder), 10_000, {}).load_bytes(data)
    media = [{"type": "video_chunk", "video_chunk": chunk} for chunk in chunks]
    found = K26ImageProcessor(settings).preprocess(media, do_normalize=False)
    expected = judge.preprocess(  # type: ignore[attr-defined]
        [{"type": "video_chunk", "video_chunk": [frames[index] for index in chunk.indices]} for chunk in chunks],
        do_rescale=False,
        do_normalize=False,
    )
    assert found["pixel_values"].numpy().tobytes() == expected["pixel_values"].numpy().tobytes()
    assert found["grid_thws"].tolist() == expected["grid_thws"].tolist()


@pytest.mark.parametrize("turned", [0, 90, -90, 180])
def test_a_videos_frames_are_those_of_vllms_own_loader(tiny_folder: Path, turned: int) -> None:
    """vLLM's loader gives OpenCV's frames, whose colours differ from ours by a few levels and which are turned by the
    same quarters."""
    data = make_video(20, 10, (320, 240), turned=turned)
    frames, found = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(data)
    chunks = K26VideoIO(MediaConfig.from_path(tiny_folder), 10_000, {}).load_bytes(data)
    assert found["total_num_frames"] == 20
    for chunk in chunks:
        images = [Image.fromarray(frames[index]) for index in chunk.indices]
        patches, grids = preprocess([images], MediaConfig(), is_video=[True])
        assert grids.tolist() == [list(chunk.grid_thw)]
        assert np.abs(patches.astype(int) - chunk.patches).max() <= 6
