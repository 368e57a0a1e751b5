"""Provides vLLM's part of `support.scripted`: `vllm serve … --logits-processors support.vllm_scripted:Scripted`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from k26_plugins.common.prompt.tokenizer import KimiTokenizer


class Scripted(AdapterLogitsProcessor):
    """Writes the answer whose token ids a request's `vllm_xargs` give: `{"script": "1,2,3"}`."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        script = (params.extra_args or {}).get("script")
        if script is None:
            return None
        token_ids = [int(token_id) for token_id in script.split(",")]

        def write(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(logits, -torch.inf)
            forced[token_ids[min(len(output_ids), len(token_ids) - 1)]] = 0
            return forced

        return write


def script(folder: Path, answer: str) -> dict[str, Any]:
    """Return the request fields by which a server of the checkpoint in `folder` answers `answer` and then ends."""
    tokenizer = KimiTokenizer(folder)
    token_ids = [*tokenizer.encode_prompt(answer), tokenizer.named["<|im_end|>"]]
    return {"vllm_xargs": {"script": ",".join(map(str, token_ids))}}
