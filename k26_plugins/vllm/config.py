"""Validates vLLM's model configuration by the core and corrects it, before vLLM builds anything from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k26_plugins.common import metrics
from k26_plugins.common.adapters.serving import core_answer, write_vision
from k26_plugins.common.checkpoint import Layout
from k26_plugins.common.model.config import ARCHITECTURE, K26Config
from k26_plugins.common.prompt.hf_tokenizer import core_serves_prompts
from k26_plugins.common.settings import ENGINE, MEDIA, check_settings
from k26_plugins.vllm import compat, files, logger


@dataclass(frozen=True)
class Answer:
    """The core's answer about a checkpoint, which travels to every worker as a part of vLLM's configuration.

    A worker on a machine without this package cannot unpickle it and fails; without that, vLLM's own class would
    silently serve there.
    """

    core_config: K26Config | None
    """None for a checkpoint that vLLM's own code serves."""
    saved_experts: bool = False
    """Whether the checkpoint is a state that vLLM saved with the core's experts, which no other experts can read."""
    metrics_folder: Path | None = None
    """The folder in which the API server reads its workers' figures, None if they go another way."""


def choose_tokenizer(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap vLLM's `ModelConfig.get_model_arch_config` so that this architecture gets the core's tokenizer.

    A tokenizer mode that the user chose stays, and so does another tokenizer that the checkpoint brings.
    """
    _choose_tokenizer(model_config)
    return original(model_config, *args, **kwargs)


def _choose_tokenizer(model_config: Any) -> None:
    if model_config.tokenizer_mode != "auto" or ARCHITECTURE not in (model_config.hf_config.architectures or []):
        return
    revision = model_config.tokenizer_revision
    if core_serves_prompts(files.readable_name(model_config.tokenizer, revision), revision):
        model_config.tokenizer_mode = compat.TOKENIZER_MODE
    else:
        logger.info("k26-plugins: the tokenizer and the prompts are vLLM's own.")


def prepare(model_config: Any) -> None:
    """Validate the configuration by the core, and write the core's values under the names that vLLM reads.

    The headers of a local checkpoint are checked too. Raises ConfigError, CheckpointError, or ValueError for a wrong
    setting: the start stops in the process whose output the user sees.
    """
    check_settings()
    answer = core_answer(model_config.hf_config, files.checked_folder(model_config), logger.warning)
    folder = metrics.collect_from_workers()
    if answer is None:
        model_config.k26_plugins = Answer(None, metrics_folder=folder)
    else:
        _write_back(answer.config, model_config.hf_config)
        model_config.k26_plugins = Answer(answer.config, answer.layout is Layout.SAVED, folder)
    if MEDIA.read() != ENGINE:
        compat.use_media_connector("k26_plugins.vllm.media", "K26MediaConnector", model_config)


def _write_back(config: K26Config, hf_config: Any) -> None:
    write_vision(config, hf_config.vision_config)
    hf_config.projection_layer_norm_eps = config.vision.projector_ln_eps
    hf_config.image_token_id = config.media_placeholder_token_id
    hf_config.media_placeholder_token_id = config.media_placeholder_token_id
    # The router compares scores that bfloat16 cannot tell apart. vLLM reads this name for the dtype of the router's
    # logits.
    hf_config.text_config.moe_router_dtype = "float32"
