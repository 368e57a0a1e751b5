"""Makes SGLang's unquantized experts wrong as issues report of some GPUs: every token gets the first token's result.

Every process of the server loads this test plugin; the self-test at load must notice the fault and stop the start.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Replace the experts' computation by the faulty one."""
    from sglang.srt.layers.quantization import unquant

    right = unquant.UnquantizedFusedMoEMethod.apply

    def apply(method: Any, layer: Any, dispatch_output: Any) -> Any:
        result = right(method, layer, dispatch_output)
        states = result.hidden_states
        return result._replace(hidden_states=states[:1].expand(states.shape).clone())

    unquant.UnquantizedFusedMoEMethod.apply = apply
