"""Tests of a KV cache in host memory (HiCache): a prompt that left the device's cache is answered from the host's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import sglang_host_cache
from support.agreement import assert_same_top
from support.entry_point import of_sglang
from support.server import Server
from support.sglang_server import EAGER, HAS_ENTRY_POINT, serve

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not HAS_ENTRY_POINT, reason="what stands in for two pieces of a GPU's is a plugin's work"),
]
LENGTH = 200
PROMPTS = [
    torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)
]
# The device's cache has room for less than half of the prompts, the host's cache for all of them.
SIZES = ["--max-total-tokens", "500", "--hicache-ratio", "8"]


def answers(server: Server) -> tuple[list[dict[int, float]], list[int]]:
    """Return each prompt's likeliest first tokens with their log-probabilities, and the number of each prompt's tokens
    whose KV cache came from host memory."""
    found, from_host = [], []
    for prompt in PROMPTS:
        sampling = {"max_new_tokens": 1, "temperature": 0}
        answer = server.post(
            "/generate", input_ids=prompt, sampling_params=sampling, return_logprob=True, top_logprobs_num=5
        )
        assert answer.status_code == 200, answer.text
        meta: dict[str, Any] = answer.json()["meta_info"]
        found.append({token: logprob for logprob, token, *_ in meta["output_top_logprobs"][0]})
        from_host.append((meta.get("cached_tokens_details") or {}).get("host", 0))
    return found, from_host


def test_prompts_come_back_from_the_host_s_memory(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {**EAGER, **of_sglang(sglang_host_cache, tmp_path / "plugin")}
    with serve(tiny_folder, tmp_path / "log", *sglang_host_cache.FLAGS, *SIZES, **settings) as server:
        computed, at_first = answers(server)
        again, from_host = answers(server)
    assert at_first == [0] * len(PROMPTS)
    assert from_host == [LENGTH - 1] * len(PROMPTS)
    assert_same_top(again, computed)
