"""Where the files of the model lie that vLLM was given: in a folder, under a name of the hub or of ModelScope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from k26_plugins.common.checkpoint import weights_folder, whole_folder
from k26_plugins.vllm import compat


def readable_name(name: str, revision: str | None) -> str:
    """A folder, or a name that transformers' own functions find on the hub.

    With `VLLM_USE_MODELSCOPE` a name is ModelScope's, which those functions do not know: its small files are fetched, by
    vLLM's own function and into the cache that vLLM reads.
    """
    return compat.modelscope_folder(name, revision) or name


def checked_folder(model_config: Any) -> Path | None:
    """The folder whose headers are to be checked before the start; None where the weights are not all here yet."""
    folder = compat.modelscope_folder(model_config.model, model_config.revision)
    if folder is None or folder == model_config.model:
        return weights_folder(model_config.model, model_config.revision)
    return whole_folder(Path(folder))


def image_settings(model_config: Any) -> Mapping[str, Any]:
    """What `preprocessor_config.json` says."""
    name = readable_name(model_config.model, model_config.revision)
    settings: dict[str, Any]
    settings, _ = BaseImageProcessor.get_image_processor_dict(name, revision=model_config.revision)
    return settings


@contextmanager
def readable_by_vllm(model_config: Any) -> Iterator[None]:
    """While vLLM builds the model, which reads the settings of images.

    It cannot read them of ModelScope: a file that is not there ends the start, and the settings are taken for empty, with
    which no pixel would be normalized.
    """
    name = model_config.model
    model_config.model = readable_name(name, model_config.revision)
    if model_config.model != name:
        model_config.hf_image_processor_config = dict(image_settings(model_config))
    try:
        yield
    finally:
        # The loader fetches the weights by name.
        model_config.model = name
