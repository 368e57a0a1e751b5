"""Tests the routed experts that vLLM's own code computes before they serve, and puts the core's in their place if they
are wrong. The test calls the layer's own quantization method."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.experts.engine_test import (
    EngineLayer,
    UntestableError,
    files_read,
    require_replaceable,
    stop,
    watch_layers,
)
from k26_plugins.common.experts.loading import load_experts
from k26_plugins.common.experts.triton import TritonExperts
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.settings import EXPERTS
from k26_plugins.vllm import compat, logger
from k26_plugins.vllm.experts import K26ExpertsMethod, core_serves, experts_of, layer_number


def watch_engine_experts(model: torch.nn.Module, config: K26Config | None) -> None:
    """Have the experts that vLLM's own methods compute tested as soon as their weights are loaded and repacked.

    If their results are wrong, the core's experts take their place, or the loading ends with an ExpertsError if the
    core's experts cannot. config: the model's configuration if the checkpoint is in the published layout, the only one
    that the core's experts can serve; None for another layout.
    """
    found = {layer_number(name): module for name, module in model.named_modules() if is_vllms(module)}

    def on_wrong(wrong: str) -> None:
        use_core_instead(model, list(found.values()), config, wrong)

    watch_layers("vLLM", logger, {number: partial(_layer, module) for number, module in found.items()}, on_wrong)


def use_core_instead(model: torch.nn.Module, modules: Sequence[Any], config: K26Config | None, wrong: str) -> None:
    """Give the layers the core's method and load their experts again from the same files.

    modules: vLLM's layers with routed experts. wrong: what is wrong with vLLM's, for messages. Raises ExpertsError if
    the core's experts cannot serve here.
    """
    require_replaceable(wrong, "vLLM", published_layout=config is not None)
    assert config is not None
    if getattr(modules[0].moe_config.moe_parallel_config, "enable_eplb", False):
        stop(wrong, f"EPLB moves experts between ranks that keep theirs. Set {EXPERTS.variable}={TritonExperts.name}")
    device = next(modules[0].parameters(recurse=False)).device
    backend_name = TritonExperts.name if device.type == TritonExperts.device_type else "auto"
    with device:
        if not core_serves(modules[0].moe_config, backend_name):
            stop(wrong, "the log says why")
        logger.warning("k26-plugins: %s. The core's take their place: the experts are loaded again.", wrong)
        for module in modules:
            for name in [
                name for name, _ in module.named_parameters(recurse=False) if name.startswith(("w13_", "w2_"))
            ]:
                delattr(module, name)
            method = K26ExpertsMethod(module.moe_config, backend_name)
            method.create_weights(
                module,
                module.moe_config.num_local_experts,
                module.moe_config.hidden_dim,
                module.moe_config.intermediate_size_per_partition,
                module.moe_config.in_dtype,
                weight_loader=module.weight_loader,
            )
            module.quant_method = method
        tensors = mapped_tensors([Path(file) for file in files_read])
        for _ in load_experts(tensors, config, experts_of(model)):
            pass  # `load_experts` loads the routed experts; the tensors that it passes on are loaded already
        for module in modules:
            module.quant_method.process_weights_after_loading(module)


def is_vllms(module: torch.nn.Module) -> bool:
    """Return whether a module holds routed experts that vLLM's own method computes."""
    method = getattr(module, "quant_method", None)
    return (
        method is not None
        and compat.is_routed_experts(module)
        and next(module.parameters(recurse=False), None) is not None
        and not isinstance(method, K26ExpertsMethod)
    )


def _layer(module: Any) -> EngineLayer:
    def global_ids(local: list[int]) -> list[int]:
        places = compat.local_places(module)
        return local if places is None else [places.index(place) for place in local]

    def computed(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        method = module.quant_method
        if getattr(method, "is_monolithic", False):
            raise UntestableError("their kernel routes the tokens by itself")
        parallel = module.moe_config.moe_parallel_config
        if parallel.dp_size > 1:
            raise UntestableError("their tokens come from other ranks")
        ids = topk_ids.to(getattr(method, "topk_indices_dtype", None) or torch.int32)
        # The further parameters that some releases require are for shared experts and of no use here, so they get None.
        more = list(inspect.signature(method.apply).parameters.values())[4:]
        result = method.apply(module, x, topk_weights, ids, *(None for one in more if one.default is one.empty))
        if not isinstance(result, torch.Tensor):
            raise UntestableError(f"their method gives a {type(result).__name__}")
        return result

    return EngineLayer(
        module, module.quant_method, lambda: kernel_name(module.quant_method), module.top_k, global_ids, computed
    )


def kernel_name(method: Any) -> str:
    """Return the name of the class that computes the experts: that of the method's kernel, or the method's own."""
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return type(method if experts is None else experts).__name__
