"""Parts of SGLang as tests without a server call them."""

from __future__ import annotations

from typing import Any

import torch


def hf_utils() -> Any:
    """The module by which SGLang reads configurations, tokenizers and processors; to be imported after registration."""
    from sglang.srt.utils import hf_transformers_utils

    return hf_transformers_utils


class FusedMoE(torch.nn.Module):
    """SGLang finds the experts' format by the name of the layer's class."""


class Runner:
    """A value of `--moe-runner-backend`, as SGLang resolves it."""

    def __init__(self, name: str) -> None:
        from sglang.srt.layers.moe.utils import MoeRunnerBackend

        self.backend = MoeRunnerBackend(name)

    def __call__(self) -> Any:
        return self.backend
