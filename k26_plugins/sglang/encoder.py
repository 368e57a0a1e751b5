"""Lets the core open and prepare the images of SGLang's server of the encoder alone (`--encoder-only`).

By itself SGLang has transformers prepare them: by the checkpoint's code, which the plugin never executes, or by
transformers' class for this model, which takes other arguments than SGLang gives it.
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
    """Return the function that SGLang calls to prepare images, and have the core open the images of this process too.

    SGLang gives that function the opened images of several requests, their modality and its own settings; the function
    returns the pixels and grids of all of them. It raises MediaError for another modality than images.
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
    """Wrap SGLang's `EncoderPreprocessor._load_single_item` so that the core opens an image.

    SGLang calls it in its threads. Raises MediaError for an image that cannot be opened, and for any other medium.
    """
    _require_images(modality)
    described = isinstance(data, Mapping)
    # SGLang itself reads a medium that comes with a digest, because it compares the bytes with the digest.
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
