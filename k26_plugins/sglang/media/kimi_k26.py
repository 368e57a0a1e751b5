"""Prepares Kimi-K2.6's images and videos in SGLang: the in-tree class, with the core's pixels on every device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException

from k26_plugins.common import metrics
from k26_plugins.common.multimodal.image import open_image
from k26_plugins.common.multimodal.video import MAX_TOKENS, VideoChunk, read_chunks
from k26_plugins.common.prompt.places import media_kinds, place_videos
from k26_plugins.common.settings import ENGINE, MEDIA
from k26_plugins.sglang import compat, compat_encoder
from k26_plugins.sglang.model import KimiK25ForConditionalGeneration

_in_tree = compat.in_tree_media()
_NO_ENCODER = (
    "this server was started without the vision tower (--language-only), and no server of the encoder has encoded the "
    "request's images: start one with --encoder-only, and name it here (--encoder-urls) or have it report here "
    "(--encoder-register-urls)."
)


def prepare_on_the_cpu(original: Callable[..., Any], wrapper: Any, text: Any, images: Any, *args: Any) -> Any:
    """Wrap the in-tree `KimiGPUProcessorWrapper._gpu_call` so that images are prepared on the CPU by the core.

    The in-tree class resizes images on a GPU if there is one. Its arithmetic differs there, and pixels are off by a few
    levels.
    """
    return wrapper._cpu_call(text, images, *args, return_tensors="pt")


def load_item(original: Callable[..., Any], data: Any, modality: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap SGLang's `_load_single_item` so that the core decodes images. Raises MediaError.

    A chunk of a video, which is decoded already, passes as an image.
    """
    if modality.name == "IMAGE" and isinstance(data, VideoChunk):
        return compat.loaded_image(data, data.patches)
    sent = compat.image_bytes(data) if modality.name == "IMAGE" else None
    if sent is None:
        return original(data, modality, *args, **kwargs)
    with metrics.decoding("image"):
        return compat.loaded_image(open_image(sent), sent)


if MEDIA.read() != ENGINE:
    compat.hook_gpu_call(prepare_on_the_cpu)
    compat.hook_loading_of_media(load_item)


class K26MediaProcessor(_in_tree.KimiK2_5VLImageProcessor):  # type: ignore[name-defined]
    """The in-tree class, which takes images, extended by videos and by the core's decoding.

    A video is handed to the in-tree class as images: one for each chunk, with more than one frame.
    """

    # SGLang uses this class for these models; there is none if the user leaves images to SGLang.
    models = (KimiK25ForConditionalGeneration,) if MEDIA.read() != ENGINE else ()
    # A GPU's JPEG decoder gives other pixels than PIL, and it gives a tensor, while the core takes a PIL image.
    gpu_image_decode = False

    @classmethod
    def _load_single_item(cls, data: Any, modality: Any, *args: Any, **kwargs: Any) -> Any:
        """Decode one medium of a request by the core. SGLang calls this in its threads. Raises MediaError."""
        return load_item(super()._load_single_item, data, modality, *args, **kwargs)

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Prepare a request's media by the in-tree class, with the chunks of videos among the images.

        Raises HTTPException (503) if another server should have encoded the media, and ValueError for a video that
        cannot be read.
        """
        if compat_encoder.encodes_elsewhere():
            # SGLang would encode the images in this server, with a vision tower whose weights were never loaded.
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, _NO_ENCODER)
        videos = request_obj.video_data
        if videos:
            limit = kwargs.get("max_req_input_len") or MAX_TOKENS
            loaded = await asyncio.gather(*(asyncio.to_thread(self._chunks, video, limit) for video in videos))
            if isinstance(input_text, str):
                input_text = self._processor.tokenizer.encode(input_text, add_special_tokens=False)
            image_data, input_text = self._in_order(list(image_data or []), loaded, list(input_text))
        return await super().process_mm_data_async(image_data, input_text, request_obj, *args, **kwargs)

    def _chunks(self, video: Any, max_tokens: int) -> list[VideoChunk]:
        data = compat.video_bytes(video)
        with metrics.decoding("video"):
            return list(read_chunks(data, self._processor.media_processor.config, max_tokens))

    def _in_order(
        self, images: list[Any], videos: list[list[VideoChunk]], token_ids: list[int]
    ) -> tuple[list[Any], list[int]]:
        """Return images and chunks of videos in their order in the prompt, and the prompt with a placeholder for each.

        Raises ValueError if the prompt has another number of images or of videos than was given.
        """
        kinds = media_kinds(token_ids, self._processor.tokenizer)
        if kinds.count("image") != len(images):
            raise ValueError(f"the prompt has {kinds.count('image')} places for images and {len(images)} were given.")
        placed = place_videos(
            token_ids, [[chunk.prompt for chunk in video] for video in videos], self._processor.tokenizer
        )
        next_image, next_video = iter(images), iter(videos)
        media: list[Any] = []
        for kind in kinds:
            media += [next(next_image)] if kind == "image" else next(next_video)
        return media, placed
