"""The checkpoint's processor, which SGLang's in-tree code for this model calls, on the core and without remote code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BaseImageProcessor, BatchFeature

from k26_plugins.common.media_processor import MediaProcessor
from k26_plugins.sglang.tokenizer import load_tokenizer


class K26Processor:
    """The published processor's interface: a tokenizer, a media processor, and both in one call."""

    def __init__(self, tokenizer: Any, media_processor: MediaProcessor) -> None:
        self.tokenizer = tokenizer
        self.media_processor = media_processor
        self.image_processor = media_processor

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, revision: str | None = None, **kwargs: Any) -> K26Processor:
        """The processor of a folder or of a name on the hub. No file of it is executed, whatever `kwargs` allow."""
        settings, _ = BaseImageProcessor.get_image_processor_dict(name, revision=revision)
        return cls(load_tokenizer(name, revision), MediaProcessor(settings))

    def __call__(
        self,
        text: str | Sequence[str],
        medias: Sequence[Mapping[str, Any]] | None = None,
        *,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """input_ids and attention_mask of `text`, whose placeholders are already expanded; pixels and grids of `medias`."""
        data = dict(self.tokenizer(text, return_tensors=return_tensors))
        if medias:
            data.update(self.media_processor.preprocess(medias))
        return BatchFeature(data=data)
