"""SGLang's experts with what issues tell of some GPUs: each token gets the first one's. A plugin of the tests' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from support.entry_point import write_entry_point
from support.server import python_path


def register() -> None:
    from sglang.srt.layers.quantization import unquant

    right = unquant.UnquantizedFusedMoEMethod.apply

    def apply(method: Any, layer: Any, dispatch_output: Any) -> Any:
        result = right(method, layer, dispatch_output)
        states = result.hidden_states
        return result._replace(hidden_states=states[:1].expand(states.shape).clone())

    unquant.UnquantizedFusedMoEMethod.apply = apply


def settings(folder: Path) -> dict[str, str]:
    """What to set for the server. folder: an empty one, for the plugin's metadata."""
    write_entry_point(folder, "k26_wrong_experts", "sglang.srt.plugins", "support.sglang_wrong_experts:register")
    return {"PYTHONPATH": os.pathsep.join([str(folder), python_path()])}
