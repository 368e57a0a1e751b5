"""SGLang's INT4 experts where they are chosen, as on a GPU, with a kernel that gives nothing. A plugin of the tests' own.

SGLang's parameters and loader are as they are; what needs a GPU, the repacking and the kernel, is not called.
"""

from __future__ import annotations

from typing import Any

import torch


def register() -> None:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16MoE

    from k26_plugins.common.adapters import experts as module
    from k26_plugins.common.settings import ENGINE

    def process(scheme: Any, layer: Any) -> None:
        """Put the weights into another layout, as kernels do: what was loaded is gone."""
        for name in ("w13_weight_packed", "w2_weight_packed"):
            layer.get_parameter(name).data.zero_()

    def apply(scheme: Any, layer: Any, dispatch_output: Any) -> Any:
        return StandardCombineInput(hidden_states=torch.zeros_like(dispatch_output.hidden_states))

    experts: Any = module
    experts.backend_for = lambda *arguments: ENGINE
    CompressedTensorsWNA16MoE.get_min_capability = classmethod(lambda cls: 0)
    CompressedTensorsWNA16MoE.create_moe_runner = lambda *arguments: None
    CompressedTensorsWNA16MoE.process_weights_after_loading = process
    CompressedTensorsWNA16MoE.apply_weights = apply
