"""SGLang's server of the encoder alone (`--encoder-only`): its images are opened and prepared by the core.

By itself SGLang has transformers prepare them: by the checkpoint's code, which nothing here runs, or by transformers' class
for this model, which takes other things than SGLang hands it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import BaseImageProcessor

from k26_plugins.common import metrics
from k26_plugins.common.multimodal.image import MediaError, open_image
from k26_plugins.common.multimodal.processor import MediaProcessor
from k26_plugins.sglang import compat, compat_encoder, names

Prepare = Callable[[Sequence[Mapping[str, Any]], Any, Any], dict[str, torch.Tensor]]


def prepare_by_core() -> Prepare:
    """What SGLang calls with the opened images of several requests, their kind and its settings: pixels and grids of all.

    From here on images are opened by the core too, in this process.
    """
    compat.ENGINE.hook(open_medium, names.LOAD_ENCODER_ITEM)
    name, revision = compat_encoder.model_folder()
    settings, _ = BaseImageProcessor.get_image_processor_dict(name, revision=revision)
    processor = MediaProcessor(settings)

    def prepare(media: Sequence[Mapping[str, Any]], modality: Any, config: Any) -> dict[str, torch.Tensor]:
        _require_images(modality)
        return processor.preprocess(media)

    return prepare


def open_medium(original: Callable[..., Any], preprocessor: Any, data: Any, modality: Any, *args: Any) -> Any:
    """Called in SGLang's threads, one for each medium. Raises MediaError."""
    _require_images(modality)
    described = isinstance(data, Mapping)
    # Bytes that are to be held against a digest are SGLang's to read.
    checked = described and data.get("content_hash") is not None
    sent = None if checked else compat.image_bytes(data.get("url") if described else data)
    if sent is None:
        return original(preprocessor, data, modality, *args)
    with metrics.decoding("image"):
        return open_image(sent)


def _require_images(modality: Any) -> None:
    if modality.name != "IMAGE":
        raise MediaError(
            f"a server of the encoder alone takes images, and this is {modality.name.lower()}: send it to a server of the "
            f"whole model."
        )
