"""What runs inside SGLang's scheduler: sent with a request to a server that has `--enable-custom-logit-processor`."""

from __future__ import annotations

import gc
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class Scripted(CustomLogitProcessor):
    """The side of `scripted`: a request's `custom_params` name the token ids of its answer, `{"script": [1, 2, 3]}`."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            request = params["__req__"]
            # SGLang schedules ahead: the request's own list of tokens may be one behind.
            position = getattr(request, "scripted_position", 0)
            request.scripted_position = position + 1
            logits[row] = -torch.inf
            logits[row, params["script"][min(position, len(params["script"]) - 1)]] = 0
        return logits


class Weigh(CustomLogitProcessor):
    """Writes into the server's log what the model's weights take, in bytes: SGLang's own log has hundredths of a GB."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        model = next(found for found in gc.get_objects() if type(found).__name__ == "KimiK25ForConditionalGeneration")
        held = list(model.parameters())
        for module in model.modules():
            held += [tensor for name in ("w_kc", "w_vc") if (tensor := getattr(module, name, None)) is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        print(f"weights: {sum(storages.values())} bytes", flush=True)
        return logits
