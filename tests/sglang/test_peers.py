"""Tests of SGLang's kernels as `k26 tune` calls them, as far as a machine without a GPU can show.

SGLang has the names, takes the arguments, and finds the parts of a server that its kernels read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' package needs Triton")
from support.peers import stand_ins

from k26_plugins.operate.tune.measure import random_weights
from k26_plugins.operate.tune.routing import Layer
from k26_plugins.sglang import peers

SCHEME = "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe"
if not hasattr(import_module(SCHEME), "gptq_marlin_moe_repack"):
    pytest.skip("this SGLang has its kernels elsewhere", allow_module_level=True)
CPU = torch.device("cpu")
EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 256, 128, 3, 2
FEW = Layer("few", HIDDEN, INNER, EXPERTS)
MAP = torch.tensor([0, 1, -1, -1, 2, 3], dtype=torch.int32)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return stand_ins(monkeypatch)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 5], [1, 4]], dtype=torch.int32)
    return x, torch.rand(TOKENS, TOP_K), ids


def test_marlin(stand_in: Callable[..., None]) -> None:
    given: dict[str, Any] = {}

    def product(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        given.update(options, ids=rest[4])
        return torch.ones_like(x)

    stand_in(SCHEME, "gptq_marlin_moe_repack", lambda packed, *sizes: packed)
    stand_in(SCHEME, "marlin_make_workspace", lambda device, programs: None)
    stand_in("sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe", "fused_marlin_moe", product)
    assert peers.sglang_marlin(random_weights(FEW, CPU))(*batch(), MAP).shape == (TOKENS, HIDDEN)
    assert given["ids"].tolist() == [[0, 1], [-1, 3], [1, 2]]
    assert given["global_num_experts"] == len(MAP)


def test_triton(stand_in: Callable[..., None]) -> None:
    """The call reaches SGLang's operator, and the parts of a server that its kernels read, the settings and the groups
    of ranks, are there."""
    from sglang.srt.runtime_context import get_exec, get_parallel

    given: list[dict[str, Any]] = []

    def product(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        given.append({"ids": arguments[3], **options})
        return torch.ones_like(x)

    stand_in("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe", "outplace_fused_experts", product)
    run = peers.sglang_triton(random_weights(FEW, CPU))
    assert get_exec().deterministic.enable_deterministic_inference is False
    assert get_parallel().tp_group.world_size == 1
    assert run(*batch(), MAP).shape == (TOKENS, HIDDEN)
    assert given[0]["ids"].tolist() == [[0, 1], [-1, 3], [1, 2]]
