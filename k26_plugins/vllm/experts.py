"""Brings the core's INT4 experts into vLLM's fused-MoE layers, as a quantization method (`K26ExpertsMethod`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from k26_plugins.common.adapters.experts import answer_with, backend_of_layer, core_serves_layer, require_config
from k26_plugins.common.experts import ExpertsError, why_unsupported
from k26_plugins.common.experts.base import Batches, LayerSizes
from k26_plugins.common.experts.loading import ExpertsOfLayer, Places
from k26_plugins.common.experts.parameters import LayerExperts, loader_attributes
from k26_plugins.common.settings import EXPERTS
from k26_plugins.vllm import compat, logger
from k26_plugins.vllm.modular import K26Experts, experts_for


class K26ExpertsMethod(FusedMoEMethodBase):
    """The quantization method of one fused-MoE layer whose routed experts the core computes.

    It creates the weights in the checkpoint's packed form. After they are loaded, a backend of the core repacks them in
    place.
    """

    experts: LayerExperts
    moe_kernel: Any

    def __init__(self, moe: FusedMoEConfig, backend_name: str) -> None:
        super().__init__(moe)
        self.backend_name = backend_name

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the layer's parameters in the checkpoint's packed form."""
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        self.experts = LayerExperts(layer, *sizes, self.backend_name, loader_attributes(extra_weight_attrs))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Give the loaded parameters to the backend, and build vLLM's kernel around it if vLLM needs one."""
        expert_map, moe = layer.expert_map, self.moe
        num_global = None if expert_map is None else len(expert_map)
        by_expert = moe.moe_parallel_config.use_batched_activation_format
        self.experts.close(Batches(moe.experts_per_token, num_global, moe.in_dtype, logger, by_expert))
        if self.moe_kernel is None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            if compat.kernel_takes_experts_only():
                self.moe_kernel = compat.make_kernel(self, layer, self._make_experts)

    def _make_experts(self, moe: FusedMoEConfig, quant_config: Any, prepare_finalize: Any) -> K26Experts:
        return experts_for(prepare_finalize, moe, quant_config, self.experts)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> Any:
        """Return vLLM's configuration of layers that are not quantized."""
        # vLLM sees no quantization: activations are not quantized, and the core dequantizes the weights.
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def maybe_make_prepare_finalize(self, *args: Any, **kwargs: Any) -> None:
        """Return None, so that vLLM 0.19.1 builds no kernel around this method, which applies the experts itself."""
        return None

    @property
    def supports_eplb(self) -> bool:
        """Return True, because the layer's parameters are the only copy of the weights."""
        return True

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the routed sum of `x`."""
        if self.moe_kernel is None:
            result = torch.empty_like(x, memory_format=torch.contiguous_format)
            self.experts.apply(result, x, topk_weights, topk_ids, layer.expert_map)
            return result
        w1, w2 = self.experts.matrices()
        output: torch.Tensor = self.moe_kernel.apply(
            x,
            w1,
            w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        return output


def experts_of(model: torch.nn.Module) -> dict[int, ExpertsOfLayer]:
    """Return the layers of a model whose experts `K26ExpertsMethod` serves, by the number of the layer."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, K26ExpertsMethod) and method.experts.layer is module:
            number = layer_number(name)
            experts, physical_ids = method.experts, compat.physical_ids(module)
            slots = cache(partial(_slots, physical_ids, compat.local_places(module)))
            moe: Any = module.moe_config
            parallel = moe.moe_parallel_config
            places = Places([experts], slots, parallel.tp_rank, parallel.tp_size)
            found[number] = ExpertsOfLayer(
                module, experts, experts.open, experts.close, physical_ids, partial(_is_local, slots), places
            )
    return found


def layer_number(name: str) -> int:
    """Return the number of the decoder layer that a module belongs to, from the module's name in the model."""
    return int(name.partition("layers.")[2].partition(".")[0])


def _slots(
    physical_ids: Callable[[int], Iterable[int]], local_places: Sequence[int] | None, expert: int
) -> list[tuple[int, int]]:
    ids = physical_ids(expert)
    places = ids if local_places is None else [local_places[number] for number in ids]
    return [(0, place) for place in places if place >= 0]


def _is_local(slots: Callable[[int], Sequence[tuple[int, int]]], expert: int) -> bool:
    return bool(slots(expert))


def use_core_experts(vllm_config: Any, setting: str, *, required: bool = True) -> None:
    """Make this model's quantization configuration return `K26ExpertsMethod` for routed experts.

    All other layers keep vLLM's methods.

    setting: a backend's name, or `auto`, which each layer resolves for its device. required: whether vLLM's experts may
    not take the place of the core's, whatever was measured to be faster. Raises UnsupportedEngineError if the core's
    experts are required and vLLM read the checkpoint's quantization as another one than compressed-tensors.
    """
    quant_config, base = vllm_config.quant_config, compat.compressed_tensors_config()
    if not required and not isinstance(quant_config, base):
        return
    remedy = "remove --quantization, or set K26_EXPERTS=engine to keep vLLM's experts"
    require_config(quant_config, base, f"vLLM {compat.vllm_version()}", remedy)

    def ours(layer: torch.nn.Module) -> K26ExpertsMethod | None:
        if not compat.is_routed_experts(layer):
            return None
        moe: Any = layer.moe_config
        sizes, serves = partial(sizes_of, moe), partial(core_serves, moe)
        name = backend_of_layer(setting, sizes, "vllm", logger, by_name=required, serves=serves)
        return None if name is None else K26ExpertsMethod(moe, name)

    answer_with(quant_config, "get_quant_method", ours)


def sizes_of(moe: FusedMoEConfig) -> LayerSizes:
    """Return the sizes of this rank's part of a layer whose weights are about to be created on the default device."""
    return LayerSizes(
        moe.num_local_experts, moe.hidden_dim, moe.intermediate_size_per_partition, torch.get_default_device()
    )


def core_serves(moe: FusedMoEConfig, backend_name: str) -> bool:
    """Return whether the core's experts can serve a layer as vLLM runs it here. The layer's weights do not exist yet.

    If the experts cannot serve it, the layer is left to vLLM; but if the user named a backend, raise ExpertsError.
    """
    sizes = sizes_of(moe)
    reason = why_unsupported(sizes, backend_name)
    # This reason does not replace one found above: that would hold even if the user did what this message advises.
    if reason is None and moe.moe_parallel_config.use_batched_activation_format and EXPERTS.read() == "auto":
        reason = (
            f"--all2all-backend {moe.moe_parallel_config.all2all_backend} hands each expert its tokens in a buffer of its "
            f"own, which nothing was measured with: {EXPERTS.variable}={backend_name} takes them"
        )
    if reason is not None and EXPERTS.read() != "auto":
        raise ExpertsError(
            f"{EXPERTS.variable}={backend_name} cannot serve here: {reason}. Or unset {EXPERTS.variable} for vLLM's own."
        )
    return core_serves_layer(logger, "vLLM", backend_name, sizes.device, reason)
