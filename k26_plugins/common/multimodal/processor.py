"""Offer the core's preprocessing behind the interface of the checkpoint's own image processor.

The engines call that interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from k26_plugins.common import metrics
from k26_plugins.common.multimodal.image import MediaConfig, media_resize, normalize, preprocess
from k26_plugins.common.multimodal.video import VideoChunk


class MediaProcessor:
    """The image processor that engines call in place of the checkpoint's own.

    A medium is a mapping `{"type": "image", "image": …}` or `{"type": "video_chunk", "video_chunk": …}`. The value of a
    video chunk is a list of an engine's frames or a VideoChunk that the core has read; the latter may also be the value
    of an image.
    """

    def __init__(self, settings: Mapping[str, Any], to_image: Callable[[Any], Image.Image] | None = None) -> None:
        """Read the settings. Raises MediaError.

        settings: the mapping of preprocessor_config.json. to_image: takes PIL's image out of an engine's wrapper.
        """
        self.config = MediaConfig.from_dict(settings)
        self.media_proc_cfg: dict[str, Any] = dict(settings["media_proc_cfg"])
        self.num_frames_per_chunk = self.config.temporal_merge_kernel_size
        self._to_image = to_image or _as_is

    def media_tokens_calculator(self, media: Mapping[str, Any]) -> int:
        """Return the tokens that an image or a video chunk takes in the prompt. Raises MediaError."""
        if isinstance(chunk := media[media["type"]], VideoChunk):
            return chunk.num_tokens
        frames, is_video = self._frames(media)
        return media_resize(frames, self.config, is_video=is_video).num_tokens

    def preprocess(self, medias: Sequence[Mapping[str, Any]], *, do_normalize: bool = True) -> dict[str, torch.Tensor]:
        """Return the vision tower's input for the media, as a dict. Raises MediaError.

        `pixel_values`: `[Σ t · h · w, 3, patch, patch]`, float32, or raw uint8 without `do_normalize`. `grid_thws`:
        int64 `[num_media, 3]`, frames, rows and columns of patches. Both are in host memory.
        """
        with metrics.preprocessing():
            return self._preprocess(medias, do_normalize=do_normalize)

    def _preprocess(self, medias: Sequence[Mapping[str, Any]], *, do_normalize: bool) -> dict[str, torch.Tensor]:
        chunks = [media[media["type"]] for media in medias]
        opened = [
            self._frames(media)
            for media, chunk in zip(medias, chunks, strict=True)
            if not isinstance(chunk, VideoChunk)
        ]
        patches, grids = preprocess(
            [frames for frames, _ in opened], self.config, is_video=[is_video for _, is_video in opened]
        )
        if len(opened) < len(chunks):
            patches, grids = _merged(chunks, patches, grids)
        pixels = normalize(patches, self.config) if do_normalize else patches
        return {"pixel_values": torch.from_numpy(pixels), "grid_thws": torch.from_numpy(grids)}

    def _frames(self, media: Mapping[str, Any]) -> tuple[list[Image.Image], bool]:
        if media["type"] == "video_chunk":
            return [self._to_image(frame) for frame in media["video_chunk"]], True
        return [self._to_image(media["image"])], False


def _merged(
    chunks: Sequence[Any], patches: npt.NDArray[np.uint8], grids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the patches and grids of all media in their order.

    Chunks that the core has read bring their own patches; `patches` and `grids` belong to the other media.
    """
    all_patches, all_grids = [], []
    start = done = 0
    for chunk in chunks:
        if isinstance(chunk, VideoChunk):
            all_patches.append(chunk.patches)
            all_grids.append(chunk.grid_thw)
            continue
        grid = tuple(int(size) for size in grids[done])
        stop = start + int(np.prod(grid))
        all_patches.append(patches[start:stop])
        all_grids.append((grid[0], grid[1], grid[2]))
        start, done = stop, done + 1
    return np.concatenate(all_patches), np.array(all_grids, dtype=np.int64)


def _as_is(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"the engine gave an image as {type(image).__name__}, expected PIL's.")
    return image
