"""Lets vLLM serve LoRA adapters for the language model. vLLM's own class for Kimi-K2.6 takes none."""

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
# An adapter on these modules would silently change nothing: MLA multiplies kv_b_proj into its neighbours when the
# weights are loaded, and no trainer has the router as a linear layer.
WITHOUT_ADAPTERS = {"kv_b_proj", "gate"}


class TakesAdapters:
    """A base of the model class with the attributes that vLLM looks up before it puts LoRA adapters on its layers."""

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
        """Return which modules are the language model, the projector and the vision tower."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="mm_projector", tower_model="vision_tower"
        )


def prepare_adapters(vllm_config: Any) -> None:
    """Put the hooks for LoRA adapters in place before the model is built. Without `--enable-lora` do nothing."""
    if vllm_config.lora_config is not None:
        compat.ENGINE.hook(modules_with_adapters, names.SUPPORTED_LORA_MODULES)
        if current_platform.is_cpu():
            compat.ENGINE.hook(only_with_adapter, names.BGMV_SHRINK_OF_DECODING, names.BGMV_SHRINK_OF_PREFILL)


def modules_with_adapters(original: Callable[[Any], list[str]], model: Any) -> list[str]:
    """Wrap vLLM's `get_supported_lora_modules` so that it lists only modules on which an adapter has an effect.

    Returns the last parts of the modules' names. vLLM refuses an adapter for any other module and names that module.
    """
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
    """Wrap vLLM's `bgmv_shrink` on a CPU so that an adapter does not change tokens of requests without one.

    The row of such a token in `output` becomes zero, and so does what the second product adds for it. Before 0.33 vLLM
    on a CPU uses the token's index, -1, as the index of the last adapter: requests without an adapter that ran beside
    requests with one got answers of that adapter.
    """
    original(inputs, weights, output, lora_indices, *rest, **options)
    output[lora_indices == -1] = 0
