"""The core's pixels against vLLM's own fused processor for this model, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from k26_plugins.common.media import MediaConfig, normalise, preprocess

fused = pytest.importorskip(
    "vllm.transformers_utils.processors.kimi_k25_vision_fused", reason="vLLM's fused processor came after 0.19.1"
)


@pytest.fixture(scope="module")
def judge(tiny_folder: Path) -> object:
    settings = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    return fused.KimiK25FusedVisionProcessor(settings["media_proc_cfg"])


def assert_equal(judge: object, images: list[Image.Image], *, normalised: bool) -> None:
    medias = [{"type": "image", "image": image.copy()} for image in images]
    expected = judge.preprocess(medias, do_rescale=normalised, do_normalize=normalised)  # type: ignore[attr-defined]
    patches, grids = preprocess([[image] for image in images], MediaConfig())
    pixels = normalise(patches, MediaConfig()) if normalised else patches
    assert pixels.dtype == expected["pixel_values"].numpy().dtype
    assert pixels.tobytes() == expected["pixel_values"].numpy().tobytes()
    assert np.array_equal(grids, expected["grid_thws"].numpy())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 1500),
    height=st.integers(1, 1500),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P", "LA", "CMYK"]),
    normalised=st.booleans(),
)
def test_random_images(judge: object, width: int, height: int, mode: str, normalised: bool) -> None:
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_equal(judge, [Image.fromarray(pixels).convert(mode)], normalised=normalised)


@pytest.mark.parametrize("size", [(1, 1), (3000, 3000), (10000, 100), (20, 8000), (3840, 2160)], ids=str)
def test_extreme_sizes(judge: object, size: tuple[int, int]) -> None:
    assert_equal(judge, [Image.effect_noise(size, 60).convert("RGB")], normalised=False)


def test_several_images(judge: object) -> None:
    images = [Image.effect_noise(size, 60).convert("RGB") for size in ((50, 70), (640, 480), (5, 300))]
    assert_equal(judge, images, normalised=True)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_video_chunks(judge: object, count: int) -> None:
    frames = [Image.effect_noise((640, 480), 60).convert("RGB") for _ in range(count)]
    chunk = {"type": "video_chunk", "video_chunk": [frame.copy() for frame in frames]}
    expected = judge.preprocess([chunk], do_rescale=False, do_normalize=False)  # type: ignore[attr-defined]
    patches, grids = preprocess([frames], MediaConfig(), is_video=[True])
    assert patches.tobytes() == expected["pixel_values"].numpy().tobytes()
    assert grids.tolist() == expected["grid_thws"].tolist()
