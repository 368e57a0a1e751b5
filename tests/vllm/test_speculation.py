"""Speculative decoding in the real server: what the model answers does not depend on what was guessed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from support.agreement import BYTES, VOCABULARY, assert_same_distribution, rows
from support.server import Server
from support.vllm_server import serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.multimodal import KimiK26

pytestmark = pytest.mark.long
# The guesses are what followed the same tokens before: in such a text there is much to guess.
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROMPTS = [[random.Random(seed).randrange(256) for _ in range(20)] * 4 for seed in range(6)]


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("ngram") / "server.log"
    with serve(tiny_folder, log, "--enforce-eager", "--speculative-config", json.dumps(NGRAM)) as running:
        yield running


def test_answers_with_guesses_are_the_models(server: Server, tiny_folder: Path) -> None:
    reference = KimiK26(Checkpoint(tiny_folder), torch.float32)
    served, expected = [], []
    for prompt in PROMPTS:
        answer = server.complete(
            prompt,
            max_tokens=60,
            temperature=0,
            logprobs=VOCABULARY,
            allowed_token_ids=BYTES,
            return_tokens_as_token_ids=True,
        )
        logprobs = answer["choices"][0]["logprobs"]
        token_ids = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
        assert len(token_ids) == 60
        served.append(rows(logprobs["top_logprobs"]))
        # Greedy: each token is the likeliest that was allowed.
        assert served[-1][:, BYTES].argmax(-1).tolist() == token_ids
        expected.append(reference.logprobs(torch.tensor(prompt + token_ids[:-1]))[len(prompt) - 1 :])
    assert_same_distribution(torch.cat(served), torch.cat(expected))
    metrics = httpx.get(f"{server.url}/metrics", timeout=10).text
    accepted = next(
        line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    )
    assert float(accepted.rsplit(" ", 1)[1]) > 20
