"""LoRA adapters of the language model, which vLLM's own class for Kimi-K2.6 takes none of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from k26_plugins.common.checkpoint.adapter_names import SPELLINGS
from k26_plugins.vllm import compat, names
from k26_plugins.vllm.experts import experts_of

NAMES = WeightsMapper(orig_to_new_prefix=SPELLINGS)
# MLA multiplies kv_b_proj into its neighbours when the weights are loaded, and the router is no linear layer in any
# trainer: an adapter on either would change nothing and nobody would be told.
WITHOUT_ADAPTERS = {"kv_b_proj", "gate"}


class TakesAdapters:
    """What vLLM looks up on a model class before it puts adapters on its layers."""

    supports_lora: ClassVar[bool] = True
    is_3d_moe_weight: ClassVar[bool] = False
    is_non_gated_moe: ClassVar[bool] = False
    embedding_modules: ClassVar[dict[str, str]] = {}
    lora_skip_prefixes: ClassVar[list[str]] = []
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "gate_up_proj": ["gate_proj", "up_proj"],
        "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    }
    lora_manager: Any = None

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="mm_projector", tower_model="vision_tower"
        )


def prepare_adapters(vllm_config: Any) -> None:
    """Put the hooks for adapters in place before the model is built. Without `--enable-lora` nothing is done."""
    if vllm_config.lora_config is not None:
        compat.ENGINE.hook(modules_with_adapters, names.SUPPORTED_LORA_MODULES)
        if current_platform.is_cpu():
            compat.ENGINE.hook(only_with_adapter, names.BGMV_SHRINK_OF_DECODING, names.BGMV_SHRINK_OF_PREFILL)


def modules_with_adapters(original: Callable[[Any], list[str]], model: Any) -> list[str]:
    """The last parts of the names of the modules that an adapter may be for: vLLM names the others in its refusal."""
    takes_adapters = isinstance(model, TakesAdapters)
    if not takes_adapters:
        return original(model)
    found = set(original(model.get_language_model())) - WITHOUT_ADAPTERS
    if experts_of(model):
        # The core's experts multiply INT4 weights alone.
        found.discard("experts")
    return sorted(found)


def only_with_adapter(
    original: Callable[..., None],
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    lora_indices: torch.Tensor,
    *rest: Any,
    **options: Any,
) -> None:
    """The row of a token without adapter becomes zero, and with it what the second product adds.

    Before 0.33 vLLM on a CPU takes that token's index, -1, for the last adapter's: beside requests with an adapter, those
    without got its answers.
    """
    original(inputs, weights, output, lora_indices, *rest, **options)
    output[lora_indices == -1] = 0
