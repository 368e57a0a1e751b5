"""Finds the files of the model that vLLM was given: as a folder, as a name on the hub, or as a name on ModelScope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from k26_plugins.common.checkpoint import weights_folder, whole_folder
from k26_plugins.vllm import compat


def readable_name(name: str, revision: str | None) -> str:
    """Return a folder, or a name that transformers' own functions find on the hub.

    With `VLLM_USE_MODELSCOPE` a name is ModelScope's, which those functions do not know. The model's small files are
    then fetched by vLLM's own function into the cache that vLLM reads, and the folder there is returned.
    """
    return compat.modelscope_folder(name, revision) or name


def checked_folder(model_config: Any) -> Path | None:
    """Return the folder whose headers are checked before the start, or None if not all of the weights are here yet."""
    folder = compat.modelscope_folder(model_config.model, model_config.revision)
    if folder is None or folder == model_config.model:
        return weights_folder(model_config.model, model_config.revision)
    return whole_folder(Path(folder))


def image_settings(model_config: Any) -> Mapping[str, Any]:
    """Return the contents of the model's `preprocessor_config.json`."""
    name = readable_name(model_config.model, model_config.revision)
    settings: dict[str, Any]
    settings, _ = BaseImageProcessor.get_image_processor_dict(name, revision=model_config.revision)
    return settings


@contextmanager
def readable_by_vllm(model_config: Any) -> Iterator[None]:
    """Let vLLM's code read the settings of images while it builds the model, if the model's name is ModelScope's.

    vLLM itself does not read them from ModelScope: a file that it does not find ends the start, and it takes the
    settings to be empty, with which no pixel would be normalized.
    """
    name = model_config.model
    model_config.model = readable_name(name, model_config.revision)
    if model_config.model != name:
        model_config.hf_image_processor_config = dict(image_settings(model_config))
    try:
        yield
    finally:
        # The loader fetches the weights by the model's name, not from the folder of small files.
        model_config.model = name
