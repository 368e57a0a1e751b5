"""Kimi-K2.6 in vLLM: the in-tree class, with what the core defines put in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from k26_plugins.common.checkpoint import account
from k26_plugins.common.ranks import require_everywhere
from k26_plugins.common.settings import ENGINE, EXPERTS_VARIABLE, core_media, experts_for_device
from k26_plugins.vllm import compat, logger
from k26_plugins.vllm.experts import use_core_experts
from k26_plugins.vllm.processing import K26MultiModalProcessor, K26ProcessingInfo

_in_tree = compat.in_tree_model()
_MEDIA = (
    (K26MultiModalProcessor, K26ProcessingInfo)
    if core_media()
    else (_in_tree.KimiK25MultiModalProcessor, _in_tree.KimiK25ProcessingInfo)
)


@MULTIMODAL_REGISTRY.register_processor(_MEDIA[0], info=_MEDIA[1], dummy_inputs=_in_tree.KimiK25DummyInputsBuilder)
class KimiK25ForConditionalGeneration(_in_tree.KimiK25ForConditionalGeneration):  # type: ignore[misc, name-defined]
    """Keeps the in-tree class' name: vLLM compares names."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        require_everywhere("VLLM_PLUGINS")
        self.core_config = vllm_config.model_config.k26_plugins.core_config
        self.expert_parallel = vllm_config.parallel_config.enable_expert_parallel
        self.weights_loaded = False
        backend = experts_for_device(current_platform.device_type)
        if self.core_config is not None and backend == ENGINE:
            logger.info("k26-plugins: vLLM's own INT4 experts are kept (%s chooses).", EXPERTS_VARIABLE)
        elif self.core_config is not None:
            use_core_experts(vllm_config, backend)
        if current_platform.is_cpu():
            compat.use_cpu_prefill_backend("k26_plugins.vllm.attention.K26CPUPrefillBackend")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # Later calls update some of the weights of a running server (RLHF); only the first must be whole.
        if self.core_config is not None and not self.weights_loaded:
            weights = account(weights, self.core_config, all_experts=not self.expert_parallel)
        loaded: set[str] = super().load_weights(weights)
        self.weights_loaded = True
        return loaded
