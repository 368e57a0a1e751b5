"""Lets the core decode the images and videos of vLLM's requests from the bytes that the client sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaWithBytes
from vllm.multimodal.media.base import MediaIO
from vllm.multimodal.media.image import ImageMediaIO

from k26_plugins.common import metrics
from k26_plugins.common.multimodal.data_url import base64_bytes, data_url_bytes, require_url
from k26_plugins.common.multimodal.image import MAX_PIXELS, MediaConfig, MediaError, open_image
from k26_plugins.common.multimodal.video import VideoChunk, read_chunks
from k26_plugins.vllm.files import image_settings

CONNECTOR = "k26"


class K26ImageIO(ImageMediaIO):
    """Decodes an image as the model's preprocessing does.

    vLLM's own class would rotate an image by its EXIF data and fill its transparent background with white, which the
    model's preprocessing does not, and would answer a decompression bomb with 500.
    """

    def load_bytes(self, data: bytes) -> Any:
        """Return the image as the model's own preprocessing opens it, with its bytes, by which vLLM caches it."""
        limit = getattr(envs, "VLLM_MAX_IMAGE_PIXELS", 0)
        with metrics.decoding("image"):
            return MediaWithBytes(open_image(data, min(limit, MAX_PIXELS) if limit > 0 else MAX_PIXELS), data)


class K26VideoIO(MediaIO):
    """Decodes a video's bytes to the list of its chunks."""

    def __init__(self, config: MediaConfig, max_tokens: int, settings: Mapping[str, Any]) -> None:
        """Prepare for the videos of one request.

        max_tokens: the largest number of tokens that a video may take. settings: `fps` and `num_frames`, as the user
        gave them by `--media-io-kwargs` or in the request.
        """
        super().__init__()
        fps = settings.get("fps")
        self.config = replace(config, sample_fps=fps) if fps and fps > 0 else config
        self.max_tokens = max_tokens
        num_frames = settings.get("num_frames")
        self.max_frames = num_frames if num_frames and num_frames > 0 else None

    def load_bytes(self, data: bytes) -> list[VideoChunk]:
        """Return the chunks of frames that the model is given of a video."""
        with metrics.decoding("video"):
            return list(read_chunks(data, self.config, self.max_tokens, self.max_frames))

    def load_base64(self, media_type: str, data: str) -> list[VideoChunk]:
        """Return the chunks of a video that is given in base64."""
        return self.load_bytes(base64_bytes(data))

    def load_file(self, filepath: Path) -> list[VideoChunk]:
        """Return the chunks of a video in a local file."""
        return self.load_bytes(filepath.read_bytes())


@contextmanager
def _fetching() -> Iterator[None]:
    """Turn errors of fetching a medium into MediaError, which is answered with 400; vLLM would answer 500."""
    try:
        yield
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        raise MediaError(f"the image or video cannot be fetched: {error}") from error


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class K26MediaConnector(MediaConnector):
    """Fetches media as vLLM does and decodes them as the core does.

    If the user set `image` in `--media-io-kwargs`, vLLM decodes the images.
    """

    # vLLM's configuration of the model that this process serves.
    model_config: Any = None
    media_config: MediaConfig | None = None

    @classmethod
    def serve(cls, model_config: Any) -> None:
        """Note the model that this process serves and its image settings, which apply to all connectors of the
        process."""
        cls.model_config, cls.media_config = model_config, MediaConfig.from_dict(image_settings(model_config))

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Fetch and decode a medium; an empty address, or one that cannot be fetched, is answered with 400."""
        require_url(url)
        with _fetching():
            return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Fetch and decode a medium as `load_from_url` does."""
        require_url(url)
        with _fetching():
            return await super().load_from_url_async(url, *args, **kwargs)

    def _load_data_url(self, url: Any, media_io: MediaIO) -> Any:
        """Decode a `data:` URL in any form of base64.

        vLLM's own method takes base64 in one form: without line breaks, in one alphabet, with "base64" in lower case.
        """
        # vLLM 0.19.1 gives a parsed URL in the place of a string.
        return media_io.load_bytes(data_url_bytes(url if isinstance(url, str) else url.url))

    def fetch_image(self, image_url: str, **kwargs: Any) -> Any:
        """Fetch an image and decode it by the core, or by vLLM if `media_io_kwargs` has options for images."""
        if "image" in self.media_io_kwargs:
            return super().fetch_image(image_url, **kwargs)
        return self.load_from_url(image_url, K26ImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, **kwargs: Any) -> Any:
        """Fetch and decode an image as `fetch_image` does."""
        if "image" in self.media_io_kwargs:
            return await super().fetch_image_async(image_url, **kwargs)
        return await self.load_from_url_async(image_url, K26ImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    def fetch_video(self, video_url: str, **kwargs: Any) -> Any:
        """Fetch a video and decode it by the core."""
        return self.load_from_url(video_url, self._video_io(), fetch_timeout=envs.VLLM_VIDEO_FETCH_TIMEOUT)

    async def fetch_video_async(self, video_url: str, **kwargs: Any) -> Any:
        """Fetch and decode a video as `fetch_video` does."""
        return await self.load_from_url_async(video_url, self._video_io(), fetch_timeout=envs.VLLM_VIDEO_FETCH_TIMEOUT)

    def _video_io(self) -> K26VideoIO:
        assert self.media_config is not None
        return K26VideoIO(
            self.media_config, int(self.model_config.max_model_len), self.media_io_kwargs.get("video", {})
        )
