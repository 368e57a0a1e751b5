"""Tests that a prompt of embeddings is answered as the prompt of the tokens with these embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.agreement import assert_same_top
from support.sglang_server import EAGER, serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26

pytestmark = pytest.mark.long
PROMPTS = [torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def test_a_prompt_of_embeddings_is_answered_as_its_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    reference = KimiK26(Checkpoint(tiny_folder))
    # The radix cache finds a prompt by its token ids, so that SGLang refuses embeddings while the cache is on.
    with serve(tiny_folder, tmp_path / "log", "--disable-radix-cache", **EAGER) as server:

        def first_token(**prompt: Any) -> dict[int, float]:
            sampling = {"max_new_tokens": 2, "temperature": 0}
            asked = {"sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 5}
            answer = server.post("/generate", **asked, **prompt)
            assert answer.status_code == 200, answer.text
            return {token: logprob for logprob, token, *_ in answer.json()["meta_info"]["output_top_logprobs"][0]}

        by_token = [first_token(input_ids=prompt.tolist()) for prompt in PROMPTS]
        by_embedding = [first_token(input_embeds=reference.embed(prompt).float().tolist()) for prompt in PROMPTS]
    assert_same_top(by_embedding, by_token)
