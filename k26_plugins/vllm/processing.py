"""Images and video chunks for vLLM, preprocessed by the core."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.transformers_utils.processors.kimi_k25 import KimiK25Processor

from k26_plugins.common.media import MediaConfig, media_resize, normalise, preprocess
from k26_plugins.vllm import compat

_in_tree = compat.in_tree_model()


class K26ImageProcessor:
    """The core's preprocessing, called as vLLM calls an image processor."""

    def __init__(self, config: MediaConfig) -> None:
        self.config = config
        self.num_frames_per_chunk = config.temporal_merge_kernel_size

    def media_tokens_calculator(self, media: dict[str, Any]) -> int:
        """Tokens that one image or video chunk takes in the prompt."""
        frames, is_video = _frames(media)
        return media_resize(frames, self.config, is_video=is_video).num_tokens

    def preprocess(
        self,
        medias: list[dict[str, Any]],
        return_tensors: str | None = None,
        do_rescale: bool = True,
        do_normalize: bool = True,
    ) -> BatchFeature:
        """pixel_values `[Σ t · h · w, 3, patch, patch]` and grid_thws `[num_media, 3]`.

        vLLM 0.32 and later normalise on the device: they ask for neither rescaling nor normalising and get uint8.
        """
        if not medias:
            return BatchFeature(data={}, tensor_type=return_tensors)
        opened = [_frames(media) for media in medias]
        patches, grids = preprocess(
            [frames for frames, _ in opened], self.config, is_video=[is_video for _, is_video in opened]
        )
        pixels = normalise(patches, self.config) if do_normalize else patches
        data = {"pixel_values": torch.from_numpy(pixels), "grid_thws": torch.from_numpy(grids)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def _frames(media: dict[str, Any]) -> tuple[list[Image.Image], bool]:
    if media["type"] == "video_chunk":
        return [_image(frame) for frame in media["video_chunk"]], True
    return [_image(media["image"])], False


def _image(image: Any) -> Image.Image:
    # vLLM wraps an image that it decoded together with the bytes that it came from.
    decoded = getattr(image, "media", image)
    if not isinstance(decoded, Image.Image):
        raise TypeError(f"vLLM {compat.vllm_version()} gave an image as {type(decoded).__name__}, expected PIL's.")
    return decoded


class K26ProcessingInfo(_in_tree.KimiK25ProcessingInfo):  # type: ignore[misc, name-defined]
    """As the in-tree class, with the core's image processor and no file of the checkpoint executed."""

    def __init__(self, ctx: Any) -> None:
        BaseProcessingInfo.__init__(self, ctx)
        model_config = ctx.model_config
        self.hf_config = self.get_hf_config()
        self.media_token_id = compat.media_token_id(self.hf_config)
        tokenizer = self.get_tokenizer()
        self.media_token = tokenizer.decode(self.media_token_id)
        settings, _ = BaseImageProcessor.get_image_processor_dict(model_config.model, revision=model_config.revision)
        self.image_processor = K26ImageProcessor(MediaConfig.from_dict(settings))
        self.media_tokens_calculator = self.image_processor.media_tokens_calculator
        self.hf_processor = KimiK25Processor(
            tokenizer=tokenizer, image_processor=self.image_processor, media_token_id=self.media_token_id
        )
