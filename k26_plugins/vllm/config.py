"""What the core makes of vLLM's model configuration, before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k26_plugins.common.checkpoint import CheckpointError, check
from k26_plugins.common.config import K26Config, UnsupportedQuantizationError
from k26_plugins.vllm import compat, logger

NUM_PROBLEMS_SHOWN = 8


def core_config(hf_config: Any) -> K26Config | None:
    """The core's configuration, or None for a checkpoint whose experts are not the published INT4.

    Such a one (NVFP4, bf16) is vLLM's to serve. Raises ConfigError for anything else that is not this model.
    """
    try:
        return K26Config.from_dict(hf_config.to_dict())
    except UnsupportedQuantizationError as error:
        logger.warning("Kimi-K2.6 without the published INT4 experts keeps vLLM's own experts and loader: %s", error)
        return None


def prepare(model_config: Any) -> None:
    """Validate the configuration, give vLLM's spelling the core's values, and check a local checkpoint's headers.

    Raises ConfigError or CheckpointError, which stop the start in the process that the user looks at.
    """
    if model_config.tokenizer_mode == "auto":
        model_config.tokenizer_mode = compat.TOKENIZER_MODE
    config = core_config(model_config.hf_config)
    if config is None:
        return
    _write_back(config, model_config.hf_config)
    _check_headers(Path(model_config.model))


def _write_back(config: K26Config, hf_config: Any) -> None:
    vision = hf_config.vision_config
    # transformers' class knows only its own names and fills them with the real model's sizes.
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
        setattr(vision, name, getattr(config.vision, name))
    for name in ("height", "width", "time"):
        setattr(vision, f"pos_emb_{name}", getattr(config.vision, f"pos_emb_{name}"))
    hf_config.projection_layer_norm_eps = config.vision.projector_ln_eps
    hf_config.image_token_id = config.media_placeholder_token_id
    hf_config.media_placeholder_token_id = config.media_placeholder_token_id
    # The router compares scores that bfloat16 cannot tell apart; vLLM reads this name for its logits' dtype.
    hf_config.text_config.moe_router_dtype = "float32"


def _check_headers(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        return  # a name on the hub, or dummy weights: what arrives is checked while it is loaded
    problems = check(folder).problems
    if problems:
        shown = "\n".join(
            f"  {problem.fault}: {problem.name} {problem.message}" for problem in problems[:NUM_PROBLEMS_SHOWN]
        )
        more = f"\n  and {len(problems) - NUM_PROBLEMS_SHOWN} more" if len(problems) > NUM_PROBLEMS_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint in {folder} has {len(problems)} faults:\n{shown}{more}\n"
            f"Run `k26 check {folder}` for all of them."
        )
