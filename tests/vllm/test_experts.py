"""Tests of which layers the core's experts serve, and of what happens to layers that they cannot serve."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.eplb import assert_moved_experts_compute_as_before
from support.experts import error, inputs, judge, make_weights, route
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)

from k26_plugins.common.experts import Batches, ExpertsError
from k26_plugins.common.experts.parameters import PACKED_NAMES, LayerExperts
from k26_plugins.vllm import compat, logger
from k26_plugins.vllm.experts import K26ExpertsMethod, core_serves, use_core_experts
from k26_plugins.vllm.modular import experts_for


def quant_config(folder: Path) -> Any:
    """Return vLLM's own reading of the checkpoint's quantization configuration."""
    settings = json.loads((folder / "config.json").read_text())["text_config"]["quantization_config"]
    return compat.compressed_tensors_config().from_config(settings)


def moe_config(intermediate_size: int = 64, **parallel: Any) -> FusedMoEConfig:
    """Return the configuration of a small layer on one rank, with the fields in `parallel` changed."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    values: dict[str, Any] = {
        "num_experts": 8,
        "experts_per_token": 2,
        "hidden_dim": 128,
        "num_local_experts": 8,
        "num_logical_experts": 8,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.DeepSeekV3,
        "moe_parallel_config": dataclasses.replace(FusedMoEParallelConfig.make_no_parallel(), **parallel),
        "in_dtype": torch.bfloat16,
        "intermediate_size": intermediate_size,
        # vLLM 0.19.1 takes the size of a rank's part instead.
        "intermediate_size_per_partition": intermediate_size,
    }
    names = {field.name for field in dataclasses.fields(FusedMoEConfig) if field.init}
    if "intermediate_size" in names:
        del values["intermediate_size_per_partition"]
    return FusedMoEConfig(**{name: value for name, value in values.items() if name in names})


def test_only_routed_experts_get_our_method(tiny_folder: Path) -> None:
    class VllmConfig:
        quant_config: Any = None

    VllmConfig.quant_config = quant_config(tiny_folder)
    untouched = quant_config(tiny_folder)
    use_core_experts(VllmConfig, "cpu")
    layer = torch.nn.Module()
    layer.moe_config = moe_config()
    method = VllmConfig.quant_config.get_quant_method(layer, "model.layers.1.mlp.experts")
    assert isinstance(method, K26ExpertsMethod)
    # A server of the encoder on a CPU has the layers that it does not load on the device "meta".
    use_core_experts(VllmConfig, "auto")
    with torch.device("meta"):
        method = VllmConfig.quant_config.get_quant_method(layer, "model.layers.1.mlp.experts")
    assert isinstance(method, K26ExpertsMethod)
    assert isinstance(VllmConfig.quant_config, compat.compressed_tensors_config())
    assert type(untouched) is compat.compressed_tensors_config()


CANNOT: dict[str, tuple[dict[str, Any], str, str]] = {
    "a device": ({}, "triton", "triton is not, because the Triton kernels run on CUDA and ROCm GPUs, not on cpu"),
    "sizes": ({"intermediate_size": 48}, "cpu", "tensor parallelism leaves 48 of moe_intermediate_size"),
}
"""(Changes of the layer's configuration, the core's backend that cannot serve the layer, the reason in the error) of
each case."""


@pytest.mark.parametrize("name", CANNOT)
def test_what_the_core_cannot_serve_is_asked_before_weights_are_created(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """If K26_EXPERTS names a backend that cannot serve the layer, an error says so; else vLLM's experts serve."""
    changed, backend, said = CANNOT[name]
    moe = moe_config(**changed)
    monkeypatch.setenv("K26_EXPERTS", backend)
    with pytest.raises(ExpertsError, match=rf"K26_EXPERTS={backend} cannot serve here: {said}.*unset K26_EXPERTS"):
        core_serves(moe, backend)
    monkeypatch.delenv("K26_EXPERTS")
    monkeypatch.setattr("k26_plugins.vllm.logger.propagate", True)
    assert not core_serves(moe, backend)
    assert f"vLLM's own INT4 experts are kept; the core's cannot serve here: {said}" in caplog.text


def test_deepep_for_throughput_is_served() -> None:
    assert core_serves(moe_config(dp_size=2, use_ep=True, all2all_backend="deepep_high_throughput"), "cpu")


def test_deepep_for_low_latency_is_served_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moe = moe_config(dp_size=2, use_ep=True, all2all_backend="deepep_low_latency")
    monkeypatch.setattr("k26_plugins.vllm.logger.propagate", True)
    assert not core_serves(moe, "cpu")
    assert "--all2all-backend deepep_low_latency hands each expert its tokens" in caplog.text
    monkeypatch.setenv("K26_EXPERTS", "cpu")
    assert core_serves(moe, "cpu")


@pytest.mark.skipif(find_spec("vllm.distributed.eplb.eplb_communicator") is None, reason="moved by other names before")
@pytest.mark.long
def test_experts_that_vllm_moves_compute_as_before() -> None:
    """vLLM's EPLB policy and transfer run on two ranks, and a decode and a prefill are computed as before. There is no
    server, because a server has EPLB on GPUs alone."""
    assert_moved_experts_compute_as_before("vllm")


@pytest.mark.skipif(not compat.kernel_takes_experts_only(), reason="before, the kernel took more than experts")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tokens_in_a_buffer_of_each_experts_own(backend: str) -> None:
    """vLLM's modular kernel with the core's experts, and with vLLM's own plain dispatch in the place of DeepEP's, gives
    the sum that float64 gives."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
    from vllm.model_executor.layers.fused_moe.prepare_finalize.batched import BatchedPrepareAndFinalize

    num_tokens, moe = 9, moe_config()
    weights = make_weights(8, 128, 64)
    layer = torch.nn.Module()
    experts = LayerExperts(layer, 8, 128, 64, backend, lambda parameter: None)
    for name, tensor in zip(PACKED_NAMES, weights.parts(), strict=True):
        layer.get_parameter(name).data.copy_(tensor)
    experts.close(Batches(2, None, torch.bfloat16, logger, by_expert=True))
    prepare_finalize = BatchedPrepareAndFinalize(num_tokens, num_local_experts=8, num_dispatchers=1, rank=0)
    kernel = FusedMoEKernel(prepare_finalize, experts_for(prepare_finalize, moe, FUSED_MOE_UNQUANTIZED_CONFIG, experts))
    ids, topk_weights = route(num_tokens, 2, 8)
    x = inputs(num_tokens, 128)
    w1, w2 = experts.matrices()
    with set_current_vllm_config(VllmConfig()):
        found = kernel.apply(
            x.clone(), w1, w2, topk_weights=topk_weights, topk_ids=ids, activation=moe.activation, global_num_experts=8,
            expert_map=None, apply_router_weight_on_input=False,
        )  # fmt: skip
    assert error(found, judge(weights, x, ids, topk_weights)) <= 6e-3
