"""Tests of vLLM's kernels as `k26 tune` calls them, as far as a machine without a GPU can show: vLLM has the names and
takes the arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' package needs Triton")
from support.peers import stand_ins

from k26_plugins.operate.tune.measure import random_weights
from k26_plugins.operate.tune.routing import Layer
from k26_plugins.vllm import peers

CPU = torch.device("cpu")
EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 256, 128, 3, 2
FEW = Layer("few", HIDDEN, INNER, EXPERTS)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return stand_ins(monkeypatch)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32)
    return x, torch.rand(TOKENS, TOP_K), ids


def ones(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    return torch.ones_like(x)


def test_marlin(stand_in: Callable[..., None]) -> None:
    weights = random_weights(FEW, CPU)
    stand_in("vllm._custom_ops", "gptq_marlin_moe_repack", lambda packed, *sizes: packed)
    stand_in("vllm.model_executor.layers.fused_moe.experts.marlin_moe", "fused_marlin_moe", ones)
    for expert_map in (None, torch.tensor([0, 1, 2, 3, -1, -1], dtype=torch.int32)):
        assert peers.vllm_marlin(weights)(*batch(), expert_map).shape == (TOKENS, HIDDEN)


def test_triton(stand_in: Callable[..., None]) -> None:
    weights = random_weights(FEW, CPU)
    stand_in("vllm.model_executor.layers.fused_moe.fused_moe", "fused_experts", ones)
    assert peers.vllm_triton(weights)(*batch(), None).shape == (TOKENS, HIDDEN)


def test_flashinfer(stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's kernel routes by itself, so it is given logits from which it chooses our experts, in the proportion
    of our routing weights."""
    module = "vllm.model_executor.layers.quantization.utils.flashinfer_mxint4_moe"
    asked: dict[str, torch.Tensor] = {}

    def run(x: torch.Tensor, router_logits: torch.Tensor, **options: Any) -> torch.Tensor:
        asked["logits"] = router_logits
        return torch.ones_like(x)

    tensors = ("gemm1_weights", "gemm1_scales", "gemm2_weights", "gemm2_scales")
    stand_in(
        module, "prepare_static_weights_for_trtllm_mxint4_moe", lambda *given: dict(zip(tensors, given, strict=True))
    )
    stand_in(module, "flashinfer_trtllm_mxint4_moe", run)
    monkeypatch.setattr(peers, "require", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    routing = SimpleNamespace(RoutingMethodType=SimpleNamespace(DeepSeekV3=2))
    monkeypatch.setitem(sys.modules, "flashinfer", routing)
    x, topk_weights, ids = batch()
    out = peers.flashinfer_mxint4(random_weights(FEW, CPU))(x, topk_weights, ids, None)
    torch.testing.assert_close(out[:, 0].float(), topk_weights.sum(-1), rtol=1e-2, atol=0)
    scores = torch.sigmoid(asked["logits"])
    chosen = scores.topk(TOP_K, dim=-1)
    assert torch.equal(chosen.indices.sort().values, ids.long().sort().values)
    torch.testing.assert_close(scores.gather(1, ids.long()), topk_weights, rtol=1e-3, atol=1e-3)


def test_humming_puts_vllms_parts_together(stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's alignment, SwiGLU and weighted sum stand around Humming's GEMMs, which are replaced here, because they
    need Humming's package and a GPU."""
    calls: list[dict[str, Any]] = []

    class Layer(torch.nn.Module):
        humming_config = object()

        def __init__(self, *, shape_n: int, shape_k: int, num_experts: int, **options: Any) -> None:
            super().__init__()
            self.shape_n = shape_n

        def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
            assert {name: len(tensor) for name, tensor in tensors.items()} == {"weight_packed": 4, "weight_scale": 4}

        def transform(self) -> None: ...

        def forward(self, inputs: torch.Tensor, **options: Any) -> torch.Tensor:
            calls.append(options)
            return torch.ones(TOKENS * TOP_K, self.shape_n, dtype=inputs.dtype)

    tiles = [(0, 100, {"block_shape": (16, 64, 64)})]
    modules = {
        "humming": SimpleNamespace(),
        "humming.layer": SimpleNamespace(HummingLayer=Layer),
        "humming.tune": SimpleNamespace(get_heuristics_config=lambda config, gemm_type, device: tiles),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "require", lambda name: None)
    fused = "vllm.model_executor.layers.fused_moe"
    stand_in(
        f"{fused}.moe_align_block_size", "moe_align_block_size", lambda ids, size, *rest, **options: (ids, ids, ids)
    )
    stand_in(f"{fused}.moe_fused_mul_sum", "moe_fused_mul_sum", lambda inputs, *rest, **options: inputs.sum(1))
    out = peers.humming(random_weights(FEW, CPU))(*batch(), None)
    assert out.shape == (TOKENS, HIDDEN)
    assert [(call["top_k"], call["valid_shape_m"]) for call in calls] == [(TOP_K, 6), (1, 6)]
