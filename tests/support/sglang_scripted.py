"""SGLang's side of `scripted`: sent with the request to a server that has `--enable-custom-logit-processor`."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class Scripted(CustomLogitProcessor):
    """The request's `custom_params` name the token ids of its answer: `{"script": [1, 2, 3]}`."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            request = params["__req__"]
            # SGLang schedules ahead: the request's own list of tokens may be one behind.
            position = getattr(request, "scripted_position", 0)
            request.scripted_position = position + 1
            logits[row] = -torch.inf
            logits[row, params["script"][min(position, len(params["script"]) - 1)]] = 0
        return logits
