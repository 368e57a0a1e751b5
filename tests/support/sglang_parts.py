"""Stands in for parts of SGLang, for tests that call the adapter without a server."""

from __future__ import annotations

from typing import Any

import torch


def hf_utils() -> Any:
    """Return the module by which SGLang reads configurations, tokenizers and processors.

    Tests must call this after registration, since the module may be imported only then.
    """
    from sglang.srt.utils import hf_transformers_utils

    return hf_transformers_utils


class FusedMoE(torch.nn.Module):
    """A layer with the class name by which SGLang finds the experts' format."""


class Runner:
    """A callable that returns a value of `--moe-runner-backend` as SGLang resolves it."""

    def __init__(self, name: str) -> None:
        from sglang.srt.layers.moe.utils import MoeRunnerBackend

        self.backend = MoeRunnerBackend(name)

    def __call__(self) -> Any:
        return self.backend
