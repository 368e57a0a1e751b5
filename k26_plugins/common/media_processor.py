"""The core's preprocessing behind the interface of the checkpoint's own image processor, which the engines call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from k26_plugins.common.media import MediaConfig, media_resize, normalise, preprocess


class MediaProcessor:
    """Media are mappings `{"type": "image", "image": …}` or `{"type": "video_chunk", "video_chunk": [frame, …]}`."""

    def __init__(self, settings: Mapping[str, Any], to_image: Callable[[Any], Image.Image] | None = None) -> None:
        """settings: the mapping of preprocessor_config.json. to_image: takes PIL's image out of an engine's wrapper."""
        self.config = MediaConfig.from_dict(settings)
        self.media_proc_cfg: dict[str, Any] = dict(settings["media_proc_cfg"])
        self.num_frames_per_chunk = self.config.temporal_merge_kernel_size
        self._to_image = to_image or _as_is

    def media_tokens_calculator(self, media: Mapping[str, Any]) -> int:
        """Tokens that one image or video chunk takes in the prompt. Raises MediaError."""
        frames, is_video = self._frames(media)
        return media_resize(frames, self.config, is_video=is_video).num_tokens

    def preprocess(self, medias: Sequence[Mapping[str, Any]], *, do_normalize: bool = True) -> dict[str, torch.Tensor]:
        """pixel_values `[Σ t · h · w, 3, patch, patch]`, float32 or raw uint8, and grid_thws int64 `[num_media, 3]`.

        Raises MediaError.
        """
        opened = [self._frames(media) for media in medias]
        patches, grids = preprocess(
            [frames for frames, _ in opened], self.config, is_video=[is_video for _, is_video in opened]
        )
        pixels = normalise(patches, self.config) if do_normalize else patches
        return {"pixel_values": torch.from_numpy(pixels), "grid_thws": torch.from_numpy(grids)}

    def _frames(self, media: Mapping[str, Any]) -> tuple[list[Image.Image], bool]:
        if media["type"] == "video_chunk":
            return [self._to_image(frame) for frame in media["video_chunk"]], True
        return [self._to_image(media["image"])], False


def _as_is(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"the engine gave an image as {type(image).__name__}, expected PIL's.")
    return image
