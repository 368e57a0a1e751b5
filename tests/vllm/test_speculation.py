"""Speculative decoding in the real server: what the model answers does not depend on what was guessed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from support import documented
from support.agreement import BYTES, VOCABULARY, assert_same_distribution, rows
from support.golden_file import golden
from support.grammar import SCHEMA, is_valid, liking
from support.server import Server
from support.vllm_server import serve
from typer.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.multimodal import KimiK26
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.common.tiny import TinySizes, make_tiny
from k26_plugins.common.tiny_draft import make_eagle3

pytestmark = pytest.mark.long
# The guesses are what followed the same tokens before: in such a text there is much to guess.
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROMPTS = [[random.Random(seed).randrange(256) for _ in range(20)] * 4 for seed in range(6)]


@dataclass
class Guessing:
    server: Server
    folder: Path
    least_accepted: int


@pytest.fixture(scope="module", params=["ngram", "eagle3"])
def guessing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guessing]:
    work = tmp_path_factory.mktemp(request.param)
    folder, draft = work / "tiny", work / "draft"
    make_tiny(folder, TinySizes(layers=5))
    make_eagle3(folder, draft)
    command = [*documented.as_run(documented.PLAIN_VLLM, folder), "--speculative-config", json.dumps(NGRAM)]
    if request.param == "eagle3":
        command = [word.replace("DRAFT", str(draft)) for word in documented.as_run(documented.EAGLE3_VLLM, folder)]
    with serve(folder, work / "server.log", "--enforce-eager", command=command) as running:
        yield Guessing(running, folder, 20 if request.param == "ngram" else 5)
    if request.param == "eagle3":
        assert "Using auxiliary layers from speculative config: (2, 3, 4)" in running.log.read_text()


def accepted(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=10).text
    name = "vllm:spec_decode_num_accepted_tokens_total"
    return float(next(line for line in metrics.splitlines() if line.startswith(name)).rsplit(" ", 1)[1])


def test_answers_with_guesses_are_the_models(guessing: Guessing) -> None:
    reference = KimiK26(Checkpoint(guessing.folder), torch.float32)
    served, expected = [], []
    for prompt in PROMPTS:
        answer = guessing.server.complete(
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
    assert accepted(guessing.server) > guessing.least_accepted


def test_images_are_answered_as_by_the_reference(guessing: Guessing, prompts_file: Path, tmp_path: Path) -> None:
    file = golden(guessing.folder, prompts_file, tmp_path / "golden.safetensors")
    result = CliRunner().invoke(app, ["verify", "--url", guessing.server.url, "--golden", str(file)])
    assert result.exit_code == 0, result.output


def test_a_grammar_holds_for_guesses(guessing: Guessing) -> None:
    bias = liking(KimiTokenizer(guessing.folder).special, {})
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for seed in range(3):
        answer = guessing.server.chat(
            "Report.", max_tokens=1500, temperature=1, seed=seed, logit_bias=bias, response_format=schema,
            chat_template_kwargs={"thinking": False},
        )  # fmt: skip
        assert is_valid("json", answer["choices"][0]["message"]["content"]), answer
