"""Replaces the checkpoint's processor, which SGLang's in-tree code for this model calls, by the core's, so that no code
of the checkpoint is executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoProcessor, BaseImageProcessor, BatchFeature

from k26_plugins.common.multimodal.processor import MediaProcessor
from k26_plugins.common.settings import ENGINE, MEDIA
from k26_plugins.sglang import compat


class K26Processor:
    """A processor with the published one's interface: a tokenizer, a media processor, and one call for both."""

    def __init__(self, tokenizer: Any, media_processor: MediaProcessor) -> None:
        self.tokenizer = tokenizer
        self.media_processor = media_processor
        self.image_processor = media_processor

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, revision: str | None = None, **kwargs: Any) -> Any:
        """Load the processor of a folder or of a name on the hub.

        If the user leaves images to the engine, this is transformers' own processor. The processor's tokenizer is in
        both cases the one that SGLang's `get_tokenizer` gives. No file of the checkpoint is executed, whatever `kwargs`
        allow.
        """
        tokenizer = compat.get_tokenizer(name, revision)
        if MEDIA.read() != ENGINE:
            settings, _ = BaseImageProcessor.get_image_processor_dict(name, revision=revision)
            return cls(tokenizer, MediaProcessor(settings))
        processor = AutoProcessor.from_pretrained(name, *args, revision=revision, **kwargs)
        processor.tokenizer = tokenizer
        return processor

    def __call__(
        self,
        text: str | Sequence[str],
        medias: Sequence[Mapping[str, Any]] | None = None,
        *,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return `input_ids` and `attention_mask` of the text, and the pixels and grids of the media.

        text: a prompt whose media placeholders are already expanded.
        """
        data = dict(self.tokenizer(text, return_tensors=return_tensors))
        if medias:
            data.update(self.media_processor.preprocess(medias))
        return BatchFeature(data=data)
