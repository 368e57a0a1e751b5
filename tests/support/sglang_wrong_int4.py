"""Makes a server on a CPU choose SGLang's own INT4 experts, as on a GPU, with a kernel whose result is zero.

SGLang's parameters and loader stay; its repacking and its kernel, which need a GPU, are replaced. Every process of the
server loads this test plugin; the self-test at load must notice that the results are wrong.
"""

from __future__ import annotations

from typing import Any

import torch


def register() -> None:
    """Have the plugin leave the experts to SGLang, and replace those methods of SGLang's scheme that need a GPU."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16MoE

    from k26_plugins.common.adapters import experts as module
    from k26_plugins.common.settings import ENGINE

    def process(scheme: Any, layer: Any) -> None:
        """Zero the packed weights, because after a kernel's repacking, too, the loaded values are gone."""
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
