"""Tests of the core's pixels and video chunks against transformers' own `kimi_k25` processors, which hold nothing of
ours.

Those processors resize with torchvision. PyPI has torchvision as a CUDA build only, so CI runs this file in SGLang's
environment. Where the core and transformers differ on purpose, the tests hold what transformers does too;
docs/prompt.md lists the differences.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import random_image
from support.videos import make_video

from k26_plugins.common.multimodal.image import MediaConfig, normalize, preprocess
from k26_plugins.common.multimodal.video import make_chunk, sample_frames, video_info
from k26_plugins.common.prompt.special_tokens import VIDEO_PLACEHOLDER

pytest.importorskip("torchvision", reason="transformers' processors resize with torchvision")

from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
from transformers.models.kimi_k25.processing_kimi_k25 import Kimi_K25Processor
from transformers.models.kimi_k25.video_processing_kimi_k25 import Kimi_K25VideoProcessor
from transformers.video_utils import VideoMetadata

CONFIG = MediaConfig()
# transformers' defaults are ImageNet's.
NORM = {"image_mean": CONFIG.image_mean, "image_std": CONFIG.image_std}
LEVEL = 2 / 255
"""The step between two of the 256 levels of a pixel, after normalization."""


def apart(theirs: Any, ours: np.ndarray) -> np.ndarray:
    """Return by how many levels the pixels of transformers and of the core differ."""
    assert theirs.shape == ours.shape
    difference: np.ndarray = np.abs(theirs.numpy() - ours) / LEVEL
    return difference


def of_image(image: Image.Image) -> np.ndarray:
    """Return by how many levels the two processors' pixels of an image differ, after asserting that their grids are the
    same."""
    theirs = Kimi_K25ImageProcessor(**NORM)(image, return_tensors="pt")
    patches, grids = preprocess([[image]], CONFIG)
    assert theirs["image_grid_thw"].tolist() == grids.tolist()
    return apart(theirs["pixel_values"], normalize(patches, CONFIG))


def assert_close(levels: np.ndarray) -> None:
    assert levels.max() < 2.001
    assert (levels > 0.5).mean() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (50, 50), (640, 480), (100, 1), (1920, 1080)], ids=str)
def test_images_that_keep_their_size(size: tuple[int, int]) -> None:
    """The pixels are equal up to the rounding of float32: transformers folds rescaling and normalizing into one
    step."""
    assert of_image(random_image(*size)).max() < 1e-4


@pytest.mark.parametrize("size", [(3840, 2160), (3000, 3000), (10000, 100)], ids=str)
def test_images_that_are_shrunk(size: tuple[int, int]) -> None:
    """PIL's bicubic filter and torch's both compute in integers, and their results differ by a level at one of a
    hundred pixels."""
    assert_close(of_image(random_image(*size)))


def test_a_tall_image_that_is_shrunk() -> None:
    """The image is smooth and has no extremes, because Pillow 13 filters tall images by column first: noise, which is
    cut at black and white between the two passes, comes out up to 26 levels from torch's result and from that of Pillow
    12."""
    smooth = random_image(5, 2000).resize((20, 8000), Image.Resampling.BICUBIC)
    assert of_image(smooth.point(lambda value: 64 + value // 2)).max() < 2.001


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1"])
def test_modes(mode: str) -> None:
    assert of_image(random_image(50, 40).convert(mode)).max() < 1e-4


def test_levels_of_sixteen_bits() -> None:
    """Transformers clips levels of 16 bits to white, as PIL's own conversion to RGB does; the core scales them."""
    image = Image.new("I;16", (28, 28), 40000)
    pixels = Kimi_K25ImageProcessor(**NORM)(image, return_tensors="pt")["pixel_values"]
    assert (pixels == 1).all()
    assert (preprocess([[image]], CONFIG)[0] == round(40000 * 255 / 65535)).all()


def test_transparency() -> None:
    """The model's own preprocessing drops transparency, as the core and transformers 5.19 do; transformers 5.23 lays
    the image on white."""
    image = random_image(28, 28)
    image.putalpha(0)
    pixels = Kimi_K25ImageProcessor(**NORM)(image, return_tensors="pt")["pixel_values"]
    assert (pixels == 1).all() or apart(pixels, normalize(preprocess([[image]], CONFIG)[0], CONFIG)).max() < 1e-4


@pytest.mark.parametrize(
    ("count", "size"), [(1, (64, 48)), (4, (300, 200)), (10, (640, 480)), (6, (1920, 1080))], ids=str
)
def test_video_chunks_and_their_text(count: int, size: tuple[int, int]) -> None:
    """From the same frames, pixels, grids, timestamps and the number of tokens of every chunk are those of
    transformers."""
    frames = [random_image(*size, seed=index) for index in range(count)]
    indices, fps = [index * 7 for index in range(count)], 13.0
    metadata = VideoMetadata(total_num_frames=count * 7, fps=fps, frames_indices=indices)
    theirs = Kimi_K25VideoProcessor(**NORM)(
        [np.stack([np.asarray(frame) for frame in frames])],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_metadata=True,
        return_tensors="pt",
    )
    groups = [slice(start, start + 4) for start in range(0, count, 4)]
    chunks = [make_chunk(indices[group], frames[group], indices[group][0] / fps, CONFIG) for group in groups]
    assert theirs["video_grid_thw"].tolist() == [list(chunk.grid_thw) for chunk in chunks]
    levels = np.concatenate(
        [
            apart(pixels, normalize(chunk.patches, CONFIG))
            for pixels, chunk in zip(_in_chunks(theirs), chunks, strict=True)
        ]
    )
    assert_close(levels)
    processor = SimpleNamespace(video_processor=Kimi_K25VideoProcessor(), video_token=VIDEO_PLACEHOLDER)
    text = Kimi_K25Processor.replace_video_token(processor, theirs, 0)
    assert text == "".join(
        chunk.prompt.replace("<|media_pad|>", VIDEO_PLACEHOLDER * chunk.num_tokens) for chunk in chunks
    )


def _in_chunks(theirs: Any) -> list[Any]:
    """Split transformers' pixels, which hold a video's chunks one behind the other, into the chunks."""
    sizes = [int(grid.prod()) for grid in theirs["video_grid_thw"]]
    return list(theirs["pixel_values_videos"].reshape(-1, 3, CONFIG.patch_size, CONFIG.patch_size).split(sizes))


@pytest.mark.parametrize(("num_frames", "fps"), [(30, 10), (125, 25), (7, 2), (300, 30)])
def test_frames_are_spread_otherwise(num_frames: int, fps: int) -> None:
    """Both take the same number of frames, but transformers takes the beginning of equal spans, and the core takes the
    last frame too, as the model's own code does."""
    info = video_info(make_video(num_frames, fps))
    metadata = VideoMetadata(total_num_frames=info.num_frames, fps=float(info.fps))
    theirs = Kimi_K25VideoProcessor().sample_frames(metadata, fps=2).tolist()
    ours = sample_frames(info.num_frames, info.fps, 2.0)
    assert len(theirs) == len(ours)
    assert theirs == [int(index * num_frames / len(theirs)) for index in range(len(theirs))]
    assert ours[-1] == num_frames - 1
