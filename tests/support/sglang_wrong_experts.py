"""SGLang's experts with what issues tell of some GPUs: each token gets the first one's. A plugin of the tests' own."""

from __future__ import annotations

from typing import Any


def register() -> None:
    from sglang.srt.layers.quantization import unquant

    right = unquant.UnquantizedFusedMoEMethod.apply

    def apply(method: Any, layer: Any, dispatch_output: Any) -> Any:
        result = right(method, layer, dispatch_output)
        states = result.hidden_states
        return result._replace(hidden_states=states[:1].expand(states.shape).clone())

    unquant.UnquantizedFusedMoEMethod.apply = apply
