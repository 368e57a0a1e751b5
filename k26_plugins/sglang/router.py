"""Computes the router's logits in float32: the choice of experts depends on scores that bfloat16 cannot tell apart."""

from __future__ import annotations

from typing import Any

import torch

from k26_plugins.common.model.router import router_logits
from k26_plugins.sglang import compat


class K26Gate(compat.router_gate()):  # type: ignore[misc]
    """SGLang's router gate with logits that are always float32.

    SGLang's own kernels give float32 on most NVIDIA GPUs and for most numbers of tokens, and bfloat16 elsewhere.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the router's logits, float32 [tokens, experts]. hidden_states: [tokens, hidden size]."""
        if hidden_states.device.type == "cpu" or not compat.is_cuda():
            # SGLang's product is not computed here: with AITER and on CPUs it gives bfloat16 and would be thrown away,
            # and sglang-kt would compile a CUDA kernel for it.
            return router_logits(hidden_states, self.weight)
        logits: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
        return logits if logits.dtype == torch.float32 else router_logits(hidden_states, self.weight)


def use_float32_logits(model: torch.nn.Module) -> None:
    """Turn every router gate of a model into a `K26Gate`, in place."""
    for module in model.modules():
        if type(module) is compat.router_gate():
            module.__class__ = K26Gate
            # On a CPU with AMX this method would repack the weight for a kernel that gives bfloat16.
            if hasattr(module, "quant_method"):
                del module.quant_method
