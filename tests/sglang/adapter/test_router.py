"""Tests of the router's logits, which our gate gives in float32."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.platforms import SGLANG_PLATFORMS
from torch.utils._python_dispatch import TorchDispatchMode

from k26_plugins.sglang import compat


def test_the_router_s_logits_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU our gate gives logits that have float32's precision, where the in-tree gate gives bfloat16."""
    from k26_plugins.sglang.router import use_float32_logits

    gate: Any = torch.nn.Module.__new__(compat.router_gate())
    torch.nn.Module.__init__(gate)
    gate.weight = torch.nn.Parameter(torch.randn(8, 64).bfloat16(), requires_grad=False)
    gate.quant_method = None
    use_float32_logits(torch.nn.ModuleList([gate]))
    in_tree = torch.randn(3, 8).bfloat16()
    monkeypatch.setattr(compat.router_gate(), "forward", lambda self, x: in_tree)
    hidden_states = torch.randn(3, 64).bfloat16()
    expected = hidden_states.double() @ gate.weight.double().T
    torch.testing.assert_close(gate(hidden_states).double(), expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(gate, "quant_method")


class CountedProducts(TorchDispatchMode):
    """A torch mode that counts the matrix products that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.dtype, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(find_spec("sglang.srt.arg_groups") is None, reason="this SGLang has no platform to pretend")
def test_on_rocm_the_router_computes_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended ROCm device, whose tensors have no data, our gate gives float32 logits and SGLang's own bfloat16;
    each computes one matrix product."""
    from sglang.srt.runtime_context import override_platform

    from k26_plugins.sglang.router import K26Gate

    gate = K26Gate.__new__(K26Gate)
    torch.nn.Module.__init__(gate)
    gate.weight = torch.nn.Parameter(torch.empty(8, 64, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    gate.tiny_router_gemm_max_tokens = -1
    settings = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
    monkeypatch.setattr("sglang.srt.models.deepseek_v2.get_exec", lambda: settings)
    hidden_states = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    with override_platform(**SGLANG_PLATFORMS["gfx942"]):
        with CountedProducts() as in_tree:
            assert compat.router_gate().forward(gate, hidden_states).dtype == torch.bfloat16  # type: ignore[attr-defined]
        with CountedProducts() as ours:
            assert gate(hidden_states).dtype == torch.float32
    assert ours.count == in_tree.count == 1
