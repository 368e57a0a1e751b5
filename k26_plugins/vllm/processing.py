"""Lets the core preprocess images and chunks of videos for vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.transformers_utils.processors.kimi_k25 import KimiK25Processor

from k26_plugins.common.multimodal.processor import MediaProcessor
from k26_plugins.common.multimodal.video import VideoChunk
from k26_plugins.vllm import compat
from k26_plugins.vllm.files import image_settings

_in_tree = compat.in_tree_model()


class K26ImageProcessor:
    """The core's preprocessing with the interface of the image processor that vLLM calls."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._media = MediaProcessor(settings, _image)
        self.num_frames_per_chunk = self._media.num_frames_per_chunk
        self.media_tokens_calculator = self._media.media_tokens_calculator

    def preprocess(
        self,
        medias: Sequence[Mapping[str, Any]],
        return_tensors: str | None = None,
        do_rescale: bool = True,
        do_normalize: bool = True,
    ) -> BatchFeature:
        """Return the pixels and grids of the media; nothing if there are none.

        medias: images and chunks of videos, as vLLM describes them. With do_normalize the pixels are float32. vLLM 0.32
        and later normalize on the device: they ask for neither rescaling nor normalizing, and get uint8.
        """
        data = self._media.preprocess(medias, do_normalize=do_normalize) if medias else {}
        return BatchFeature(data=data, tensor_type=return_tensors)


def _image(image: Any) -> Image.Image:
    # vLLM wraps a decoded image together with the bytes that it was decoded from.
    decoded = getattr(image, "media", image)
    if not isinstance(decoded, Image.Image):
        raise TypeError(f"vLLM {compat.vllm_version()} gave an image as {type(decoded).__name__}, expected PIL's.")
    return decoded


class K26ProcessingInfo(_in_tree.KimiK25ProcessingInfo):  # type: ignore[name-defined]
    """The in-tree class with the core's image processor, so that no file of the checkpoint is executed."""

    def __init__(self, ctx: Any) -> None:
        BaseProcessingInfo.__init__(self, ctx)
        self.hf_config = self.get_hf_config()
        self.media_token_id = compat.media_token_id(self.hf_config)
        tokenizer = self.get_tokenizer()
        self.media_token = tokenizer.decode(self.media_token_id)
        self.image_processor = K26ImageProcessor(image_settings(ctx.model_config))
        self.media_tokens_calculator = self.image_processor.media_tokens_calculator
        self.hf_processor = KimiK25Processor(
            tokenizer=tokenizer, image_processor=self.image_processor, media_token_id=self.media_token_id
        )


class K26MultiModalProcessor(_in_tree.KimiK25MultiModalProcessor):  # type: ignore[name-defined]
    """The in-tree class with the method that vLLM's rendering of chats calls for a video."""

    def split_video_chunks(self, video: Sequence[VideoChunk]) -> list[dict[str, Any]]:
        """Return each chunk that the media connector made of a video, with the text that stands for it in a prompt."""
        return [{"video_chunk": chunk, "prompt": chunk.prompt} for chunk in video]
