"""A test that vLLM still gives what was recorded from it, so that the other engines are compared with the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sameness import from_vllm, recorded


def test_vllm_gives_what_was_recorded(tiny_folder: Path) -> None:
    pytest.importorskip(
        "vllm.transformers_utils.processors.kimi_k25_vision_fused", reason="vLLM's fused processor came after 0.19.1"
    )
    assert from_vllm(tiny_folder) == recorded()
